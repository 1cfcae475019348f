"""`streamgen plan check`: the bounds that the planner states beside what a virtual clock makes of the same costs.

Replicas are played by the simulator, with the real scheduler: on every device a viewer who takes frames as fast as they
are made. Chains, rings and interleaved streams are played by `streamgen.schedules.timeline`, which knows nothing of the
bounds: it launches what is ready, cell by cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from streamgen import __version__
from streamgen.grid import Visibility
from streamgen.initiation import figures, interval
from streamgen.schedules import SCHEDULES, Costs, Machine, timeline
from streamgen_infer.admission import Limits
from streamgen_infer.cost_model import CostModel
from streamgen_infer.models.fit_sizes import ModelSizes, read_sizes
from streamgen_infer.plan.capacity import block_frames, grid_of
from streamgen_infer.plan.measure import in_ms, load_costs, shape_name
from streamgen_infer.report import check_report, write_report
from streamgen_infer.simulate.scenario import Scenario, Viewers
from streamgen_infer.simulator import simulate
from streamgen_infer.sinks import check_place

TABLE_COLUMNS = 100
LEAST = 0.9
"""Of its bound a schedule must reach so much."""
PERIODS = 200
"""Blocks of each replica that are played."""
PIPELINES: tuple[tuple[str, Visibility], ...] = (
    ("step_chain", "same_level"),
    ("layer_ring", "same_level"),
    ("interleaved", "clean"),
)
ALONE_BLOCKS = 72
"""Of a stream that has a pipeline for itself: its buffers are full long before the middle third, which counts."""
STREAMS_PER_DEVICE = 2
"""Of interleaved streams, which fill a pipeline only together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One schedule on one number of devices; frames per second of all its streams."""

    schedule: str
    visibility: Visibility
    devices: int
    streams: int
    bound_fps: float
    played_fps: float
    limit: str
    """What makes the bound, in words."""

    @property
    def share(self) -> float:
        """Of the bound; a little above 1 where the steady state is not quite reached."""
        return self.played_fps / self.bound_fps


def run(model: str, costs: Path, *, devices: int, steps: int | None, send_ms: float, json: Path | None) -> int:
    """The command (`json` may be overwritten); the exit code: 1 if a schedule stays below `LEAST` of its bound."""
    sizes = read_sizes(model)
    known = load_costs(costs, sizes.geometry)
    found = list(checks(sizes, known, devices, steps or sizes.scheduler.trained_steps[0], send_ms))
    _print(found, sizes, costs)
    if json is not None:
        rows = [{**asdict(one), "share": one.share} for one in found]
        head: dict[str, Any] = {"command": "plan check", "version": __version__, "model": model, "least": LEAST}
        write_report(json, {**head, "costs": known.values(), "checks": rows})
    return int(any(one.share < LEAST for one in found))


def check_target(json: Path | None, *, overwrite: bool) -> None:
    """UserError unless the report can be written there."""
    if json is not None:
        check_place(json, "--json")
        check_report(json, "--json", overwrite=overwrite)


def checks(sizes: ModelSizes, known: CostModel, devices: int, steps: int, send_ms: float) -> Iterator[Check]:
    """Every way of using 1 to `devices` devices, at P50 costs, without sharing launches among streams."""
    costs = in_ms(known, sizes.geometry, send_ms, 0.5)
    for count in range(1, devices + 1):
        yield _replicas(sizes, known, costs, count, steps)
        for name, visibility in PIPELINES:
            streams = STREAMS_PER_DEVICE * count if SCHEDULES[name].mixes_streams else 1
            grid = grid_of(sizes, visibility, ((steps,),) * streams)
            if count <= SCHEDULES[name].devices(grid)[0]:
                yield _pipeline(name, visibility, sizes, costs, count, streams, steps)


def _replicas(sizes: ModelSizes, known: CostModel, costs: Costs, devices: int, steps: int) -> Check:
    """One viewer on each device, under the real scheduler."""
    lasting = sizes.scheduler.sink_frames + 1
    bounds = interval(
        "serial", grid_of(sizes, "clean", ((steps,) * lasting,) * devices), Machine(devices=devices), costs
    )
    seconds = PERIODS * bounds.period / 1000
    frames = block_frames(sizes.geometry)
    viewers = Viewers(
        per_minute=60 * 100 * devices / seconds,  # all are there after a hundredth of the time
        mean_s=1e6,
        shape=shape_name(sizes.geometry),
        block_s=frames / sizes.geometry.fps,
        trained_steps=(steps,),
        lead_s=1e6,
        start_s=1e6,
    )
    limits = Limits(most_load=1e2, most_streams=1)
    tally = simulate(Scenario(viewers=(viewers,), seconds=seconds, devices=devices, noise=0.0, limits=limits), known)
    return Check(
        schedule="replicas",
        visibility="clean",
        devices=devices,
        streams=devices,
        bound_fps=1000 * frames * devices / bounds.period,
        played_fps=frames * tally.blocks / seconds,
        limit=bounds.limit,
    )


def _pipeline(
    name: str, visibility: Visibility, sizes: ModelSizes, costs: Costs, devices: int, streams: int, steps: int
) -> Check:
    """One pipeline over all devices, played until it is steady."""
    machine = Machine(devices=devices, most_rows=1)
    depth = SCHEDULES[name].depth(grid_of(sizes, visibility, ((steps,),) * streams), machine)
    blocks = 3 * max(depth, 3 if streams > 1 else ALONE_BLOCKS // 3)
    grid = grid_of(sizes, visibility, ((steps,) * blocks,) * streams)
    bounds = interval(name, grid, machine, costs)
    period = figures(timeline(name, grid, machine, costs), grid, devices).period
    frames_ms = 1000 * block_frames(sizes.geometry) * streams
    return Check(
        schedule=name,
        visibility=visibility,
        devices=devices,
        streams=streams,
        bound_fps=frames_ms / bounds.period,
        played_fps=frames_ms / period,
        limit=bounds.limit,
    )


def _print(found: list[Check], sizes: ModelSizes, costs: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.width = max(console.width, TABLE_COLUMNS)
    table = Table(title=f"{sizes.name}, frames per second at the costs of {costs.name} (P50)", box=box.SIMPLE)
    for column in ("devices", "schedule", "visibility", "streams", "bound", "played", "share", "limit"):
        justify: Literal["left", "right"] = "left" if column in ("schedule", "visibility", "limit") else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for one in found:
        table.add_row(
            str(one.devices),
            one.schedule,
            one.visibility,
            str(one.streams),
            f"{one.bound_fps:.2f}",
            f"{one.played_fps:.2f}",
            f"{one.share:.3f}",
            one.limit.partition(":")[0],
        )
    console.print(table)
    untrained = {one.visibility for one in found} - set(sizes.scheduler.visibility)
    if untrained:
        console.print(f"note: {sizes.name} was not trained for {', '.join(sorted(untrained))}: speed only, not quality")
    worst = min(found, key=lambda one: one.share)
    console.print(
        f"worst: {worst.schedule} on {worst.devices}, {worst.share:.3f} of its bound; {LEAST:g} is wanted",
        soft_wrap=True,
    )
