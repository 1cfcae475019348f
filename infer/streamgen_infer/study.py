"""`streamgen study NAME`: many trainings compared over seeds, as one file of configs/study says.

Each row of a study is a chain of `streamgen train` and `streamgen distill` runs; its last run becomes a model folder
(`streamgen convert`), which `streamgen eval` judges. All are the commands a person would type, run one after the other
in processes of their own and printed, so that any cell of the table can be made again by hand. What is done is not
done again: a study that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamgen.errors import UserError
from streamgen.metrics.intervals import mean_and_error
from streamgen.resources import configs_dir
from streamgen_infer.errors import Failure


@dataclass(frozen=True, slots=True)
class Stage:
    """One run: `streamgen COMMAND experiment=EXPERIMENT run_dir=... train.seed=... SET...`."""

    command: str
    experiment: str
    set: tuple[str, ...] = ()
    """Overrides; {previous} is the run folder of the stage before, {before} the folder of the common runs."""


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    stages: tuple[Stage, ...]
    evaluate: tuple[str, ...] = ()
    """More options of `streamgen eval sprites` for this row."""
    shares: str | None = None
    """Use the models of this row (only the evaluation differs)."""
    after: str | None = None
    """Go on from the last run of this row, of the same seed: {previous} of the first stage."""


@dataclass(frozen=True, slots=True)
class Study:
    name: str
    seeds: tuple[int, ...]
    before: tuple[Stage, ...]
    """Runs that all rows build on (teachers), made once with seed 0."""
    rows: tuple[Row, ...]
    evaluate: tuple[str, ...] = field(default=())
    """Options of `streamgen eval sprites` for every row."""


def load_study(name: str) -> Study:
    """configs/study/NAME.yaml; UserError for what cannot be read as a study."""
    folder = configs_dir() / "study"
    file = folder / f"{name}.yaml"
    if not file.is_file():
        raise UserError(f"no study {name!r}; allowed: {', '.join(sorted(p.stem for p in folder.glob('*.yaml')))}")
    from omegaconf import OmegaConf

    data = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    try:
        assert isinstance(data, dict)
        return Study(
            name,
            tuple(data["seeds"]),
            tuple(_stage(stage) for stage in data["before"]),
            tuple(
                Row(
                    str(row["name"]),
                    tuple(_stage(stage) for stage in row.get("stages", ())),
                    tuple(row.get("evaluate", ())),
                    row.get("shares"),
                    row.get("after"),
                )
                for row in data["rows"]
            ),
            tuple(data.get("evaluate", ())),
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not a study ({type(error).__name__}: {error})") from error


def _stage(data: Mapping[str, Any]) -> Stage:
    if data["command"] not in ("train", "distill"):
        raise ValueError(f"command {data['command']!r}; allowed: train, distill")
    return Stage(data["command"], data["experiment"], tuple(data.get("set", ())))


@dataclass(frozen=True, slots=True)
class Job:
    """One command of a study, and the file or folder that says it is done."""

    words: tuple[str, ...]
    made: Path


def jobs(study: Study, root: Path, seeds: Sequence[int], rows: Sequence[Row]) -> Iterator[Job]:
    """The commands of a study, in the order in which they must run; one that is needed twice comes twice."""
    before = root / "before"
    previous = before
    for stage in study.before:
        run = before / stage.experiment
        yield _run_job(stage, run, previous, before, 0)
        previous = run
    by_name = {row.name: row for row in study.rows}
    for seed in seeds:
        for row in rows:
            source = row if row.shares is None else by_name[row.shares]
            *chain, last = _chain(source, by_name, root, seed)
            yield from chain
            yield last
            model = root / _slug(source.name) / f"seed{seed}" / "model"
            yield Job(("convert", str(last.made.parent), str(model)), model / "model_index.json")
            result = root / _slug(row.name) / f"seed{seed}" / "eval.json"
            options = (*study.evaluate, *row.evaluate, "--seed", str(seed), "--json", str(result), "--overwrite")
            yield Job(("eval", "sprites", "--model", str(model), *options), result)


def _chain(row: Row, by_name: Mapping[str, Row], root: Path, seed: int) -> list[Job]:
    """The runs that make a row's model, those of the rows before it included."""
    made = [] if row.after is None else _chain(by_name[row.after], by_name, root, seed)
    for number, stage in enumerate(row.stages):
        previous = made[-1].made.parent if made else root / "before"
        run = root / _slug(row.name) / f"seed{seed}" / f"{number}_{stage.experiment}"
        made.append(_run_job(stage, run, previous, root / "before", seed))
    return made


def _run_job(stage: Stage, run: Path, previous: Path, before: Path, seed: int) -> Job:
    values = [text.replace("{previous}", str(previous)).replace("{before}", str(before)) for text in stage.set]
    words = (stage.command, f"experiment={stage.experiment}", f"run_dir={run}", f"train.seed={seed}", *values)
    return Job(words, run / "done.json")


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def run(name: str, *, root: Path | None, seeds: Sequence[int], only: Sequence[str], dry: bool) -> int:
    """The command: make what is missing, then write table.json and table.md beside it; -> exit code."""
    study = load_study(name)
    root = Path("runs") / "study" / name if root is None else root
    chosen = [row for row in study.rows if not only or row.name in only]
    missing = sorted(set(only) - {row.name for row in study.rows})
    if missing:
        raise UserError(f"no row {missing[0]!r} in study {name}; rows: {', '.join(row.name for row in study.rows)}")
    seeds = seeds or study.seeds
    for job in jobs(study, root, seeds, chosen):
        if dry:
            print("streamgen " + shlex.join(job.words))
        elif not job.made.exists():
            _do(job)
    if not dry:
        rows = table(study, root)
        _write(root / "table.json", json.dumps(rows, indent=1) + "\n")
        _write(root / "table.md", markdown(rows))
        print(markdown(rows))
        print(f"written: {root / 'table.json'}, {root / 'table.md'}")
    return 0


def _do(job: Job) -> None:
    print("streamgen " + shlex.join(job.words), flush=True)
    folder = job.made.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")  # beside it: a model folder holds a model and nothing else
    start = time.monotonic()
    with open(log, "w") as file:
        code = subprocess.run([sys.executable, "-m", "streamgen", *job.words], stdout=file, stderr=file).returncode
    if code:
        raise Failure(f"streamgen {shlex.join(job.words)} ended with {code}; see {log}")
    if job.made.name == "done.json":
        _write(job.made, json.dumps({"seconds": time.monotonic() - start, "command": list(job.words)}) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


COLUMNS = ("color", "shape", "motion", "presence", "obeys")


def table(study: Study, root: Path) -> list[dict[str, Any]]:
    """One entry per row that has results: for the first and the last segment, and after switches by each transition
    (last 2 s), mean and standard error over seeds."""
    out = []
    for row in study.rows:
        files = sorted((root / _slug(row.name)).glob("seed*/eval.json"))
        results = [json.loads(file.read_text()) for file in files]
        if not results:
            continue
        entry: dict[str, Any] = {"name": row.name, "seeds": len(results), "train_s": _train_seconds(root, row, study)}
        for where, index in (("first", 0), ("last", -1)):
            segments = [result["by_segment"][index] for result in results]
            entry[f"{where}_start_s"] = segments[0]["start_s"]
            for column in COLUMNS:
                entry[f"{where}_{column}"] = mean_and_error([segment[column] for segment in segments])
        switches = [{one["transition"]: one["obeys"] for one in result.get("switches", ())} for result in results]
        entry["switch"] = {name: mean_and_error([found[name] for found in switches]) for name in switches[0]}
        out.append(entry)
    return out


def _train_seconds(root: Path, row: Row, study: Study) -> float | None:
    """Wall seconds of the runs of a row's chain, mean over seeds; without the common runs before."""
    by_name = {item.name: item for item in study.rows}
    source = row if row.shares is None else by_name[row.shares]
    totals = []
    for result in sorted((root / _slug(row.name)).glob("seed*/eval.json")):
        done = [job.made for job in _chain(source, by_name, root, int(result.parent.name.removeprefix("seed")))]
        if all(file.is_file() for file in done):
            totals.append(sum(json.loads(file.read_text())["seconds"] for file in done))
    return statistics.fmean(totals) if totals else None


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as people read it."""
    if not rows:
        return "no results yet\n"
    names = [f"{where} {column}" for where in ("first", "last") for column in COLUMNS]
    transitions = list(dict.fromkeys(name for row in rows for name in row["switch"]))
    names += [f"after {name}" for name in transitions]
    lines = ["| training | seeds | train s | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        cells = [_cell(row[f"{where}_{column}"]) for where in ("first", "last") for column in COLUMNS]
        cells += [_cell(row["switch"][name]) if name in row["switch"] else "-" for name in transitions]
        seconds = "-" if row["train_s"] is None else f"{row['train_s']:.0f}"
        lines.append(f"| {row['name']} | {row['seeds']} | {seconds} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Sequence[float]) -> str:
    mean, error = value
    return f"{100 * mean:.0f}" if math.isnan(error) else f"{100 * mean:.0f} ± {100 * error:.0f}"
