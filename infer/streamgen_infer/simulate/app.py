"""`streamgen plan simulate` and `streamgen plan check`, and their options. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamgen_infer.arguments import Json, Overwrite
from streamgen_infer.plan.app import app


@app.command("simulate")
def simulate(
    scenario: Annotated[
        Path | None,
        typer.Option(help="JSON with the fields of Scenario, several kinds of viewers too.", metavar="FILE"),
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(help="Measured costs, as the server saves them.", metavar="FILE")
    ] = None,
    forward: Annotated[
        str | None, typer.Option(help="Instead: ms of a pass, fixed and per row, as 20+4.", metavar="MS+MS")
    ] = None,
    decode: Annotated[str | None, typer.Option(help="The same of the codec.", metavar="MS+MS")] = None,
    devices: Annotated[int | None, typer.Option(help="Replicas; 1 by default.", metavar="N")] = None,
    viewers: Annotated[float | None, typer.Option(help="Arrivals per minute.", metavar="N")] = None,
    stay: Annotated[float | None, typer.Option(help="Seconds that they stay, in the mean; 300.", metavar="N")] = None,
    steps: Annotated[
        str | None, typer.Option(help="Step counts, the usual one first; 4 by default.", metavar="N,N,...")
    ] = None,
    block: Annotated[float | None, typer.Option(help="Seconds of video in a block; 0.75.", metavar="N")] = None,
    seconds: Annotated[float | None, typer.Option(help="Simulated time; 3600 by default.", metavar="N")] = None,
    noise: Annotated[
        float | None, typer.Option(help="Standard deviation of the log of launch times; 0.05.", metavar="N")
    ] = None,
    slow_viewers: Annotated[float | None, typer.Option(help="Share of viewers at 0.7x speed.", metavar="N")] = None,
    failures: Annotated[float | None, typer.Option(help="Share of launches that fail.", metavar="N")] = None,
    slowdowns: Annotated[
        float | None, typer.Option(help="Slow-downs (2x for 10 s) per device and hour.", metavar="N")
    ] = None,
    deaths: Annotated[float | None, typer.Option(help="Deaths (10 s) per device and hour.", metavar="N")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same run; 0 by default.", metavar="N")] = None,
    processes: Annotated[
        int, typer.Option(help="Runs side by side, each with its own seed, counted together.", metavar="N")
    ] = 1,
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures to this PNG.", metavar="FILE")] = None,
    overwrite: Overwrite = False,
) -> int:
    """Play many viewers on devices of given costs, with the server's own scheduler and admission, faster than time."""
    from streamgen_infer.simulate import command as simulate_command

    given = simulate_command.Given(
        scenario=scenario,
        costs=costs,
        forward=forward,
        decode=decode,
        devices=devices,
        viewers=viewers,
        stay=stay,
        steps=steps,
        block=block,
        seconds=seconds,
        noise=noise,
        slow_viewers=slow_viewers,
        failures=failures,
        slowdowns=slowdowns,
        deaths=deaths,
        seed=seed,
        processes=processes,
    )
    return simulate_command.run(given, json=json, plot=plot, overwrite=overwrite)


@app.command("check")
def check(
    costs: Annotated[Path, typer.Option(help="Measured or assumed costs.", metavar="FILE")],
    model: Annotated[str, typer.Option(help="A model, or a published one's name.", metavar="DIR|NAME")] = "longlive",
    devices: Annotated[int, typer.Option(help="1 to so many, all alike.", min=1, max=64, metavar="P")] = 8,
    steps: Annotated[int | None, typer.Option(help="Steps; the model's by default.", min=1, max=64)] = None,
    send_ms: Annotated[float, typer.Option(help="From one device to another.", min=0, max=1e6, metavar="N")] = 0.1,
    json: Json = None,
    overwrite: Overwrite = False,
) -> int:
    """Play every schedule on 1 to P devices beside the planner's bound; exit code 1 below nine tenths of it."""
    from streamgen_infer.plan import check as command

    command.check_target(json, overwrite=overwrite)
    return command.run(model, costs, devices=devices, steps=steps, send_ms=send_ms, json=json)
