"""How often a schedule can begin a block: the initiation interval of modulo scheduling, applied to streams.

A stream is a loop over its blocks. Its period is never below either of two bounds: what the busiest device has to do
for a block of every stream (resource), and what a block waits for of the one before it, whatever the number of devices
(recurrence). `figures` reads the real ones off a timeline. Times are in the unit of the costs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from streamgen.grid import CODEC, Cell, Grid
from streamgen.launches import Launch
from streamgen.schedules import Costs, Machine, Schedule, Timed, check_fit, nodes

WAITS = {
    "clean": "a block begins when the one before it is committed",
    "same_level": "a step follows the same step of the block before it",
    "latest": "a block begins when the one before it has done its first step",
    "lagged": "a block waits for the commit of the one {lag} before it",
    "joint": "a launch of the window follows the one before it, and the commit of the block that left",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Bounds of the time between finished blocks of a stream."""

    resource: tuple[float, ...]
    """Of each device: its work for one block of every stream."""
    recurrence: float
    reason: str
    """What makes the recurrence."""

    @property
    def period(self) -> float:
        return max(*self.resource, self.recurrence)

    @property
    def limit(self) -> str:
        """The bound that holds, in words."""
        if self.recurrence > max(self.resource):
            return f"recurrence: {self.reason}"
        busiest = [device for device, time in enumerate(self.resource) if time == self.period]
        if len(busiest) > 1:
            return f"resource: the work of {len(busiest)} devices, equally busy"
        return f"resource: the work of device {busiest[0]}"


def interval(name: str, grid: Grid, machine: Machine, costs: Costs) -> Interval:
    """The bounds of a schedule, for streams whose blocks are like the last one of each. UserError as `check_fit`."""
    row = check_fit(name, grid, machine)
    recurrence, reason = _recurrence(row, grid, machine, costs)
    return Interval(resource=resource(row, grid, machine, costs), recurrence=recurrence, reason=reason)


def resource(row: Schedule, grid: Grid, machine: Machine, costs: Costs) -> tuple[float, ...]:
    """The work of each device for one block of every stream, with launches as full as the row allows."""
    work = [Fraction(0)] * machine.devices
    cell_cost = Fraction(costs.row(row.rows(grid, machine)))
    for stream, blocks in enumerate(grid.steps):
        for cell in grid.block_cells(stream, len(blocks) - 1):
            for device, layers in row.place(grid, machine, cell):
                work[device] += _cost(cell, layers, cell_cost, grid, costs) / Fraction(machine.speed(device))
    return tuple(float(time) for time in work)


def _cost(cell: Cell, layers: tuple[int, int], cell_cost: Fraction, grid: Grid, costs: Costs) -> Fraction:
    """The least that a part of a cell costs where it runs."""
    if cell.kind in (*CODEC, "recache"):
        return costs.launch(grid, Launch(0, layers, (cell,)), 1.0)
    if grid.visibility == "joint":
        window = grid.most_steps
        cell_cost = Fraction(costs.rows(window)) / window if cell.kind == "step" else Fraction(costs.rows(1))
    return cell_cost * Fraction(layers[1] - layers[0], grid.layers)


def _recurrence(row: Schedule, grid: Grid, machine: Machine, costs: Costs) -> tuple[float, str]:
    """The slope of the blocks' ends when every part runs as soon as it may."""
    with_codec = _slope(row, grid, machine, costs)
    passes = _slope(row, replace(grid, decodes=False, encodes=False), machine, costs)
    if with_codec > passes:
        return float(with_codec), "the codec takes the blocks of a stream one after another"
    return float(passes), WAITS[grid.visibility].format(lag=grid.lag_blocks)


def _slope(row: Schedule, grid: Grid, machine: Machine, costs: Costs) -> Fraction:
    count, lag = grid.steps[0][-1], grid.lag_blocks if grid.visibility == "lagged" else 1
    sink = grid.sink_frames // grid.geometry.block_frames if grid.clean_sink else 0
    blocks = sink + 2 * (count + 2) + 8 * lag
    one = replace(grid, steps=((count,) * blocks,), recaches=frozenset())
    ends: dict[int, Fraction] = defaultdict(Fraction)
    for node in nodes(row, one, machine, costs, ahead=True):
        launch = Launch(node.device, node.layers, node.cells)
        end = node.ready + costs.launch(one, launch, machine.speed(node.device))
        for cell in node.cells:
            ends[cell.block] = max(ends[cell.block], end)
        for then, late in node.then:
            then.ready = max(then.ready, end + late)
    last = blocks - 1 - (count if grid.visibility == "joint" else 0)
    return (ends[last] - ends[last - 4 * lag]) / (4 * lag)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a timeline does, away from both of its ends."""

    period: float
    """Time between finished blocks of a stream (mean over streams)."""
    fill: float
    """From the start to the first clean block of the first stream."""
    latency: float
    """From the first step of a block to its last, codec not included (the longest)."""
    utilisation: tuple[float, ...]
    """Of each device: the share of the time that it works."""
    in_flight: int
    """Blocks of a stream that have begun and are not clean, at most."""

    @property
    def control(self) -> tuple[float, float]:
        """From a prompt that came to the first clean block that shows it, when prompts are taken at the next block."""
        return self.latency, self.latency + self.period


def figures(timed: Sequence[Timed], grid: Grid, devices: int) -> Figures:
    """Read off a timeline: its middle third is taken as the steady state, so give it many blocks.

    ValueError for less than 6 blocks of a stream.
    """
    blocks = min(len(steps) for steps in grid.steps)
    if blocks < 6:
        raise ValueError(f"{blocks} blocks: at least 6, to tell the steady state from the ends")
    begins: dict[tuple[int, int], float] = {}
    ends: dict[tuple[int, int], float] = {}
    for launch, start, stop in timed:
        for cell in launch.cells:
            if cell.kind == "step":
                begins.setdefault((cell.stream, cell.block), start)
                ends[cell.stream, cell.block] = stop
    low, high = blocks // 3, 2 * blocks // 3
    spans = [(ends[stream, low], ends[stream, high]) for stream in range(grid.streams)]
    begin, end = min(a for a, _ in spans), max(b for _, b in spans)
    busy = [0.0] * devices
    for launch, start, stop in timed:
        busy[launch.device] += max(0.0, min(stop, end) - max(start, begin))
    waiting = [
        sum(begins[stream, other] < ends[stream, block] for other in range(block, blocks))
        for stream in range(grid.streams)
        for block in range(low, high)
    ]
    return Figures(
        period=sum(b - a for a, b in spans) / (high - low) / grid.streams,
        fill=ends[0, 0],
        latency=max(ends[s, b] - begins[s, b] for s in range(grid.streams) for b in range(low, high)),
        utilisation=tuple(time / (end - begin) for time in busy),
        in_flight=max(waiting),
    )
