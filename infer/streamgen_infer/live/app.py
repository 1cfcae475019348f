"""The command `live` and its options. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated

import typer

from streamgen_infer.arguments import Device, Model, Overwrite, Steps, Threads
from streamgen_infer.stream_options import CACHES, DTYPES, TRANSITIONS

app = typer.Typer(rich_markup_mode=None)


@app.command()
def live(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to show; or type it later.", show_default=False)] = None,
    seconds: Annotated[str, typer.Option(help="Length of the video; inf runs until /quit.", metavar="N|inf")] = "inf",
    seed: Annotated[int, typer.Option(help="Same seed and prompts, same video.", metavar="N")] = 0,
    out: Annotated[
        str | None,
        typer.Option(
            help="Write what is shown: .mp4, .webm, .gif, .y4m, no suffix: a folder of PNGs; - : Y4M on stdout.",
            metavar="FILE",
        ),
    ] = None,
    model: Model = "sprites",
    steps: Steps = None,
    cache: Annotated[
        str | None, typer.Option(help=" | ".join(CACHES) + "; as the model was trained by default")
    ] = None,
    transition: Annotated[str, typer.Option(help="To a new prompt: " + " | ".join(TRANSITIONS))] = "recache",
    fps: Annotated[float | None, typer.Option(help="Frames per second; the model's by default.", metavar="N")] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help=" | ".join(DTYPES) + "; auto takes the faster one here")] = "auto",
    threads: Threads = None,
    scale: Annotated[int, typer.Option(help="Enlarge the frames of --out so many times.", metavar="N")] = 1,
    preview: Annotated[bool, typer.Option(help="Show the pictures in the terminal.")] = True,
    overwrite: Overwrite = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
) -> int:
    """Watch a stream in the terminal and change it while it plays: type a prompt, or /help.

    Where stdin is no terminal its lines are the prompts: PROMPT, or SECONDS=PROMPT.
    """
    from streamgen_infer.live import command

    options = command.Options(
        prompt=prompt,
        seconds=seconds,
        seed=seed,
        out=out,
        model=model,
        steps=steps,
        cache=cache,
        transition=transition,
        fps=fps,
        device=device,
        dtype=dtype,
        threads=threads,
        scale=scale,
        preview=preview,
        overwrite=overwrite,
        quiet=quiet,
    )
    return command.run(options, context.obj.interrupts)
