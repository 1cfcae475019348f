"""The grid of (stream, block, step) cells: what each reads, what must come first, and whether launches keep the rules.

A cell is one block of one stream at one denoising step, or what belongs to the block besides: its commit, its
decoding. A *version* of a block is its keys and values as one of its cells left them: (block, level), where the level
is the step, or CLEAN after the commit. Every way to stream a model is an order of launches of cells (launches.py,
schedules.py); all orders that keep the edges of a visibility read the same versions, and so make the same video.
Nothing here knows tensors, clocks or devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from streamgen.geometry import VideoGeometry

Kind = Literal["step", "commit", "decode", "encode", "recache"]
"""step: a denoising pass. commit: the pass that leaves clean keys and values. decode, encode: the codec's. recache: one
pass that writes the clean versions of the whole window anew, for a new prompt (LongLive, arXiv 2509.22622)."""
CODEC: tuple[Kind, ...] = ("decode", "encode")

Visibility = Literal["clean", "same_level", "latest", "lagged", "joint"]
"""Which version of earlier blocks a block reads: the names and the meaning of `streamgen.visibility.Visibility`."""
VISIBILITIES: tuple[Visibility, ...] = get_args(Visibility)

CLEAN = -1
"""Level of the version that a commit leaves."""


class Cell(NamedTuple):
    stream: int
    block: int
    step: int = 0
    """Of kind `step`: 0 is the noisiest. 0 for the other kinds."""
    kind: Kind = "step"


class Read(NamedTuple):
    """Latent frames [start, stop) of a block, as its cell of this level left them."""

    block: int
    level: int
    start: int
    stop: int


class Need(NamedTuple):
    """What must be done before a cell: all of another one, or only the layers that the cell is about to run."""

    cell: Cell
    whole: bool
    why: Literal["chain", "read", "order"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The cells of some streams of one model, and the visibility that ties them."""

    geometry: VideoGeometry
    steps: tuple[tuple[int, ...], ...]
    """[stream][block]: denoising steps of each block. They may differ from block to block."""
    visibility: Visibility = "clean"
    window_frames: int | None = None
    """Latent frames visible in all, sink and what is being denoised included; None: all of them."""
    sink_frames: int = 0
    lag_blocks: int = 1
    """With `lagged`: blocks by which the clean past is behind; 1 is `clean`."""
    clean_sink: bool = False
    """With `same_level`: the sink is read clean (Live Avatar, arXiv 2512.04677), so its blocks are made one by one."""
    commit_latest: bool = False
    """With `latest`: finished blocks are committed, and clean is then their latest version (MAGI-1)."""
    layers: int = 1
    decodes: bool = True
    encodes: bool = False
    """Video comes in: each block begins with the encoding of its input."""
    recaches: frozenset[int] = frozenset()
    """Blocks before which the window is written anew."""
    most_steps: int = field(init=False)
    """The most that any block takes."""

    def __post_init__(self) -> None:
        if self.visibility not in VISIBILITIES:
            raise ValueError(f"visibility={self.visibility!r}: must be one of {', '.join(VISIBILITIES)}")
        if not self.steps or any(not blocks or min(blocks) < 1 for blocks in self.steps):
            raise ValueError(f"steps={self.steps}: must be at least one stream of blocks with at least one step each")
        for name, least in (("lag_blocks", 1), ("layers", 1), ("sink_frames", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        counts = {count for blocks in self.steps for count in blocks}
        object.__setattr__(self, "most_steps", max(counts))
        if self.visibility == "joint" and len(counts) > 1:
            raise ValueError(f"joint blocks take as many steps as the window has blocks, not {sorted(counts)} at once")
        if self.clean_sink and self.visibility != "same_level":
            raise ValueError(f"clean_sink belongs to visibility same_level, not to {self.visibility}")
        if self.recaches and self.visibility not in ("clean", "lagged", "joint"):
            raise ValueError(f"visibility {self.visibility} has no clean window that a recache could write anew")
        together = max(counts) if self.visibility == "joint" else 1
        least = self.sink_frames + together * self.geometry.block_frames
        if self.window_frames is not None and self.window_frames < least:
            raise ValueError(
                f"window_frames={self.window_frames}: must be at least {least}, to hold the sink "
                f"({self.sink_frames}) and what is denoised together ({least - self.sink_frames} frames)"
            )

    @property
    def streams(self) -> int:
        return len(self.steps)

    def commits(self, block: int) -> bool:
        """Does this block have a commit cell?"""
        if self.visibility == "same_level":
            return self.clean_sink and self.geometry.block_start(block) < self.sink_frames
        return self.commit_latest if self.visibility == "latest" else True

    def last_step(self, stream: int, block: int) -> Cell:
        return Cell(stream, block, self.steps[stream][block] - 1)

    def block_cells(self, stream: int, block: int) -> Iterator[Cell]:
        """The cells of a block, in the order in which one device would run them: frames need not wait for a commit."""
        if self.encodes:
            yield Cell(stream, block, kind="encode")
        if block in self.recaches and held(self, block):
            yield Cell(stream, block, kind="recache")
        for step in range(self.steps[stream][block]):
            yield Cell(stream, block, step)
        if self.decodes:
            yield Cell(stream, block, kind="decode")
        if self.commits(block):
            yield Cell(stream, block, kind="commit")

    def cells(self) -> Iterator[Cell]:
        for stream, blocks in enumerate(self.steps):
            for block in range(len(blocks)):
                yield from self.block_cells(stream, block)


# What a cell reads, and what it waits for.


def together(grid: Grid, cell: Cell) -> tuple[Cell, ...]:
    """The cells that must share a launch with this one, itself included, oldest block first.

    Joint steps: the window of consecutive blocks, each one step behind the one before it, that see each other.
    """
    if grid.visibility != "joint" or cell.kind != "step":
        return (cell,)
    first, last = _unit(grid, cell)
    return tuple(Cell(cell.stream, block, cell.block + cell.step - block) for block in range(first, last + 1))


def _unit(grid: Grid, cell: Cell) -> tuple[int, int]:
    """First and last block of what is denoised together with a cell."""
    if grid.visibility != "joint" or cell.kind != "step":
        return cell.block, cell.block
    newest = cell.block + cell.step
    return max(0, newest - grid.most_steps + 1), min(newest, len(grid.steps[cell.stream]) - 1)


def reads(grid: Grid, cell: Cell, newest: Mapping[int, int] | None = None) -> tuple[Read, ...]:
    """The versions of *earlier* blocks that a cell attends to, in time order: `streamgen.attention.visible` as a list.

    newest: with `latest`, the newest finished level of each block of the stream. Blocks that have none are not read.
    The cells of `together` see each other besides. A recache sees the protected sink, and the window that it writes.
    """
    if cell.kind in CODEC:
        return ()
    if cell.kind == "recache":
        return tuple(read for read in held(grid, cell.block) if read.stop <= grid.sink_frames)
    first, last = _unit(grid, cell)
    found = []
    for block, start, stop in _past(grid, first, grid.geometry.block_start(last + 1)):
        level = _level(grid, cell, first, block, stop <= grid.sink_frames, newest or {})
        if level is not None:
            found.append(Read(block, level, start, stop))
    return tuple(found)


def _past(grid: Grid, first: int, stop_frame: int) -> Iterator[tuple[int, int, int]]:
    """(block, frames [start, stop)) before block `first` that a window which ends at `stop_frame` keeps.

    A block that is partly sink comes as two.
    """
    geometry, sink = grid.geometry, grid.sink_frames
    end = geometry.block_start(first)
    kept = max(sink, 0 if grid.window_frames is None else stop_frame - (grid.window_frames - sink))
    for low, high in ((0, min(sink, end)), (kept, end)):
        for block in range(geometry.block_of_latent(low), first) if low < high else ():
            start, stop = max(low, geometry.block_start(block)), min(high, geometry.block_start(block + 1))
            if start < stop:
                yield block, start, stop


def _level(grid: Grid, cell: Cell, first: int, block: int, sink: bool, newest: Mapping[int, int]) -> int | None:
    """The level at which a cell reads a block of its past; None: there is none yet."""
    visibility = grid.visibility
    finished = visibility in ("clean", "joint") or (visibility == "lagged" and block <= first - grid.lag_blocks)
    if cell.kind == "commit" or finished or (sink and grid.clean_sink):
        return CLEAN
    if visibility == "latest":
        return newest.get(block)
    return same_level(cell.step, grid.steps[cell.stream][cell.block], grid.steps[cell.stream][block])


def same_level(step: int, steps: int, of_steps: int) -> int:
    """The step of a block with `of_steps` steps at the noise level of step `step` of `steps`, or at the next noisier.

    Step lists are even in the time before the shift (`flow.step_sigmas`): step i of n meets step j of m at i/n = j/m.
    """
    return step * of_steps // steps


def held(grid: Grid, block: int) -> tuple[Read, ...]:
    """The clean versions that a window cache holds when a block begins: what a recache before it writes anew.

    With `joint` the blocks that are still in the window are not among them.
    """
    first = max(0, block - grid.most_steps + 1) if grid.visibility == "joint" else block
    end = grid.geometry.block_start(first)
    return tuple(Read(past, CLEAN, start, stop) for past, start, stop in _past(grid, first, end))


def producer(stream: int, read: Read) -> Cell:
    """The cell that leaves a version."""
    return Cell(stream, read.block, kind="commit") if read.level == CLEAN else Cell(stream, read.block, read.level)


def needs(grid: Grid, cell: Cell) -> tuple[Need, ...]:
    """The edges into a cell. With `latest` reads are none: it takes what there is, which is step 0 of each at least."""
    stream, block, step, kind = cell

    def before(other: Cell) -> Need:
        return Need(other, True, "chain")

    if kind in CODEC:
        order = [Need(Cell(stream, block - 1, kind=kind), True, "order")] if block else []
        return (*([before(grid.last_step(stream, block))] if kind == "decode" else []), *order)
    if kind == "recache":
        return tuple(Need(one, False, "read") for one in dict.fromkeys(producer(stream, r) for r in held(grid, block)))
    found = []
    if kind == "commit":
        found.append(before(grid.last_step(stream, block)))
    elif step:
        found.append(before(Cell(stream, block, step - 1)))
    elif grid.encodes:
        found.append(before(Cell(stream, block, kind="encode")))
    if kind == "step" and not step and block in grid.recaches and held(grid, block):
        found.append(Need(Cell(stream, block, kind="recache"), False, "read"))
    if grid.visibility == "latest" and kind == "step":
        return (*found, *([Need(Cell(stream, block - 1), True, "read")] if block and not step else []))
    versions = dict.fromkeys(producer(stream, read) for read in reads(grid, cell))
    return (*found, *(Need(one, False, "read") for one in versions))
