"""`streamgen plan --show`: the timeline of a schedule, its figures and its bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from streamgen import __version__
from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.grid import Grid, Visibility
from streamgen.initiation import Figures, Interval, figures, interval
from streamgen.launches import peak_frames
from streamgen.schedules import Costs, Machine, Timed, check_fit, schedule, timeline
from streamgen_infer.plan import chart
from streamgen_infer.report import check_report, write_report
from streamgen_infer.sinks import check_place

LAYERS = 30
"""Of a model that is not named: Wan 1.3B's, and its steps, blocks and window as LongLive has them."""
STEPS, BLOCK_FRAMES, WINDOW_FRAMES, SINK_FRAMES, LAG_BLOCKS = 4, 3, 12, 3, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The command's arguments."""

    schedule: str
    model: str | None
    steps: int | None
    devices: int
    streams: int
    blocks: int
    visibility: str | None
    lag_blocks: int | None
    force: bool
    speeds: tuple[float, ...]
    costs: Path | None
    pass_cost: tuple[float, ...]
    decode_cost: float
    send: float


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Numbers above 0 with commas between. UserError for anything else."""
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < number < 1e9 for number in found):
        raise UserError(f"{option} {text!r}: must be numbers above 0 with commas between, as 1,1.2,1.5")
    return found


def run(wanted: Wanted, *, png: Path | None, json: Path | None, overwrite: bool) -> int:
    """The command; returns the exit code."""
    for option, path in (("--png", png), ("--json", json)):
        if path is not None:
            check_place(path, option)
    if png is not None:
        if png.is_dir() or (png.exists() and not overwrite):
            raise UserError(f"--png {png} exists; choose another name or add --overwrite")
        chart.check_matplotlib()
    if json is not None:
        check_report(json, "--json", overwrite=overwrite)
    grid, machine, costs = _setting(wanted)
    row = check_fit(wanted.schedule, grid, machine)
    timed = timeline(wanted.schedule, grid, machine, costs)
    bounds = interval(wanted.schedule, grid, machine, costs)
    long = _longer(grid, row.depth(grid, machine) + 2 * grid.lag_blocks + grid.sink_frames + 8)
    steady = timeline(wanted.schedule, long, machine, costs)
    found = figures(steady, long, machine.devices)
    peaks = peak_frames(long, [one.launch for one in steady])
    unit = "ms" if wanted.costs else "passes"
    title = f"{wanted.schedule}, {grid.visibility} visibility ({row.systems})"
    chart.show(title, timed, grid, machine.devices)
    chart.show_figures(found, bounds, peaks, unit)
    if png is not None:
        chart.draw(png, title, timed, grid, machine.devices, f"time in {unit}; {_line(found, bounds, unit)}")
    if json is not None:
        write_report(json, _values(wanted, grid, timed, found, bounds, peaks, unit))
    return 0


def _setting(wanted: Wanted) -> tuple[Grid, Machine, Costs]:
    """What is drawn. UserError for what cannot be."""
    made = _usual(wanted) if wanted.model is None and wanted.costs is None else _of_model(wanted)
    try:
        grid = replace(made, steps=((made.most_steps,) * wanted.blocks,) * wanted.streams)
    except ValueError as error:
        raise UserError(f"{wanted.schedule} with {made.most_steps} steps: {error}") from error
    if wanted.speeds and len(wanted.speeds) != wanted.devices:
        raise UserError(f"--speeds has {len(wanted.speeds)} numbers for {wanted.devices} devices: give one for each")
    return grid, Machine(devices=wanted.devices, speeds=wanted.speeds), _costs(wanted, grid)


def _usual(wanted: Wanted) -> Grid:
    """One block of a model that is not named."""
    row = schedule(wanted.schedule)
    visibility = cast(Visibility, wanted.visibility or row.visibilities[0])
    steps = wanted.steps or STEPS
    needed = SINK_FRAMES + (steps + 2) * BLOCK_FRAMES if visibility == "joint" else 0
    return Grid(
        geometry=VideoGeometry(height=480, width=832, latent_channels=16, first_latent_frames=1),
        steps=((steps,),),
        visibility=visibility,
        window_frames=max(WINDOW_FRAMES, needed),
        sink_frames=SINK_FRAMES,
        lag_blocks=wanted.lag_blocks or LAG_BLOCKS,
        layers=LAYERS,
    )


def _of_model(wanted: Wanted) -> Grid:
    """One block of a model, as its card says."""
    from streamgen_infer.models.fit_sizes import read_sizes
    from streamgen_infer.plan.capacity import grid_of
    from streamgen_infer.plan.card import choose_visibility

    sizes = read_sizes(wanted.model or "sprites")
    visibility = choose_visibility(
        wanted.schedule, sizes.scheduler.visibility, model=sizes.name, wanted=wanted.visibility, force=wanted.force
    )
    steps = wanted.steps or sizes.scheduler.trained_steps[0]
    try:
        grid = grid_of(sizes, visibility, ((steps,),))
    except ValueError as error:
        raise UserError(f"{wanted.schedule} with {steps} steps of {sizes.name}: {error}") from error
    return replace(grid, lag_blocks=wanted.lag_blocks or sizes.scheduler.lag_blocks or LAG_BLOCKS)


def _costs(wanted: Wanted, grid: Grid) -> Costs:
    if wanted.costs is not None:
        from streamgen_infer.plan.measure import in_ms, load_costs

        return in_ms(load_costs(wanted.costs, grid.geometry), grid.geometry, wanted.send)
    try:
        return Costs(passes=wanted.pass_cost, decode=wanted.decode_cost, send=wanted.send)
    except ValueError as error:
        raise UserError(f"--pass-cost, --decode-cost, --send-ms: {error}") from error


def _longer(grid: Grid, blocks: int) -> Grid:
    """The same with so many blocks, for figures away from both ends."""
    return replace(grid, steps=((grid.most_steps,) * 3 * blocks,) * grid.streams)


def _line(found: Figures, bounds: Interval, unit: str) -> str:
    low, high = found.control
    return (
        f"period {found.period:.4g} {unit} (bound {bounds.period:.4g}), first block after {found.fill:.4g}, "
        f"control {low:.4g} to {high:.4g}"
    )


def _values(
    wanted: Wanted,
    grid: Grid,
    timed: list[Timed],
    found: Figures,
    bounds: Interval,
    peaks: dict[int, int],
    unit: str,
) -> dict[str, Any]:
    return {
        "command": "plan",
        "version": __version__,
        "schedule": wanted.schedule,
        "visibility": grid.visibility,
        "model": wanted.model,
        "steps": grid.most_steps,
        "devices": wanted.devices,
        "streams": grid.streams,
        "blocks": wanted.blocks,
        "unit": unit,
        "period": found.period,
        "fill": found.fill,
        "control": list(found.control),
        "in_flight": found.in_flight,
        "utilisation": list(found.utilisation),
        "resource": list(bounds.resource),
        "recurrence": bounds.recurrence,
        "limit": bounds.limit,
        "peak_frame_layers": {str(device): peak for device, peak in sorted(peaks.items())},
        "launches": [
            {
                "device": launch.device,
                "layers": list(launch.layers),
                "cells": [list(cell) for cell in launch.cells],
                "start": start,
                "stop": stop,
            }
            for launch, start, stop in timed
        ],
    }
