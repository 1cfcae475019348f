"""The commands and their options. Nothing heavy is imported here: `streamgen --help` waits for none of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import streamgen_infer.simulate.app  # noqa: F401 (`plan simulate` registers itself)
from streamgen import __version__
from streamgen.errors import UserError
from streamgen_infer.arguments import Device, Model, Overwrite, Steps, Threads
from streamgen_infer.bench.app import app as benching
from streamgen_infer.evaluation.app import app as evaluation
from streamgen_infer.interrupts import Interrupts
from streamgen_infer.live.app import app as live
from streamgen_infer.models.app import app as models
from streamgen_infer.models.recording_app import app as recording
from streamgen_infer.plan.app import app as plan
from streamgen_infer.serve.app import app as serving
from streamgen_infer.stream_options import (
    ATTENTIONS,
    CACHE_DTYPES,
    CACHES,
    DTYPES,
    OPS,
    SCHEDULES,
    TRANSITIONS,
    WEIGHTS_DTYPES,
    Options,
)

HandOver = Callable[[list[str]], int]
UsageError: Any = typer.BadParameter.__mro__[2]
"""ClickException, under whichever name this typer has it."""


@dataclass(frozen=True, slots=True)
class Session:
    """What the commands need of the process."""

    interrupts: Interrupts
    hand_over: Mapping[str, HandOver]


app = typer.Typer(
    name="streamgen",
    help="Text to video that starts at once, never ends and never stalls.",
    epilog="Exit codes: 0 done, 1 failed, 2 a mistake in what was asked, 130 interrupted (what was made is kept).",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": list[str]()}


def run(arguments: Sequence[str], interrupts: Interrupts, hand_over: Mapping[str, HandOver]) -> int:
    """Run one command; usage errors become UserErrors."""
    command = typer.main.get_command(app)
    session = Session(interrupts, hand_over)
    try:
        code = command.main(args=list(arguments), prog_name="streamgen", standalone_mode=False, obj=session)
    except UsageError as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "streamgen"
        raise UserError(f"{error.format_message().rstrip('.')} (see {where} --help)") from error
    except typer.Abort:
        raise KeyboardInterrupt from None
    return int(code or 0)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"streamgen {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise UserError(f"name a command: {', '.join(sorted(context.command.commands))}")  # type: ignore[attr-defined]


app.add_typer(benching)
app.add_typer(evaluation)
app.add_typer(live)
app.add_typer(models)
app.add_typer(plan)
app.add_typer(recording)
app.add_typer(serving)


@app.command()
def stream(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to show.", show_default=False)] = None,
    switch: Annotated[
        list[str] | None,
        typer.Option(help="A new prompt from this time of the video on; repeatable.", metavar="SECONDS=PROMPT"),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="An image that the video begins with.", metavar="FILE")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="A LoRA merged into the model; repeatable.", metavar="FILE[=STRENGTH]")
    ] = None,
    lora_at: Annotated[
        list[str] | None,
        typer.Option(
            help="Another LoRA, or none, from this time of the video on; repeatable.",
            metavar="SECONDS=FILE[=STRENGTH]|none",
        ),
    ] = None,
    seconds: Annotated[str, typer.Option(help="Length of the video; inf runs until Ctrl-C.", metavar="N|inf")] = "8",
    seed: Annotated[int | None, typer.Option(help="Same seed, same video; 0 by default.", metavar="N")] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help=".mp4, .webm, .gif or .y4m; no suffix: a folder of PNGs; - : Y4M on stdout. "
            "By default stream.mp4, or stream-2.mp4 ... if that exists.",
            metavar="FILE",
        ),
    ] = None,
    model: Model = "sprites",
    steps: Steps = None,
    schedule: Annotated[str | None, typer.Option(help=" | ".join(SCHEDULES) + "; the first by default")] = None,
    force: Annotated[bool, typer.Option("--force", help="A schedule that the model was not trained for.")] = False,
    ranks: Annotated[int, typer.Option(help="Processes, with step_chain or layer_ring.", metavar="N")] = 1,
    cache: Annotated[
        str | None, typer.Option(help=" | ".join(CACHES) + "; as the model was trained by default")
    ] = None,
    cache_dtype: Annotated[
        str | None, typer.Option(help=" | ".join(CACHE_DTYPES) + ": half the cache's memory, slower")
    ] = None,
    weights_dtype: Annotated[
        str | None, typer.Option(help=" | ".join(WEIGHTS_DTYPES) + ": half the weights' memory")
    ] = None,
    transition: Annotated[str, typer.Option(help="To a new prompt: " + " | ".join(TRANSITIONS))] = "recache",
    fps: Annotated[float | None, typer.Option(help="Frames per second; the model's by default.", metavar="N")] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help=" | ".join(DTYPES) + "; auto takes the faster one here")] = "auto",
    ops: Annotated[str, typer.Option(help=" | ".join(OPS) + "; auto: kernels on a GPU, if right there")] = "auto",
    attention: Annotated[
        str, typer.Option(help=" | ".join(ATTENTIONS) + "; auto: on a GPU the fastest that is right there")
    ] = "auto",
    threads: Threads = None,
    scale: Annotated[int, typer.Option(help="Enlarge the frames so many times.", metavar="N")] = 1,
    realtime: Annotated[bool, typer.Option("--realtime", help="No faster than the video plays.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.", metavar="FILE")] = None,
    save_state: Annotated[
        Path | None, typer.Option(help="Save the stream at its end, to be resumed.", metavar="FILE")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on exactly where a saved stream ended; PROMPT, if given, takes over.", metavar="FILE"),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.")] = False,
) -> int:
    """Stream video from a prompt to a file, a folder or a pipe."""
    from streamgen_infer import stream_command

    options = Options(
        prompt=prompt,
        switch=tuple(switch or ()),
        image=image,
        lora=tuple(lora or ()),
        lora_at=tuple(lora_at or ()),
        seconds=seconds,
        seed=seed,
        out=out,
        model=model,
        steps=steps,
        schedule=schedule,
        force=force,
        ranks=ranks,
        cache=cache,
        cache_dtype=cache_dtype,
        weights_dtype=weights_dtype,
        transition=transition,
        fps=fps,
        device=device,
        dtype=dtype,
        ops=ops,
        attention=attention,
        threads=threads,
        scale=scale,
        realtime=realtime,
        report=report,
        save_state=save_state,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
    )
    return stream_command.run(options, context.obj.interrupts)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Only: what this model needs and whether it fits; nothing is loaded.", metavar="DIR|NAME"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Of --model (all by default) or --kernels (a GPU by default): cpu, cuda:N.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of --model: " + " | ".join(DTYPES))] = "auto",
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Only: check every Triton kernel against its reference on this device.")
    ] = False,
) -> int:
    """Say what this machine has, what works, and what to do about what does not; or what a model needs."""
    from streamgen_infer import doctor as command

    return command.run(as_json, model, device, dtype, kernels=kernels)


@app.command(context_settings=PASSED_ON)
def train(context: typer.Context) -> int:
    """Train a model: streamgen train experiment=NAME key=value ..."""
    return context.obj.hand_over["train"](context.args)


@app.command(context_settings=PASSED_ON)
def distill(context: typer.Context) -> int:
    """Distil a model to few steps: streamgen distill experiment=NAME key=value ..."""
    return context.obj.hand_over["distill"](context.args)


@app.command()
def latents(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A folder of videos, or a .tar.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder of latents.", show_default=False)],
    codec: Annotated[str, typer.Option(help="A codec folder, or a model folder.", metavar="DIR", show_default=False)],
    height: Annotated[int, typer.Option(help="Rows of the videos.", metavar="N")] = 480,
    width: Annotated[int, typer.Option(help="Columns of the videos.", metavar="N")] = 832,
    frames: Annotated[int, typer.Option(help="Frames of a window.", metavar="N")] = 81,
    bucket: Annotated[
        list[str] | None, typer.Option(help="Several sizes, instead of these three; repeatable.", metavar="HxWxFRAMES")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames per second to bring the videos to.", metavar="N")] = 16,
    windows: Annotated[int, typer.Option(help="Windows per video at most; 0: as many as it has.", metavar="N")] = 1,
    dtype: Annotated[str, typer.Option(help="fp16 | bf16")] = "fp16",
    shard_clips: Annotated[int, typer.Option(help="Windows per file.", metavar="N")] = 128,
    max_broken_share: Annotated[float, typer.Option(help="Fail when more videos are broken.", metavar="N")] = 0.05,
    workers: Annotated[int, typer.Option(help="Videos opened at once while looking for them.", metavar="N")] = 1,
    device: Device = "cpu",
) -> int:
    """Encode videos with captions once, for training; run it again to go on where it ended."""
    options = {
        "codec": codec,
        "buckets": bucket or [f"{height}x{width}x{frames}"],
        "fps": fps,
        "windows": windows,
        "dtype": dtype,
        "shard_clips": shard_clips,
        "max_broken_share": max_broken_share,
        "workers": workers,
        "device": device,
    }
    return context.obj.hand_over["latents"]([str(source), str(target), json.dumps(options)])


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="A file of configs/study, without .yaml.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder; runs/study/NAME by default.", metavar="DIR")] = None,
    seeds: Annotated[str | None, typer.Option(help="The study's own by default.", metavar="K,K,...")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this row; repeatable.", metavar="ROW")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands, run nothing.")] = False,
) -> int:
    """Compare ways of training over seeds: run what a study lists, judge it, write one table."""
    from streamgen_infer import study as command

    try:
        numbers = [int(word) for word in seeds.split(",")] if seeds else []
    except ValueError:
        raise UserError(f"--seeds {seeds!r}: must be whole numbers with commas between, as 0,1,2") from None
    return command.run(name, root=out, seeds=numbers, only=only or [], dry=dry_run)
