"""`streamgen plan` and its options. Nothing heavy is imported here.

A subcommand registers itself on `app` from its own file, which the command line imports after this one:
`@app.command("simulate")`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamgen.errors import UserError
from streamgen.grid import VISIBILITIES
from streamgen.schedules import SCHEDULES
from streamgen_infer.arguments import Device, Json, Overwrite, Steps, Threads
from streamgen_infer.stream_options import DTYPES

app = typer.Typer(name="plan", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def plan(
    context: typer.Context,
    show: Annotated[
        str | None, typer.Option(help="Draw this schedule: " + " | ".join(SCHEDULES), metavar="SCHEDULE")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A model; with --costs, a published one's name, too. sprites by default.", metavar="DIR|NAME"
        ),
    ] = None,
    steps: Steps = None,
    devices: Annotated[int, typer.Option(help="How many, all alike.", metavar="P")] = 1,
    streams: Annotated[
        int | None, typer.Option(help="Viewers: that must be held; with --show, that are drawn.", metavar="S")
    ] = None,
    visibility: Annotated[str | None, typer.Option(help=" | ".join(VISIBILITIES))] = None,
    force: Annotated[bool, typer.Option("--force", help="Schedules that the model was not trained for, too.")] = False,
    costs: Annotated[
        Path | None, typer.Option(help="Measured costs; without it they are measured here.", metavar="FILE")
    ] = None,
    send_ms: Annotated[float, typer.Option(help="Time from one device to another.", metavar="N")] = 0,
    control: Annotated[
        float, typer.Option(help="Seconds that a viewer accepts from a prompt to its block; 0: few.", metavar="S")
    ] = 0,
    fps: Annotated[float | None, typer.Option(help="Frames per second; the model's by default.", metavar="N")] = None,
    memory: Annotated[
        float | None, typer.Option(help="GB (10^9 bytes) of each device; what is free here by default.", metavar="GB")
    ] = None,
    save_costs: Annotated[Path | None, typer.Option(help="Keep what was measured.", metavar="FILE")] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help=" | ".join(DTYPES))] = "auto",
    threads: Threads = None,
    blocks: Annotated[int, typer.Option(help="With --show: blocks of each stream.", metavar="B")] = 8,
    lag: Annotated[int | None, typer.Option(help="With --show: blocks behind, of lagged.", metavar="B")] = None,
    speeds: Annotated[
        str | None, typer.Option(help="With --show: of unequal devices, beside each other.", metavar="N,N,...")
    ] = None,
    pass_cost: Annotated[
        str, typer.Option(help="With --show, if no costs are given: of passes over 1, 2, ... cells.", metavar="N,N,...")
    ] = "1,1",
    decode_cost: Annotated[float, typer.Option(help="With --show: of decoding a block.", metavar="N")] = 0.5,
    png: Annotated[Path | None, typer.Option(help="With --show: draw it there.", metavar="FILE")] = None,
    json: Json = None,
    overwrite: Overwrite = False,
) -> int:
    """How many viewers a machine holds and what limits it; or what a schedule does (--show)."""
    if context.invoked_subcommand is not None:
        return 0
    limits: list[tuple[str, float | None, float, float]] = [
        ("--devices", devices, 1, 1024),
        ("--steps", steps, 1, 64),
        ("--streams", streams, 1, 1_000_000),
        ("--blocks", blocks, 1, 64),
        ("--lag", lag, 2, 64),
        ("--fps", fps, 1, 240),
        ("--memory", memory, 1e-6, 1e6),
        ("--send-ms", send_ms, 0, 1e6),
        ("--control", control, 0, 1e6),
        ("--decode-cost", decode_cost, 0, 1e6),
        ("--threads", threads, 1, 1024),
    ]
    for name, value, low, high in limits:
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value:g}; it must be {low:g} to {high:g}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} does not exist; there are: {', '.join(DTYPES)}")
    if visibility is not None and visibility not in VISIBILITIES:
        raise UserError(f"--visibility {visibility!r} does not exist; there are: {', '.join(VISIBILITIES)}")
    if show is not None:
        from streamgen_infer.plan import show as drawing

        return drawing.run(
            drawing.Wanted(
                schedule=show,
                model=model,
                steps=steps,
                devices=devices,
                streams=streams or 1,
                blocks=blocks,
                visibility=visibility,
                lag_blocks=lag,
                force=force,
                speeds=() if speeds is None else drawing.numbers("--speeds", speeds),
                costs=costs,
                pass_cost=drawing.numbers("--pass-cost", pass_cost),
                decode_cost=decode_cost,
                send=send_ms,
            ),
            png=png,
            json=json,
            overwrite=overwrite,
        )
    if png is not None:
        raise UserError("--png draws a schedule; name one with --show")
    from streamgen_infer.plan import answer

    return answer.run(
        answer.Question(
            model=model or "sprites",
            fps=fps,
            steps=steps,
            devices=devices,
            streams=streams,
            visibility=visibility,
            force=force,
            memory_gb=memory,
            send_ms=send_ms,
            control_s=control,
            device=device,
            dtype=dtype,
            threads=threads,
        ),
        costs=costs,
        save_costs=save_costs,
        json=json,
        overwrite=overwrite,
    )
