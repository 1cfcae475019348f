"""A study: the commands it makes, in their order, and the table of what they left."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from streamgen.errors import UserError
from streamgen_infer import study
from streamgen_infer.study import Row, Stage, Study, jobs, markdown, table

TEACHER = Stage("train", "lab_ar")
STUDY = Study(
    "toy",
    (0, 1),
    (TEACHER,),
    (
        Row("A", (Stage("distill", "lab_cd", ("objective.teacher_from={before}/lab_ar",)),)),
        Row("A + B", (Stage("distill", "lab_long", ("objective.init_from={previous}",)),), after="A"),
        Row("A, cut", (), ("--transition", "cut"), shares="A"),
    ),
    ("--n", "4"),
)


def test_commands_come_in_an_order_in_which_each_finds_what_it_needs(tmp_path: Path) -> None:
    made: set[Path] = set()
    for job in jobs(STUDY, tmp_path, STUDY.seeds, STUDY.rows):
        for word in job.words:
            for key in ("objective.teacher_from=", "objective.init_from="):
                if word.startswith(key):
                    assert Path(word.removeprefix(key)) / "done.json" in made
        if job.words[0] == "convert":
            assert Path(job.words[1]) / "done.json" in made
        if job.words[0] == "eval":
            assert Path(job.words[3]) / "model_index.json" in made
        made.add(job.made)
    assert len([path for path in made if path.name == "eval.json"]) == 6


def test_a_row_after_another_goes_on_from_its_run_of_the_same_seed(tmp_path: Path) -> None:
    words = [job.words for job in jobs(STUDY, tmp_path, (1,), STUDY.rows[1:2])]
    assert [w[0] for w in words] == ["train", "distill", "distill", "convert", "eval"]
    assert f"objective.init_from={tmp_path}/A/seed1/0_lab_cd" in words[2]
    assert "train.seed=1" in words[2] and words[4][-2:] == (f"{tmp_path}/A___B/seed1/eval.json", "--overwrite")


def test_a_row_that_shares_a_model_only_evaluates_it_differently(tmp_path: Path) -> None:
    *_, convert, evaluate = [job.words for job in jobs(STUDY, tmp_path, (0,), STUDY.rows[2:])]
    assert convert[2] == f"{tmp_path}/A/seed0/model"
    assert evaluate[2:6] == ("--model", f"{tmp_path}/A/seed0/model", "--n", "4") and "cut" in evaluate


def result(first: float, last: float) -> str:
    columns = ("color", "shape", "motion", "presence", "obeys")
    rows = [{"start_s": start, **dict.fromkeys(columns, value)} for start, value in ((0.0, first), (55.0, last))]
    switches = [{"transition": "recache", "obeys": last}, {"transition": "cut", "obeys": first}]
    return json.dumps({"by_segment": rows, "switches": switches})


def test_the_table_has_means_and_standard_errors_over_seeds(tmp_path: Path) -> None:
    for seed, (first, last) in enumerate(((0.8, 0.4), (0.6, 0.6))):
        folder = tmp_path / "A" / f"seed{seed}"
        (folder / "0_lab_cd").mkdir(parents=True)
        (folder / "0_lab_cd" / "done.json").write_text(json.dumps({"seconds": 10.0 * (seed + 1)}))
        (folder / "eval.json").write_text(result(first, last))
        folder.with_name(f"seed{seed}.log").write_text("what the evaluation printed")
    (row,) = table(STUDY, tmp_path)
    assert row["seeds"] == 2 and row["train_s"] == 15.0 and row["last_start_s"] == 55.0
    assert row["first_obeys"] == pytest.approx((0.7, 0.1)) and row["last_obeys"] == pytest.approx((0.5, 0.1))
    assert row["switch"] == {"recache": pytest.approx((0.5, 0.1)), "cut": pytest.approx((0.7, 0.1))}
    other = dict(row, name="B", switch={"cut": (0.25, math.nan)})
    text = markdown([row, other])
    assert "| A | 2 | 15 |" in text and "70 ± 10" in text and "50 ± 10" in text
    assert "after recache | after cut |" in text
    assert [line.rsplit("|", 3)[1:3] for line in text.splitlines()[2:]] == [[" 50 ± 10 ", " 70 ± 10 "], [" - ", " 25 "]]
    one = [dict(row, first_obeys=(0.7, math.nan))]
    assert "| 70 |" in markdown(one)
    assert markdown([]) == "no results yet\n"


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def do(job: study.Job) -> None:
        ran.append(job.words[0])
        job.made.parent.mkdir(parents=True, exist_ok=True)
        job.made.write_text(result(1.0, 1.0) if job.words[0] == "eval" else json.dumps({"seconds": 1.0}))

    monkeypatch.setattr(study, "load_study", lambda name: STUDY)
    monkeypatch.setattr(study, "_do", do)
    assert study.run("toy", root=tmp_path, seeds=[0], only=["A"], dry=False) == 0
    assert ran == ["train", "distill", "convert", "eval"]
    assert study.run("toy", root=tmp_path, seeds=[0], only=["A + B"], dry=False) == 0
    assert ran[4:] == ["distill", "convert", "eval"]
    assert json.loads((tmp_path / "table.json").read_text())[0]["name"] == "A"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"no study 'nothing'; allowed: .*lab"):
        study.load_study("nothing")
    with pytest.raises(UserError, match=r"no row 'X' in study lab; rows: TF"):
        study.run("lab", root=None, seeds=[], only=["X"], dry=True)


def test_the_lab_s_study_is_one(tmp_path: Path) -> None:
    lab = study.load_study("lab")
    assert len(lab.seeds) >= 3
    assert {"TF", "DF", "ODE", "CD", "SF-DMD", "SF-SiD", "SF-GAN"} <= {row.name for row in lab.rows}
    assert list(jobs(lab, tmp_path, (0,), lab.rows))
