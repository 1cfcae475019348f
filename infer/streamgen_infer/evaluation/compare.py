"""`streamgen eval compare A.json B.json ...`: one table, a column for each model and number of steps.

A value is marked where it differs from the first column's by more than both can be wrong: each lies outside of the
other's 95 % interval.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamgen.errors import UserError
from streamgen.worlds.grammar import ATTRIBUTES
from streamgen_infer.evaluation.show import aligned, steps_text

SETTINGS = ("suite", "n", "seconds", "long_n", "seeds", "captions")
"""What must be the same; where one of two files does not say (an older one), it is not compared."""
MARK = "*"
Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure, and its interval if it has one."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def differs(self, other: Cell) -> bool:
        """Each outside of the other's interval."""
        return self._excludes(other.value) and other._excludes(self.value)

    def _excludes(self, value: float | None) -> bool:
        return None not in (value, self.low, self.high) and not self.low <= value <= self.high  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class Column:
    label: str
    values: Values
    """The fields of one number of steps."""


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table: what, in percent or as it is, and where it is found."""

    label: str
    percent: bool
    find: Callable[[Values], Cell]


def run(files: Sequence[Path], *, markdown: bool, force: bool) -> int:
    """The command; returns the exit code."""
    if len(files) < 2 and not (files and "by_steps" in _load(files[0])):
        raise UserError("eval compare needs two JSON files of `eval sprites --json`, or one with several --steps")
    reports = [_load(file) for file in files]
    if not force:
        check_settings(files, reports)
    columns = list(columns_of(files, reports))
    rows = list(table(columns))
    print(as_markdown(columns, rows) if markdown else as_text(columns, rows))
    return 0


def _load(file: Path) -> dict[str, Any]:
    if file.is_dir():
        raise UserError(f"{file} is a folder; judge it first: streamgen eval sprites --model {file} --json FILE")
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; give JSON files of `streamgen eval sprites --json FILE`")
    try:
        found = json.loads(file.read_text())
    except ValueError:  # not text, or not JSON
        found = None
    if not isinstance(found, dict) or found.get("command") != "eval" or "adherence" not in found:
        raise UserError(f"{file} is no report of an evaluation; `streamgen eval sprites --json FILE` writes them")
    return found


def check_settings(files: Sequence[Path], reports: Sequence[Values]) -> None:
    """UserError where two were not measured alike."""
    first = reports[0]
    for file, other in zip(files[1:], reports[1:], strict=True):
        for name in SETTINGS:
            if name in first and name in other and first[name] != other[name]:
                raise UserError(
                    f"{files[0]} and {file} differ in {name} ({first[name]} and {other[name]}): measure them alike, "
                    f"or add --force"
                )


def columns_of(files: Sequence[Path], reports: Sequence[Values]) -> Iterator[Column]:
    """In the order of the files, each with its numbers of steps; named by what tells them apart."""
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(stems) else [str(file.with_suffix("")) for file in files]
    for name, values in zip(names, reports, strict=True):
        several = values.get("by_steps", [values])
        for one in several:
            yield Column(f"{name}, {steps_text(one['steps'])}" if len(several) > 1 else name, {**values, **one})


def table(columns: Sequence[Column]) -> Iterator[tuple[Line, list[Cell]]]:
    """The lines of which any column knows the value."""
    for line in _lines(columns):
        cells = [line.find(column.values) for column in columns]
        if any(cell.value is not None for cell in cells):
            yield line, cells


def _lines(columns: Sequence[Column]) -> Iterator[Line]:
    for name in ("obeys", *ATTRIBUTES, "presence"):
        yield Line(f"{name}, first 5 s", True, lambda v, name=name: _first(v, name))  # type: ignore[misc]
    for name in ("obeys", *ATTRIBUTES, "presence"):
        yield Line(f"{name}, last 5 s", True, lambda v, name=name: _last(v, name))  # type: ignore[misc]
    yield Line("drift (last / first)", False, _drift)
    names = dict.fromkeys(one["transition"] for column in columns for one in _switches(column.values))
    for transition in names:
        for label, name, percent in (
            ("obeys", "obeys", True),
            ("within 1 s", "within_1s", True),
            ("median s", "median_latency_all_s", False),
        ):
            yield Line(f"switch, {transition}: {label}", percent, _of_switch(transition, name))
    yield Line("null: shuffled captions", True, lambda v: _cell(v.get("nulls"), "shuffled"))
    for name, unit in (("speed", "sides/s"), ("jerk", "sides/s^3")):
        yield Line(f"{name}, {unit}", False, lambda v, name=name: _cell(v.get("motion"), name))  # type: ignore[misc]
    yield Line("moving clips", True, lambda v: _cell(v.get("motion"), "moving"))
    for name in ("t", "f", "d"):
        yield Line(f"STREAM-{name.upper()}", False, lambda v, name=name: _cell(v.get("stream"), name))  # type: ignore[misc]
    yield Line("codec alone: obeys", True, lambda v: _first(v.get("codec") or {}, "obeys"))
    yield Line("codec alone: PSNR, dB", False, lambda v: _cell(v.get("codec"), "psnr_db"))
    yield Line("frames per second, one stream", False, lambda v: _cell(v, "stream_fps"))


def _cell(values: Values | None, name: str) -> Cell:
    if values is None:
        return Cell(None)
    return Cell(values.get(name), *values.get("intervals", {}).get(name, ()))


def _first(values: Values, name: str) -> Cell:
    found = values.get("adherence", {}).get(name, values.get(name))
    return Cell(found, *values.get("intervals", {}).get(name, ()))


def _last(values: Values, name: str) -> Cell:
    return _cell(values["by_segment"][-1], name) if len(values["by_segment"]) > 1 else Cell(None)


def _drift(values: Values) -> Cell:
    found = values.get("drift")
    return Cell(None) if found is None else Cell(found["ratio"], found["low"], found["high"])


def _switches(values: Values) -> list[Values]:
    """Of an older report, the one transition it has."""
    return [one for one in values.get("switches", [values["switch"]]) if one["n"]]


def _of_switch(transition: str, name: str) -> Callable[[Values], Cell]:
    def find(values: Values) -> Cell:
        found = [one for one in _switches(values) if one["transition"] == transition]
        return _cell(found[0] if found else None, name)

    return find


# What is printed.


def _written(line: Line, cell: Cell, first: Cell | None) -> str:
    """Value, interval, and the mark of a difference from the first column."""
    if cell.value is None:
        return "-"
    scale = 100 if line.percent else 1

    def number(value: float) -> str:
        return f"{scale * value:.1f}" if line.percent else f"{value:.3g}"

    between = "" if cell.low is None or cell.high is None else f" [{number(cell.low)}, {number(cell.high)}]"
    return number(cell.value) + between + (f" {MARK}" if first is not None and cell.differs(first) else "")


def _rows_of_text(rows: Sequence[tuple[Line, list[Cell]]]) -> Iterator[list[str]]:
    for line, cells in rows:
        label = f"{line.label}, %" if line.percent else line.label
        yield [label, *(_written(line, cell, cells[0] if i else None) for i, cell in enumerate(cells))]


def _legend(columns: Sequence[Column]) -> str:
    return f"[95 % interval]; {MARK} differs from {columns[0].label}: each outside of the other's interval"


def as_text(columns: Sequence[Column], rows: Sequence[tuple[Line, list[Cell]]]) -> str:
    """Aligned columns."""
    return aligned([["", *(column.label for column in columns)], *_rows_of_text(rows)]) + "\n" + _legend(columns)


def as_markdown(columns: Sequence[Column], rows: Sequence[tuple[Line, list[Cell]]]) -> str:
    """The same as a table of a document."""
    lines = [["", *(column.label.replace("|", "\\|") for column in columns)], ["---"] * (len(columns) + 1)]
    lines += [[word.replace(f" {MARK}", f" \\{MARK}") for word in line] for line in _rows_of_text(rows)]
    table_ = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table_}\n\n{_legend(columns).replace(MARK, chr(92) + MARK)}"
