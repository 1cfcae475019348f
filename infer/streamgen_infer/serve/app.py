"""The options of `streamgen serve` and `streamgen load`. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamgen_infer.arguments import Device, Json, Model, Overwrite, Threads
from streamgen_infer.stream_options import DTYPES, WEIGHTS_DTYPES

app = typer.Typer(rich_markup_mode=None)


@app.command()
def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on; others than localhost need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one, printed.", metavar="N")] = 8765,
    token: Annotated[
        str | None,
        typer.Option(help="Who does not send it is refused.", envvar="STREAMGEN_TOKEN", metavar="TOKEN"),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Several: lines of NAME TOKEN [SESSIONS].", metavar="FILE")
    ] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="A site whose pages may connect; repeatable.", metavar="URL")
    ] = None,
    max_streams: Annotated[int, typer.Option(help="Streams at once, over all viewers.", metavar="N")] = 8,
    admission: Annotated[bool, typer.Option(help="Refuse streams that this machine is too slow for.")] = True,
    engine: Annotated[str, typer.Option(help="local: this process; ray: several replicas, see --replicas.")] = "local",
    replicas: Annotated[
        int | None, typer.Option(help="With --engine ray: so many, each with --max-streams; 2 by default.", metavar="N")
    ] = None,
    max_sessions: Annotated[int, typer.Option(help="Sessions at once of one token.", metavar="N")] = 10,
    max_waiting: Annotated[
        int, typer.Option(help="Clients that may wait for a place when the machine is full.", metavar="N")
    ] = 32,
    model: Model = "sprites",
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help=" | ".join(DTYPES) + "; auto takes the faster one here")] = "auto",
    weights_dtype: Annotated[
        str | None, typer.Option(help=" | ".join(WEIGHTS_DTYPES) + ": half the weights' memory")
    ] = None,
    threads: Threads = None,
    save_dir: Annotated[
        Path | None, typer.Option(help="Keep sessions there, over restarts and kills.", metavar="DIR")
    ] = None,
    save_every: Annotated[float, typer.Option(help="Seconds between two saves of a session.", metavar="N")] = 5,
    idle: Annotated[float, typer.Option(help="Seconds without a word before a viewer is let go.", metavar="N")] = 60,
    max_session: Annotated[float, typer.Option(help="Seconds that a session may last.", metavar="N")] = 21600,
    resume_within: Annotated[float, typer.Option(help="Seconds that a lost viewer is awaited.", metavar="N")] = 30,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log lines as JSON.")] = False,
) -> int:
    """Serve frames over a websocket, and the page, on localhost."""
    from streamgen_infer.serve.options import Options

    options = Options(
        host=host,
        port=port,
        token=token,
        token_file=token_file,
        origins=tuple(origin or ()),
        max_streams=max_streams,
        admission=admission,
        engine=engine,
        replicas=replicas,
        max_sessions=max_sessions,
        max_waiting=max_waiting,
        model=model,
        device=device,
        dtype=dtype,
        weights_dtype=weights_dtype,
        threads=threads,
        save_dir=save_dir,
        save_every_s=save_every,
        idle_s=idle,
        session_s=max_session,
        resume_s=resume_within,
        log_json=log_json,
    )
    from streamgen_infer.serve import command as serve_command

    return serve_command.run(options)


@app.command()
def load(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="ws://HOST:PORT", show_default=False)],
    timeline: Annotated[
        Path | None,
        typer.Option(help="Prompts: lines of SECONDS=PROMPT, the first at 0; '#' comments.", metavar="FILE"),
    ] = None,
    sessions: Annotated[int, typer.Option(help="Viewers in all; with --churn, at once at most.", metavar="N")] = 8,
    per_second: Annotated[float, typer.Option(help="They arrive at random, so many a second.", metavar="N")] = 0.5,
    seconds: Annotated[
        float, typer.Option(help="Each watches so much video; with --churn, at most.", metavar="N")
    ] = 10,
    churn: Annotated[
        float | None,
        typer.Option(
            help="So long viewers come, leave, break off and come back; memory is watched.", metavar="SECONDS"
        ),
    ] = None,
    apply_at: Annotated[
        str, typer.Option(help="Prompts hold from: next_block | playhead", metavar="WHEN")
    ] = "next_block",
    wait: Annotated[float, typer.Option(help="Seconds to wait for a place when the server is full.", metavar="N")] = 0,
    timeout: Annotated[
        float, typer.Option(help="Seconds for the whole run; with --churn, for the last ones.", metavar="N")
    ] = 300,
    seed: Annotated[int, typer.Option(help="Of the arrivals and the videos.", metavar="N")] = 0,
    format: Annotated[str, typer.Option(help="jpeg | webp | m4s | rgb")] = "jpeg",
    token: Annotated[str | None, typer.Option(envvar="STREAMGEN_TOKEN", metavar="TOKEN")] = None,
    json: Json = None,
    overwrite: Overwrite = False,
) -> int:
    """Watch a server with many viewers at once and report latency, jitter and misses as JSON."""
    from streamgen_infer.serve import load as command

    options = command.Options(
        url=url,
        timeline=timeline,
        sessions=sessions,
        per_second=per_second,
        seconds=seconds,
        churn_s=churn,
        apply_at=apply_at,
        wait_s=wait,
        timeout_s=timeout,
        seed=seed,
        format=format,
        token=token,
        json=json,
        overwrite=overwrite,
    )
    return command.run(options)
