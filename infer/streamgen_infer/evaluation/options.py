"""What `eval sprites` is asked, and what is refused before a model is loaded. No torch here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from streamgen.errors import UserError
from streamgen.worlds.grammar import ATTRIBUTES, WHOLE, Part, captions
from streamgen_infer.report import check_report
from streamgen_infer.sinks import check_place
from streamgen_infer.stream_options import CACHE_DTYPES, CACHES, WEIGHTS_DTYPES, check_choices

SEGMENT_S = 5.0
"""Length of a clip and of a segment; `streamgen.metrics.adherence.SEGMENT_S`, without its imports."""
TRANSITIONS = ("recache", "cut", "scene")
PICTURES = ("captions.png", "drift.png", "switches.png")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command's arguments."""

    model: str
    n: int
    seeds: tuple[int, ...]
    """The first one is the report's `seed`."""
    seconds: float
    long_n: int
    switches: int
    steps: tuple[int, ...]
    """The first one's figures are the report's own; empty: the model's default."""
    cache: str
    cache_dtype: str | None = None
    """None: the model's own."""
    weights_dtype: str | None = None
    transitions: tuple[str, ...]
    device: str
    dtype: str
    threads: int | None
    batch: int
    part: Part = WHOLE
    json: Path | None = None
    sheet: Path | None = None
    pictures: Path | None = None
    overwrite: bool = False


def listed(text: str, option: str, read: Callable[[str], T], what: str) -> tuple[T, ...]:
    """Values with commas between them, each once; `what` they must be."""
    try:
        values = tuple(read(word.strip()) for word in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text!r}: must be {what} with commas between them") from None
    if len(set(values)) < len(values):
        raise UserError(f"{option} {text!r}: each one once")
    return values


def part_of(words: Sequence[str]) -> Part:
    """A part of the world from --only ATTRIBUTE=VALUE,... options."""
    values: dict[str, tuple[str, ...]] = {}
    for word in words:
        attribute, equals, allowed = word.partition("=")
        if not equals or attribute not in ATTRIBUTES:
            raise UserError(f"--only {word!r}: must be ATTRIBUTE=VALUE,...; attributes are {', '.join(ATTRIBUTES)}")
        if attribute in values:
            raise UserError(f"--only {attribute} is given twice; list all its values in one")
        values[attribute] = tuple(value.strip() for value in allowed.split(","))
    try:
        part = Part(**values)
        captions("heldout", part)
    except ValueError as error:
        raise UserError(f"--only: {error}") from error
    return part


def check(options: Options) -> None:
    """UserError for everything that can be refused without the model."""
    check_choices(
        ("--cache", options.cache, CACHES),
        ("--cache-dtype", options.cache_dtype, CACHE_DTYPES),
        ("--weights-dtype", options.weights_dtype, WEIGHTS_DTYPES),
    )
    most = len(captions("heldout", options.part))
    ranges = [
        ("--n", options.n, 2, most),
        ("--long-n", options.long_n, 1, most),
        ("--switches", options.switches, 0, most - 1),
        *(("--seed", seed, 0, 2**32 - 1) for seed in options.seeds),
        ("--seconds", options.seconds, SEGMENT_S, 3600),
        *(("--steps", steps, 1, 1000) for steps in options.steps),
        ("--batch", options.batch, 1, 256),
    ]
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise UserError(f"{name} is {value}; it must be {low:g} to {high:g}")
    unknown = [name for name in options.transitions if name not in TRANSITIONS]
    if unknown:
        raise UserError(f"--transitions: {unknown[0]!r} does not exist; there are: {', '.join(TRANSITIONS)}")
    for path, option in ((options.json, "--json"), (options.sheet, "--sheet"), (options.pictures, "--pictures")):
        if path is not None:
            check_place(path, option)
    if options.json is not None:
        check_report(options.json, "--json", overwrite=options.overwrite)
    if options.sheet is not None and options.sheet.exists() and not options.overwrite:
        raise UserError(f"--sheet {options.sheet} exists; choose another name or add --overwrite")
    if options.pictures is not None:
        _check_pictures(options.pictures, options.overwrite)


def _check_pictures(folder: Path, overwrite: bool) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--pictures needs matplotlib, which is not installed: pip install 'streamgen[eval]'")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--pictures {folder} is a file; give a folder")
    there = [name for name in PICTURES if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(f"--pictures {folder} holds {there[0]} already; choose another folder or add --overwrite")
