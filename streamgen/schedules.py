"""Every published way of streaming as one row of a table: placement, what shares a launch, how far ahead it runs.

A row does not list launches. `timeline` plays it on devices: whenever a device is free it launches what is ready there
(streamgen/grid.py says what that is), oldest block first, as many cells together as the row allows. So the diagonal of
a stream batch, the staircase of a step chain and the waiting of clean visibility all come from the edges of the grid.
Times are in the unit of the costs, and exact: equal costs must not drift apart by rounding.
"""

from __future__ import annotations

import heapq
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from streamgen.errors import UserError
from streamgen.grid import CODEC, Cell, Grid, Visibility, needs, together
from streamgen.launches import Launch

Part = tuple[int, tuple[int, int]]
"""(device, layers [first, stop))"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Devices and how fast they are beside each other."""

    devices: int = 1
    speeds: tuple[float, ...] = ()
    """Of each device; empty: all 1. A device of speed 2 needs half the time."""
    most_rows: int = sys.maxsize
    """The most streams that may share a launch."""

    def __post_init__(self) -> None:
        if self.devices < 1 or (self.speeds and (len(self.speeds) != self.devices or min(self.speeds) <= 0)):
            raise ValueError(
                f"{self.devices} devices with the speeds {self.speeds}: must be one above 0 for each of them"
            )

    def speed(self, device: int) -> float:
        return self.speeds[device] if self.speeds else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Time of a launch with all layers on a device of speed 1, in any unit."""

    passes: tuple[float, ...] = (1.0,)
    """c(1), c(2), ...: one pass over so many cells. Beyond the last, each further cell costs what the last one added
    (of a single number: as much as the first)."""
    decode: float = 0.0
    encode: float = 0.0
    recache: float | None = None
    """None: a pass over as many cells as the window has blocks."""
    send: float = 0.0
    """What goes from one device to another is there so much later."""

    def __post_init__(self) -> None:
        extra = (self.decode, self.encode, self.send, self.recache or 0.0)
        if not self.passes or min(self.passes) <= 0 or list(self.passes) != sorted(self.passes) or min(extra) < 0:
            raise ValueError(
                f"{self}: must be passes above 0 that never get cheaper by more cells, and nothing below 0"
            )

    def rows(self, count: int) -> float:
        """c(count)"""
        if count <= len(self.passes):
            return self.passes[count - 1]
        step = self.passes[-1] - self.passes[-2] if len(self.passes) > 1 else self.passes[0]
        return self.passes[-1] + (count - len(self.passes)) * step

    def row(self, most: int) -> float:
        """The least that a cell costs when up to `most` share a launch."""
        return min(self.rows(count) / count for count in range(1, most + 1))

    def launch(self, grid: Grid, launch: Launch, speed: float) -> Fraction:
        """Time of a launch."""
        kind, count = launch.cells[0].kind, len(launch.cells)
        if kind in CODEC:
            return Fraction(self.decode if kind == "decode" else self.encode) * count / Fraction(speed)
        cost = self.rows(count)
        if kind == "recache":
            frames = grid.window_frames or grid.geometry.block_start(launch.cells[0].block)
            cost = self.rows(-(-frames // grid.geometry.block_frames)) if self.recache is None else self.recache
        first, stop = launch.layers
        return Fraction(cost) * Fraction(stop - first, grid.layers) / Fraction(speed)


# Where a cell runs.


def on_one(grid: Grid, machine: Machine, cell: Cell) -> tuple[Part, ...]:
    """All of a stream on one device; streams take turns over the devices."""
    return ((cell.stream % machine.devices, (0, grid.layers)),)


def by_step(grid: Grid, machine: Machine, cell: Cell) -> tuple[Part, ...]:
    """Steps over devices, in order; the codec on a device of its own if there is one more than passes."""
    passes = chain_passes(grid)
    stages = min(machine.devices, passes)
    if cell.kind in CODEC:
        device = machine.devices - 1
    elif cell.kind == "commit":
        device = stages - 1
    elif cell.kind == "recache":
        device = 0
    else:  # a block of fewer steps meets the others at its noise level
        device = cell.step * grid.most_steps // grid.steps[cell.stream][cell.block] * stages // passes
    return ((device, (0, grid.layers)),)


def chain_passes(grid: Grid) -> int:
    """Passes of a block that lasts: its steps, and its commit where all blocks have one."""
    return grid.most_steps + grid.commits(grid.sink_frames + 1)


def by_layers(grid: Grid, machine: Machine, cell: Cell) -> tuple[Part, ...]:
    """Layers over devices, in order and by speed; encoding with the first, decoding with the last."""
    if cell.kind in CODEC:
        return ((0 if cell.kind == "encode" else machine.devices - 1, (0, grid.layers)),)
    return tuple(enumerate(layer_ranges(grid.layers, machine)))


def layer_ranges(layers: int, machine: Machine) -> tuple[tuple[int, int], ...]:
    """Contiguous layers [first, stop) of each device, at least one, in proportion to its speed."""
    speeds = [machine.speed(device) for device in range(machine.devices)]
    cuts = [0]
    for device in range(1, machine.devices):
        ideal = round(layers * sum(speeds[:device]) / sum(speeds))
        cuts.append(min(max(ideal, cuts[-1] + 1), layers - (machine.devices - device)))
    return tuple(zip(cuts, [*cuts[1:], layers], strict=True))


# The table.


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One way of streaming."""

    systems: str
    """Who streams like that."""
    visibilities: tuple[Visibility, ...]
    """What it can run, the usual one first."""
    place: Callable[[Grid, Machine, Cell], tuple[Part, ...]]
    rows: Callable[[Grid, Machine], int]
    """The most cells of a launch (a joint window counts as one launch, whatever it holds)."""
    depth: Callable[[Grid, Machine], int]
    """Blocks of one stream that are being denoised at once, at most."""
    mixes_streams: bool = False
    """Cells of different streams share launches."""
    devices: Callable[[Grid], tuple[int, str]]
    """The most devices, and why."""


def blocks_at_once(grid: Grid) -> int:
    """Blocks of a stream that its visibility lets be in progress together: what reads finished blocks waits for them.

    A window that ends before the first finished block has nothing to wait for.
    """
    lag = {"clean": 1, "lagged": grid.lag_blocks}.get(grid.visibility)
    reach = (
        grid.window_frames is None or grid.window_frames - grid.sink_frames > (lag or 0) * grid.geometry.block_frames
    )
    return lag if lag is not None and reach else sys.maxsize


def _diagonal(grid: Grid, machine: Machine) -> int:
    return min(chain_passes(grid), blocks_at_once(grid))


def _one_per_stream(grid: Grid) -> tuple[int, str]:
    return grid.streams, f"it keeps a stream on one device, and there are {grid.streams} streams"


def _one_per_layer(grid: Grid) -> tuple[int, str]:
    return grid.layers, f"the model has {grid.layers} layers"


def _one_per_pass(grid: Grid) -> tuple[int, str]:
    passes, codec = chain_passes(grid), int(grid.decodes or grid.encodes)
    return passes + codec, f"a block has {passes} passes" + (", and the codec may have a device" if codec else "")


SCHEDULES: dict[str, Schedule] = {
    "serial": Schedule(
        systems="Self-Forcing, LongLive, CausVid",
        visibilities=("clean", "same_level", "latest", "lagged"),
        place=on_one,
        rows=lambda grid, machine: 1,
        depth=lambda grid, machine: 1,
        devices=_one_per_stream,
    ),
    "stream_batch": Schedule(
        systems="StreamDiffusion 1 and 2",
        visibilities=("same_level", "latest", "lagged"),
        place=on_one,
        rows=_diagonal,
        depth=lambda grid, machine: min(grid.most_steps, blocks_at_once(grid)),
        devices=_one_per_stream,
    ),
    "step_chain": Schedule(
        systems="Live Avatar",
        visibilities=("same_level", "latest", "lagged", "clean"),
        place=by_step,
        rows=lambda grid, machine: 1,
        depth=lambda grid, machine: min(machine.devices, chain_passes(grid), blocks_at_once(grid)),
        devices=_one_per_pass,
    ),
    "layer_ring": Schedule(
        systems="StreamDiffusion 2 on several devices",
        visibilities=("same_level", "latest", "lagged", "clean"),
        place=by_layers,
        rows=_diagonal,
        depth=lambda grid, machine: min(grid.most_steps * machine.devices, blocks_at_once(grid)),
        devices=_one_per_layer,
    ),
    "rolling": Schedule(
        systems="Rolling Forcing, StreamDiT, RAIN, streaming diffusion policy",
        visibilities=("joint",),
        place=on_one,
        rows=lambda grid, machine: 1,
        depth=lambda grid, machine: grid.most_steps,
        devices=_one_per_stream,
    ),
    "interleaved": Schedule(
        systems="several streams through one pipeline",
        visibilities=("clean", "same_level", "latest", "lagged"),
        place=by_layers,
        rows=lambda grid, machine: min(-(-grid.streams // machine.devices), machine.most_rows),
        depth=lambda grid, machine: 1,
        mixes_streams=True,
        devices=_one_per_layer,
    ),
}


def schedule(name: str) -> Schedule:
    """A row by its name, or UserError."""
    if name not in SCHEDULES:
        raise UserError(f"schedule {name!r} does not exist; there are: {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def check_fit(name: str, grid: Grid, machine: Machine) -> Schedule:
    """The row, or UserError where it cannot run this grid on this machine."""
    row = schedule(name)
    if grid.visibility not in row.visibilities:
        raise UserError(
            f"schedule {name} cannot run visibility {grid.visibility}; it runs: {', '.join(row.visibilities)}"
        )
    most, why = row.devices(grid)
    if machine.devices > most:
        raise UserError(f"schedule {name} cannot use {machine.devices} devices: {why}; use at most {most}")
    return row


# Playing a row.


class Timed(NamedTuple):
    launch: Launch
    start: float
    stop: float


@dataclass(slots=True)
class _Node:
    """One part of a cell, or of the cells of a joint window."""

    cells: tuple[Cell, ...]
    device: int
    layers: tuple[int, int]
    waits: int = 0
    ready: Fraction = Fraction(0)
    then: list[tuple[_Node, Fraction]] = field(default_factory=list)
    """What waits for it, and how much longer that is on the way."""

    @property
    def rank(self) -> tuple[int, ...]:
        """Oldest block first, and of a block what is nearest to a screen."""
        stream, block, step, kind = self.cells[0]
        return block, {"decode": 0, "commit": 1}.get(kind, 2), stream, step


def nodes(row: Schedule, grid: Grid, machine: Machine, costs: Costs, *, ahead: bool = False) -> list[_Node]:
    """The grid in parts, with its edges, in an order that keeps them. ahead: as if buffers between had no end."""
    parts: dict[Cell, list[_Node]] = {}
    found: list[_Node] = []

    def join(first: _Node, then: _Node) -> None:
        first.then.append((then, Fraction(costs.send if first.device != then.device else 0)))
        then.waits += 1

    for unit in _units(grid):
        own = [_Node(unit, device, layers) for device, layers in row.place(grid, machine, unit[0])]
        for before, after in pairwise(own):
            join(before, after)
        for cell in unit:
            parts[cell] = own
        found += own
    for own in {id(group): group for group in parts.values()}.values():
        for cell in own[0].cells:
            edges = [(need.cell, need.whole) for need in needs(grid, cell)]
            if not ahead and cell == next(grid.block_cells(cell.stream, cell.block)):
                edges += [(other, True) for other in _buffers(row, grid, machine, costs, cell)]
            for other, whole in edges:
                for node in own[:1] if whole else own:
                    stop = grid.layers if whole else node.layers[1]
                    join(next(part for part in parts[other] if part.layers[1] >= stop), node)
    return found


def _units(grid: Grid) -> Iterator[tuple[Cell, ...]]:
    for cell in grid.cells():
        unit = together(grid, cell)
        if unit[0] == cell:
            yield unit


def _buffers(row: Schedule, grid: Grid, machine: Machine, costs: Costs, cell: Cell) -> Iterator[Cell]:
    """What must have left before a block may begin: bounded buffers, one more for each way that takes time."""
    ways = machine.devices - 1 if costs.send and row.place is not on_one else 0
    depth = row.depth(grid, machine) + ways
    if cell.block >= depth:
        yield grid.last_step(cell.stream, cell.block - depth)
    if cell.block > depth and grid.decodes:
        yield Cell(cell.stream, cell.block - depth - 1, kind="decode")


def timeline(name: str, grid: Grid, machine: Machine | None = None, costs: Costs | None = None) -> list[Timed]:
    """The launches of a schedule in the order in which they start, with their times. UserError if it cannot be."""
    machine, costs = machine or Machine(), costs or Costs()
    row = check_fit(name, grid, machine)
    most = row.rows(grid, machine)
    ready: dict[int, list[_Node]] = defaultdict(list)
    arriving: list[tuple[Fraction, int, _Node]] = []
    running: list[tuple[Fraction, int, list[_Node]]] = []
    idle, found, count = set(range(machine.devices)), list[Timed](), 0
    for node in nodes(row, grid, machine, costs):
        if not node.waits:
            ready[node.device].append(node)
    now = Fraction(0)
    while True:
        while arriving and arriving[0][0] <= now:
            node = heapq.heappop(arriving)[2]
            ready[node.device].append(node)
        for device in sorted(idle & ready.keys()):
            if not ready[device]:
                continue
            group = _group(grid, ready[device], most, row.mixes_streams)
            ready[device] = [node for node in ready[device] if not any(node is taken for taken in group)]
            cells = tuple(cell for node in group for cell in node.cells)
            launch = Launch(device, group[0].layers, cells)
            stop = now + costs.launch(grid, launch, machine.speed(device))
            found.append(Timed(launch, float(now), float(stop)))
            heapq.heappush(running, (stop, count, group))
            idle.discard(device)
            count += 1
        if not running and not arriving:
            return found
        now = min(queue[0][0] for queue in (running, arriving) if queue)
        while running and running[0][0] <= now:
            group = heapq.heappop(running)[2]
            idle.add(group[0].device)
            for node in group:
                for then, late in node.then:
                    then.waits -= 1
                    then.ready = max(then.ready, now + late)
                    if not then.waits:
                        count += 1
                        heapq.heappush(arriving, (then.ready, count, then))


def _group(grid: Grid, ready: list[_Node], most: int, mixes_streams: bool) -> list[_Node]:
    """What the next launch holds: the first in rank, and others of its kind and size."""
    order = sorted(ready, key=lambda node: node.rank)
    first = order[0]
    cell = first.cells[0]
    if cell.kind not in ("step", "commit") or grid.visibility == "joint":
        return [first]
    frames = grid.geometry.block_size(cell.block)
    return [
        node
        for node in order
        if node.layers == first.layers
        and node.cells[0].kind in ("step", "commit")
        and grid.geometry.block_size(node.cells[0].block) == frames
        and (mixes_streams or node.cells[0].stream == cell.stream)
    ][:most]
