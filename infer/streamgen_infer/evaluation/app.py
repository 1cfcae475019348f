"""The commands of `streamgen eval` and their options. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from streamgen.errors import UserError
from streamgen_infer.arguments import Device, Json, Model, Overwrite, Threads
from streamgen_infer.stream_options import CACHE_DTYPES, CACHES, DTYPES, WEIGHTS_DTYPES


class Suites(TyperGroup):
    """`streamgen eval NAME`: says which suites there are."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """UserError for a name that is neither a suite nor `compare`."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise UserError(f"no suite {args[0]!r}; there are: sprites; and compare, for JSON files of earlier ones")
        return super().resolve_command(ctx, args)


app = typer.Typer(name="eval", cls=Suites, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def top(context: typer.Context) -> None:
    """Judge from the pixels whether video shows what its prompt says, and compare models."""
    if context.invoked_subcommand is None:
        raise UserError("Missing argument 'suite': sprites, or compare A.json B.json ... (see streamgen eval --help)")


@app.command("sprites")
def evaluate(
    context: typer.Context,
    model: Model = "sprites",
    n: Annotated[int, typer.Option(help="Held-out captions, each a clip of 5 s.", metavar="N")] = 128,
    seed: Annotated[int, typer.Option(help="Chooses the captions and the noise.", metavar="N")] = 0,
    seeds: Annotated[str | None, typer.Option(help="Several of them; all n for each.", metavar="N,N,...")] = None,
    seconds: Annotated[float, typer.Option(help="Length of the long streams; 5: none.", metavar="N")] = 5,
    long_n: Annotated[int, typer.Option(help="How many long streams.", metavar="N")] = 8,
    switches: Annotated[int, typer.Option(help="Streams with a change of prompt.", metavar="N")] = 32,
    steps: Annotated[
        str | None, typer.Option(help="Steps per block, or several counts; the model's own by default.", metavar="N,N")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only captions with these words; repeatable.", metavar="ATTRIBUTE=WORD,..."),
    ] = None,
    cache: Annotated[str, typer.Option(help=" | ".join(CACHES))] = CACHES[0],
    cache_dtype: Annotated[
        str | None, typer.Option(help="Keys and values in one byte: " + " | ".join(CACHE_DTYPES))
    ] = None,
    weights_dtype: Annotated[
        str | None, typer.Option(help="Weights of the layers in one byte: " + " | ".join(WEIGHTS_DTYPES))
    ] = None,
    transition: Annotated[str, typer.Option(help="To the new prompt: recache | cut | scene")] = "recache",
    transitions: Annotated[
        str | None, typer.Option(help="Several of them; all switches for each.", metavar="NAME,...")
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help=" | ".join(DTYPES))] = "auto",
    threads: Threads = None,
    batch: Annotated[int, typer.Option(help="Streams made at once.", metavar="N")] = 16,
    json: Json = None,
    sheet: Annotated[Path | None, typer.Option(help="Draw the clips into this PNG.", metavar="FILE")] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(help="Write curves and sheets of fixed captions and switches there.", metavar="DIR"),
    ] = None,
    overwrite: Overwrite = False,
) -> int:
    """Held-out captions of the sprites world: adherence by word, over time, after switches; motion, STREAM, codec."""
    from streamgen_infer.evaluation.options import Options, check, listed, part_of

    options = Options(
        model=model,
        n=n,
        seeds=(seed,) if seeds is None else listed(seeds, "--seeds", int, "whole numbers"),
        seconds=seconds,
        long_n=long_n,
        switches=switches,
        steps=() if steps is None else listed(steps, "--steps", int, "whole numbers"),
        cache=cache,
        cache_dtype=cache_dtype,
        weights_dtype=weights_dtype,
        transitions=listed(transition if transitions is None else transitions, "--transitions", str, "names"),
        device=device,
        dtype=dtype,
        threads=threads,
        batch=batch,
        part=part_of(only or []),
        json=json,
        sheet=sheet,
        pictures=pictures,
        overwrite=overwrite,
    )
    check(options)
    from streamgen_infer.evaluation import command

    return command.run(options, context.obj.interrupts)


@app.command("compare")
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="A.json B.json ...", show_default=False)],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Compare what was measured in different ways.")] = False,
) -> int:
    """One table of the JSON files of several evaluations; the first is what the others are marked against."""
    from streamgen_infer.evaluation import compare as command

    return command.run(files, markdown=markdown, force=force)
