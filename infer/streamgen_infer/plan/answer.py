"""`streamgen plan` without --show: how many viewers this machine holds, by which schedule, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from streamgen import __version__
from streamgen.errors import UserError
from streamgen.grid import Visibility
from streamgen.pipeline import StreamPipeline, probe_dtype
from streamgen.schedules import SCHEDULES, Machine
from streamgen_infer import machine
from streamgen_infer.admission import Limits
from streamgen_infer.cost_model import CostModel
from streamgen_infer.models.fit import Demand as Bytes
from streamgen_infer.models.fit import demand as bytes_of
from streamgen_infer.models.fit import places
from streamgen_infer.models.fit_sizes import ModelSizes, read_sizes
from streamgen_infer.plan.capacity import Demand, Offer, block_frames, check_held, grid_of, offers
from streamgen_infer.plan.card import choose_visibility
from streamgen_infer.plan.measure import in_ms, known_rows, load_costs, measure
from streamgen_infer.report import check_report, write_report
from streamgen_infer.schedule_choice import Choice, Pace, choose_schedule
from streamgen_infer.scheduler import Rules
from streamgen_infer.sinks import check_place
from streamgen_infer.stream_options import check_device

if TYPE_CHECKING:
    from rich.table import Table

TABLE_COLUMNS = 116


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The command's arguments; None: what the card or the machine says."""

    model: str
    fps: float | None
    steps: int | None
    devices: int
    streams: int | None
    visibility: str | None
    force: bool
    memory_gb: float | None
    send_ms: float
    control_s: float
    device: str
    dtype: str
    threads: int | None


def run(question: Question, *, costs: Path | None, save_costs: Path | None, json: Path | None, overwrite: bool) -> int:
    """The command; returns the exit code."""
    check_device(question.device)
    for option, path in (("--json", json), ("--save-costs", save_costs)):
        if path is not None:
            check_place(path, option)
    if json is not None:
        check_report(json, "--json", overwrite=overwrite)
    if save_costs is not None:
        if costs is not None:
            raise UserError("--save-costs keeps what is measured here, but with --costs nothing is; give one of them")
        if save_costs.exists() and not overwrite:
            raise UserError(f"--save-costs {save_costs} exists; choose another name or add --overwrite")
    sizes = read_sizes(question.model)
    visibilities = _visibilities(sizes, question)
    dtype = probe_dtype(torch.device(question.device).type) if question.dtype == "auto" else question.dtype
    known = load_costs(costs, sizes.geometry) if costs is not None else _measured(question, dtype)
    if save_costs is not None:
        known.save(save_costs)
    demand = Demand(
        fps=question.fps or sizes.geometry.fps,
        steps=question.steps or sizes.scheduler.trained_steps[0],
        devices=question.devices,
        memory_bytes=_memory_bytes(question),
        load=Limits().most_load,
        most_rows=Rules().max_rows,
        costs=in_ms(known, sizes.geometry, question.send_ms),
        block_frames=block_frames(sizes.geometry),
    )
    needs = bytes_of(sizes, dtype)
    found = offers(sizes, visibilities, demand, needs)
    check_held(found, demand, question.streams)
    source = f"costs of {costs}" if costs is not None else f"measured here, {question.device}, {dtype}"
    source = f"{source}, launches of up to {known_rows(known, sizes.geometry)}"
    choices = _choices(sizes, visibilities, demand, found[0], question)
    _print(question, demand, found, choices, source, sizes.scheduler.trained_steps)
    if json is not None:
        write_report(json, _values(question, dtype, demand, needs, found, choices, known))
    return 0


def _visibilities(sizes: ModelSizes, question: Question) -> dict[str, Visibility]:
    """Schedule -> its visibility, of all that the model may be streamed with. UserError if there is none."""
    found: dict[str, Visibility] = {}
    refusal: UserError | None = None
    steps = question.steps or sizes.scheduler.trained_steps[0]
    for name, row in SCHEDULES.items():
        if question.visibility is not None and question.visibility not in row.visibilities:
            continue
        try:
            visibility = choose_visibility(
                name,
                sizes.scheduler.visibility,
                model=sizes.name,
                wanted=question.visibility,
                force=question.force,
            )
        except UserError as error:
            refusal = refusal or error
            continue
        window, frames = sizes.scheduler.window_frames, steps * sizes.geometry.block_frames
        if visibility == "joint" and window < sizes.scheduler.sink_frames + frames:
            refusal = refusal or UserError(f"a joint window of {steps} blocks does not fit {window} latent frames")
            continue
        found[name] = visibility
    if not found:
        assert refusal is not None
        raise refusal
    return found


def _choices(
    sizes: ModelSizes, visibilities: dict[str, Visibility], demand: Demand, best: Offer, question: Question
) -> dict[int, Choice]:
    """Viewers in a pipeline of the best schedule's size -> what a new one of them would get: alone, and the last."""
    chosen = question.force or question.visibility is not None
    listed = sorted(set(visibilities.values())) if chosen else sizes.scheduler.visibility
    machine = Machine(devices=best.devices, most_rows=demand.most_rows)
    pace = Pace(block=demand.block_ms, most_load=demand.load, control=1000 * question.control_s)
    return {
        streams: choose_schedule(
            listed, grid_of(sizes, "clean", ((demand.steps,),) * streams), machine, demand.costs, pace
        )
        for streams in sorted({1, max(1, best.viewers // best.pipelines)})
    }


def _measured(question: Question, dtype: str) -> CostModel:
    pipe = StreamPipeline.from_pretrained(question.model, device=question.device, dtype=dtype, threads=question.threads)
    return measure(pipe)


def _memory_bytes(question: Question) -> float:
    if question.memory_gb is not None:
        return question.memory_gb * 1e9
    here = places(question.device)
    if not here:
        raise UserError(f"how much memory {question.device} has is not known here; give --memory GB")
    return float(here[0].usable)


def _print(
    question: Question,
    demand: Demand,
    found: list[Offer],
    choices: dict[int, Choice],
    source: str,
    trained_steps: Sequence[int],
) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, TABLE_COLUMNS)
    best = found[0]
    plural = "" if best.viewers == 1 else "s"
    where = f"{demand.devices} device{'' if demand.devices == 1 else 's'}"
    console.print(
        f"{question.model}: {best.viewers} viewer{plural} at {demand.fps:g} frames per second and {demand.steps} "
        f"steps, by {best.schedule} on {where}; limit: {best.limit}",
        soft_wrap=True,
    )
    console.print(_table(found, demand))
    of_many = "" if best.pipelines == 1 else f" of each of the {best.pipelines} pipelines"
    taken = [
        f"{streams} viewer{'' if streams == 1 else 's'} {choice.schedule} under {choice.visibility} (a prompt shows "
        f"after {choice.control / 1000:.3g} s)"
        for streams, choice in choices.items()
    ]
    console.print(f"by load a new viewer{of_many} would get: with {'; with '.join(taken)}", soft_wrap=True)
    curve = ", ".join(f"{count}: {demand.costs.rows(count):.4g}" for count in (1, 2, 4, 8))
    if demand.steps not in trained_steps:
        counts = ", ".join(str(count) for count in trained_steps)
        console.print(f"note: the model was trained for {counts} steps, not {demand.steps}")
    for line in (
        f"costs at P90, ms: a pass over so many streams {curve}; decoding {demand.costs.decode:.4g} ({source})",
        f"of the {demand.block_ms:.4g} ms that a block is on the screen {demand.load:.0%} may be planned",
        f"memory of each device {demand.memory_bytes / 1e9:.4g} GB: the model {best.fixed_bytes / 1e9:.4g} GB, a "
        f"viewer {best.viewer_bytes / 1e6:.4g} MB; its frames that wait to be seen come on top",
        "block ms: the least time between blocks of a viewer who is alone. control s: from a new prompt to the first "
        "block that shows it, at the pace of the screen",
    ):
        console.print(line, soft_wrap=True)


def _table(found: list[Offer], demand: Demand) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    columns = (
        "schedule",
        "visibility",
        "pipelines",
        "viewers",
        "by compute",
        "by memory",
        "block ms",
        "control s",
        "limit",
    )
    for column in columns:
        justify: Literal["left", "right"] = "left" if column in ("schedule", "visibility", "limit") else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for offer in found:
        low, high = _control_s(offer, demand)
        table.add_row(
            offer.schedule,
            offer.visibility,
            f"{offer.pipelines} x {offer.devices}",
            str(offer.viewers),
            str(offer.by_compute),
            str(offer.by_memory),
            f"{offer.alone.period:.4g}",
            f"{low:.3g} to {high:.3g}",
            offer.limit_kind,
        )
    return table


def _control_s(offer: Offer, demand: Demand) -> tuple[float, float]:
    """At the pace of the screen, blocks in progress delay a prompt by their time on it."""
    block_s = demand.block_ms / 1000
    return offer.depth * block_s, (offer.depth + 1) * block_s


def _values(
    question: Question,
    dtype: str,
    demand: Demand,
    needs: Bytes,
    found: list[Offer],
    choices: dict[int, Choice],
    known: CostModel,
) -> dict[str, Any]:
    return {
        "command": "plan",
        "version": __version__,
        "model": question.model,
        "device": question.device,
        "dtype": dtype,
        "cpu": machine.cpu_name(),
        "fps": demand.fps,
        "steps": demand.steps,
        "devices": demand.devices,
        "load": demand.load,
        "block_ms": demand.block_ms,
        "memory_gb": demand.memory_bytes / 1e9,
        "viewers": found[0].viewers,
        "limit": found[0].limit,
        "offers": [
            {
                "schedule": offer.schedule,
                "visibility": offer.visibility,
                "pipelines": offer.pipelines,
                "devices": offer.devices,
                "viewers": offer.viewers,
                "by_compute": offer.by_compute,
                "by_memory": offer.by_memory,
                "limit": offer.limit,
                "alone_ms": offer.alone.period,
                "resource_ms": list(offer.alone.resource),
                "recurrence_ms": offer.alone.recurrence,
                "control_s": list(_control_s(offer, demand)),
                "fixed_bytes": offer.fixed_bytes,
                "viewer_bytes": offer.viewer_bytes,
            }
            for offer in found
        ],
        "choices": [
            {
                "viewers": streams,
                "schedule": choice.schedule,
                "visibility": choice.visibility,
                "holds": choice.holds,
                "control_s": choice.control / 1000,
                "busy_ms": choice.busy,
            }
            for streams, choice in choices.items()
        ],
        "bytes": asdict(needs),
        "costs": known.values(),
    }
