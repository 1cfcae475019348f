"""`streamgen eval compare`: one table, a mark where a difference is real, and nothing that is not alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamgen.metrics.adherence import SHARES
from streamgen.metrics.intervals import wilson
from streamgen_infer.cli import main
from streamgen_infer.evaluation.compare import Cell
from tests.command_line import one_line


def figures(obeys: float, n: int = 100, steps: int = 4) -> dict[str, Any]:
    """The fields that one number of steps has, all shares the same."""
    shares = dict.fromkeys(SHARES, obeys)
    intervals = {name: list(wilson(obeys, n)) for name in SHARES}
    return {
        "steps": steps,
        "n": n,
        "adherence": {name: share for name, share in shares.items() if name != "presence"},
        "presence": obeys,
        "intervals": intervals,
        "by_segment": [{"start_s": 0, **shares, "intervals": intervals}],
        "switch": {"n": 0, "transition": "recache"},
    }


def write(name: str, obeys: float, **changes: Any) -> str:
    values = {"command": "eval", "version": "0", "suite": "sprites", "seconds": 5, "captions": "aa", "seeds": [0]}
    Path(name).write_text(json.dumps({**values, **figures(obeys), **changes}))
    return name


def compare(*arguments: str) -> int:
    return main(["eval", "compare", *arguments])


def test_a_difference_is_marked_where_each_is_outside_of_the_others_interval() -> None:
    a = Cell(0.5, 0.4, 0.6)
    assert Cell(0.7, 0.62, 0.8).differs(a)
    assert Cell(0.65, 0.55, 0.75).differs(a)  # the intervals overlap, and neither holds the other's value
    assert not Cell(0.65, 0.45, 0.85).differs(a)
    assert not Cell(0.7).differs(a) and not Cell(None).differs(a)


def test_one_table(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write("a.json", 0.9), write("b.json", 0.88), write("c.json", 0.5)
    assert compare(*files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["a", "b", "c"]
    row = next(line for line in lines if line.startswith("obeys, first 5 s"))
    assert "90.0 [82.6, 94.5]" in row and row.endswith("50.0 [40.4, 59.6] *") and row.count("*") == 1
    assert not any("last 5 s" in line or "switch" in line for line in lines)


def test_markdown(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(write("a.json", 0.9), write("b.json", 0.5), "--markdown") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "|  | a | b |",
        "| --- | --- | --- |",
        r"| obeys, first 5 s, % | 90.0 [82.6, 94.5] | 50.0 [40.4, 59.6] \* |",
    ]


def test_steps_are_columns(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several = write("a.json", 0.9, by_steps=[figures(0.9), figures(0.4, steps=1)])
    assert compare(several) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "a, 4 steps" in lines[0] and "a, 1 step" in lines[0] and "40.0 [30.9, 49.8] *" in lines[1]


def test_switches_drift_and_files_of_one_name(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = figures(0.9)["by_segment"]
    for folder, ratio in (("x", 1.0), ("y", 0.5)):
        Path(folder).mkdir()
        switch = {"transition": "cut", "n": 9, "obeys": ratio, "intervals": {"obeys": [ratio - 0.1, ratio + 0.1]}}
        drift = {"ratio": ratio, "low": ratio - 0.1, "high": None}
        write(f"{folder}/eval.json", 0.9, drift=drift, switches=[switch], by_segment=[*rows, *rows])
    assert compare("x/eval.json", "y/eval.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["x/eval", "y/eval"]
    assert any(line.startswith("switch, cut: obeys") and line.endswith("50.0 [40.0, 60.0] *") for line in lines)
    assert any(line.split() == ["drift", "(last", "/", "first)", "1", "0.5"] for line in lines)
    assert any("obeys, last 5 s" in line for line in lines)


def test_older_files_without_intervals(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"command": "eval", "version": "0", **{k: v for k, v in figures(0.5).items() if k != "intervals"}}
    Path("old.json").write_text(json.dumps(old))
    assert compare(write("a.json", 0.9), "old.json") == 0
    assert "90.0 [82.6, 94.5]  50.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 50}, "a.json and b.json differ in n (100 and 50): measure them alike, or add --force"),
        ({"seconds": 60}, "differ in seconds (5 and 60)"),
        ({"captions": "bb"}, "differ in captions"),
    ],
)
def test_unlike_settings_are_refused_unless_forced(
    in_tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write("a.json", 0.9), write("b.json", 0.8, **changes)
    assert compare(*files) == 2
    assert message in one_line(capsys)
    assert compare(*files, "--force") == 0


def test_what_is_no_report(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write("a.json", 0.9)
    Path("text.json").write_text("hello")
    Path("other.json").write_text('{"command": "bench", "version": "0"}')
    Path("model").mkdir()
    for name, message in (
        ("nowhere.json", "nowhere.json: there is no such file"),
        ("text.json", "text.json is no report of an evaluation"),
        ("other.json", "other.json is no report of an evaluation"),
        ("model", "model is a folder; judge it first: streamgen eval sprites --model model --json FILE"),
    ):
        assert compare(good, name) == 2
        assert message in one_line(capsys)
    assert compare(good) == 2
    assert "needs two JSON files" in one_line(capsys)
