"""`streamgen plan simulate` and its options. Nothing heavy is imported here."""

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
