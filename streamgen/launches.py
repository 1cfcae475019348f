"""Launches: which rules they keep, and what keys and values are held while they run, known before anything runs.

A *launch* is one forward on one device: some layers of some cells of the grid (streamgen/grid.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from streamgen.grid import CLEAN, CODEC, Cell, Grid, Read, held, needs, reads, together


@dataclass(frozen=True, slots=True)
class Launch:
    """One forward on one device: layers [first, stop) of some cells. Codec cells count as all layers."""

    device: int
    layers: tuple[int, int]
    cells: tuple[Cell, ...]


Version = tuple[int, int, int]
"""(stream, block, level)"""


def trace(grid: Grid, launches: Sequence[Launch]) -> dict[Cell, tuple[Read, ...]]:
    """What each cell of a run reads. Only `latest` depends on the launches: it sees what earlier ones finished."""
    newest: dict[int, dict[int, int]] = {stream: {} for stream in range(grid.streams)}
    found: dict[Cell, tuple[Read, ...]] = {}
    for launch in launches:
        for cell in launch.cells:
            if cell not in found:
                found[cell] = reads(grid, cell, newest[cell.stream])
        for cell in launch.cells:
            if launch.layers[1] == grid.layers and cell.kind in ("step", "commit"):
                newest[cell.stream][cell.block] = CLEAN if cell.kind == "commit" else cell.step
    return found


def read_counts(grid: Grid, launches: Sequence[Launch] = ()) -> Counter[Version]:
    """How often each version will be read; one that is missing is read by nobody, and need not be kept.

    launches: with `latest`, the run in question.
    """
    seen = trace(grid, launches) if grid.visibility == "latest" else {c: reads(grid, c) for c in grid.cells()}
    pairs = {(cell, read.block, read.level) for cell, found in seen.items() for read in found}
    return Counter((cell.stream, block, level) for cell, block, level in pairs)


def last_uses(grid: Grid, launches: Sequence[Launch]) -> dict[Version, int]:
    """Version -> index of the last launch that reads it (that makes it, if none does): it can leave after that one."""
    seen, last = trace(grid, launches), dict[Version, int]()
    for index, launch in enumerate(launches):
        for cell in launch.cells:
            made = (
                [(cell.block, cell.step if cell.kind == "step" else CLEAN)] if cell.kind in ("step", "commit") else []
            )
            for block, level in (*made, *((read.block, read.level) for read in seen[cell])):
                last[cell.stream, block, level] = index
    return last


def held_frames(grid: Grid, launches: Sequence[Launch]) -> list[dict[int, int]]:
    """For each launch: device -> frame-layers of keys and values held while it runs.

    A frame-layer is one latent frame in one layer. A version is held on a device from the launch that makes it there,
    or first reads it there (it was sent), to its last use there. What is being computed counts, kept or not.
    """
    seen = trace(grid, launches)
    first: dict[tuple[int, int, int, int, tuple[int, int]], int] = {}
    last: dict[tuple[int, int, int, int, tuple[int, int]], int] = {}
    for index, launch in enumerate(launches):
        for cell in launch.cells:
            for level, start, stop in _touched(grid, cell, seen[cell]):
                for frame in range(start, stop):
                    key = (launch.device, cell.stream, frame, level, launch.layers)
                    first.setdefault(key, index)
                    last[key] = index
    change: list[Counter[int]] = [Counter() for _ in range(len(launches) + 1)]
    for key, index in first.items():
        size = key[-1][1] - key[-1][0]
        change[index][key[0]] += size
        change[last[key] + 1][key[0]] -= size
    holding: Counter[int] = Counter()
    found = []
    for step in change[:-1]:
        holding.update(step)
        found.append(dict(holding))
    return found


def _touched(grid: Grid, cell: Cell, seen: Sequence[Read]) -> Iterator[tuple[int, int, int]]:
    """(level, frames [start, stop)) of the keys and values that a cell reads or writes."""
    yield from ((read.level, read.start, read.stop) for read in seen)
    if cell.kind == "recache":
        yield from ((read.level, read.start, read.stop) for read in held(grid, cell.block))
    elif cell.kind not in CODEC:
        level = cell.step if cell.kind == "step" else CLEAN
        yield level, grid.geometry.block_start(cell.block), grid.geometry.block_start(cell.block + 1)


def peak_frames(grid: Grid, launches: Sequence[Launch]) -> dict[int, int]:
    """Device -> the most frame-layers of keys and values that it ever holds: bytes, known beforehand."""
    peak: Counter[int] = Counter()
    for holding in held_frames(grid, launches):
        peak |= Counter(holding)
    return dict(peak)


# Rules.


class Violation(NamedTuple):
    """The first rule that a list of launches breaks."""

    rule: str
    """One of RULES."""
    launch: int | None
    """Its place in the list; None: of the list as a whole."""
    message: str


RULES = {
    "device": "a launch names a device that exists and layers that the model has",
    "cell": "a launch holds cells of the grid, none twice",
    "shape": "cells of a launch have equal shapes, unless padded; codec cells and passes are never mixed",
    "twice": "a cell passes each layer once; a block is decoded once",
    "layers": "a cell passes the layers in order",
    "joint": "the cells of a joint window share a launch",
    "chain": "a cell comes after the one before it of its block",
    "order": "blocks are encoded and decoded in order",
    "read": "a version is read in a later launch than the one that produces it",
    "memory": "keys and values held on a device are within its memory",
    "unfinished": "every cell passes all layers",
}


def violation(
    grid: Grid,
    launches: Sequence[Launch],
    *,
    devices: int,
    most_frames: Mapping[int, int] | None = None,
    padded: bool = False,
    whole: bool = True,
) -> Violation | None:
    """The first rule broken by launches in this order, or None.

    most_frames: device -> frame-layers of keys and values that fit (`held_frames`). padded: launches may mix lengths.
    whole: the list is all there is, so nothing may be left unfinished.
    """
    done = dict.fromkeys(grid.cells(), 0)
    for index, launch in enumerate(launches):
        broken = _form(grid, launch, devices, padded, done) or _edges(grid, launch, done)
        if broken is not None:
            return Violation(broken[0], index, f"launch {index}: {broken[1]}")
        for cell in launch.cells:
            done[cell] = launch.layers[1]
    for index, holding in enumerate(held_frames(grid, launches) if most_frames is not None else ()):
        for device, frames in holding.items():
            fits = (most_frames or {}).get(device, frames)
            if frames > fits:
                message = f"launch {index}: device {device} holds {frames} frame-layers of keys and values, {fits} fit"
                return Violation("memory", index, message)
    left = [cell for cell, layers in done.items() if layers < grid.layers] if whole else []
    return Violation("unfinished", None, f"{len(left)} cells are left, first {name(left[0])}") if left else None


def name(cell: Cell) -> str:
    """How messages call a cell."""
    what = f"step {cell.step}" if cell.kind == "step" else cell.kind
    return f"{what} of block {cell.block} of stream {cell.stream}"


def _form(grid: Grid, launch: Launch, devices: int, padded: bool, done: Mapping[Cell, int]) -> tuple[str, str] | None:
    """Rules of a launch by itself."""
    first, stop = launch.layers
    if not 0 <= launch.device < devices:
        return "device", f"device {launch.device} does not exist; there are {devices}"
    if not 0 <= first < stop <= grid.layers:
        return "device", f"layers {first} to {stop} of a model with {grid.layers}"
    strange = [cell for cell in launch.cells if cell not in done]
    if strange:
        return "cell", f"{name(strange[0])} is not in the grid"
    if not launch.cells or len(set(launch.cells)) < len(launch.cells):
        return "cell", "the same cell twice" if launch.cells else "no cell"
    codec = {cell.kind for cell in launch.cells if cell.kind in CODEC}
    if len(codec) > 1 or (codec and any(cell.kind not in CODEC for cell in launch.cells)):
        return "shape", "codec cells share a launch with other work"
    if codec and launch.layers != (0, grid.layers):
        return "layers", "the codec's work is not split by layers"
    lengths = _lengths(grid, launch.cells)
    if len(set(lengths.values())) > 1 and not padded:
        a, b = list(dict.fromkeys(lengths.values()))[:2]
        return "shape", f"cells of {a} and of {b} latent frames share a launch that is not padded"
    return None


def _lengths(grid: Grid, cells: Sequence[Cell]) -> Mapping[tuple[Cell, ...], int]:
    """Latent frames of each row of a launch: of a block, a joint window or a recached window."""
    size = grid.geometry.block_size
    rows = dict.fromkeys(together(grid, cell) for cell in cells)
    return {
        row: sum(r.stop - r.start for r in held(grid, row[0].block))
        if row[0].kind == "recache"
        else sum(size(cell.block) for cell in row)
        for row in rows
    }


def _edges(grid: Grid, launch: Launch, done: Mapping[Cell, int]) -> tuple[str, str] | None:
    """Rules between a launch and those before it."""
    first, stop = launch.layers
    for cell in launch.cells:
        if done[cell] > first:
            return "twice", f"{name(cell)} has passed layer {first} before"
        if done[cell] < first:
            return "layers", f"{name(cell)} is at layer {done[cell]}, not at {first}"
        apart = [other for other in together(grid, cell) if other not in launch.cells]
        if apart:
            return "joint", f"{name(cell)} without {name(apart[0])}, which it sees"
    for cell in launch.cells:
        for need in needs(grid, cell):
            if done[need.cell] < (grid.layers if need.whole else stop):
                return need.why, f"{name(cell)} before {name(need.cell)}"
    return None
