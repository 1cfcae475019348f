"""`streamgen convert` and `streamgen pull`: models that others published. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamgen.errors import UserError

app = typer.Typer(rich_markup_mode=None)


@app.command()
def convert(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A run of train or distill, or a Wan checkpoint: a file, or a folder as Wan or diffusers lay it out.",
            show_default=False,
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new folder for the model.", show_default=False)],
    to: Annotated[str, typer.Option(help="model | original | diffusers; these two write the transformer.")] = "model",
    preset: Annotated[
        str | None, typer.Option(help="Which published model it is (configs/preset).", metavar="NAME")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="A Wan folder to take the VAE and the text encoder from.", metavar="DIR")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="A LoRA to merge, with its strength; repeatable.", metavar="FILE[=1.0]")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of a training checkpoint: generator | generator_ema | critic.", metavar="SET")
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Prompts encoded beforehand, in place of the text encoder.", metavar="FILE")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the transformer: keep | bf16 | fp16 | fp32")] = "keep",
    height: Annotated[int | None, typer.Option(help="Rows of the frames; the preset's.", metavar="N")] = None,
    width: Annotated[int | None, typer.Option(help="Columns of the frames; the preset's.", metavar="N")] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Run the code that a .pt file holds, if you know where it is from.")
    ] = False,
) -> int:
    """Write a model folder from a run's averaged weights (of a codec run: a codec folder) or from a checkpoint."""
    if (source / "config.yaml").is_file():
        return int(context.obj.hand_over["convert"]([str(source), str(target)]))
    from streamgen.checkpoints.convert import Plan
    from streamgen.checkpoints.convert import convert as run

    plan = Plan(
        source=source,
        target=target,
        to=to,
        preset=preset,
        base=base,
        loras=tuple(map(_lora, lora or [])),
        network=weights,
        dtype=dtype,
        embeddings=embeddings,
        height=height,
        width=width,
        trust_pickle=trust_pickle,
    )
    for line in run(plan):
        print(line)
    return 0


def _lora(text: str) -> tuple[Path, float]:
    """FILE or FILE=STRENGTH."""
    name, _, strength = text.rpartition("=")
    if not name:
        return Path(text), 1.0
    try:
        return Path(name), float(strength)
    except ValueError:
        raise UserError(f"--lora {text!r}: write FILE or FILE=STRENGTH, as style.safetensors=0.8") from None


@app.command()
def pull(
    name: Annotated[
        str | None, typer.Argument(help="What to fetch; without it, the names there are.", show_default=False)
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="Folder; the cache of this program by default.", metavar="DIR")
    ] = None,
    only: Annotated[
        bool, typer.Option("--only", help="Its own files alone, without the VAE and the text encoder of its base.")
    ] = False,
) -> int:
    """Fetch a published model from huggingface.co; run it again to go on where it ended."""
    from streamgen_infer.models import pull as command

    return command.run(name, to, only=only)
