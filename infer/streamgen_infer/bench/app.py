"""`streamgen bench` and its options. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamgen_infer.arguments import Json, Overwrite
from streamgen_infer.bench import suites

app = typer.Typer(rich_markup_mode=None)
group = typer.Typer(name="bench", rich_markup_mode=None)
app.add_typer(group)


@group.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    suite: Annotated[
        str,
        typer.Option(
            help="sprites | mid | all; or wan_1_3b | wan_14b | engine | viewers | pipeline | server | train | kernels"
        ),
    ] = "all",
    dtype: Annotated[str, typer.Option(help="fp32 | bf16 | all")] = "all",
    threads: Annotated[int, typer.Option(help="CPU threads.", metavar="N")] = 1,
    blocks: Annotated[int | None, typer.Option(help="Blocks to time; 20, 3 and 2 by default.", metavar="N")] = None,
    seconds: Annotated[float, typer.Option(help="How long the viewers watch.", metavar="N")] = 60,
    viewers: Annotated[int, typer.Option(help="Of --suite server.", metavar="N")] = 4,
    overload: Annotated[
        float | None, typer.Option(help="Of --suite viewers: so many times what is admitted come.", metavar="N")
    ] = None,
    json: Json = None,
    png: Annotated[
        Path | None, typer.Option(help="Draw every stage under the machine's roofs.", metavar="FILE")
    ] = None,
    overwrite: Overwrite = False,
    device: Annotated[str, typer.Option(help="cpu | cuda; on a GPU --suite wan_1_3b alone.")] = "cpu",
) -> int:
    """Time one block of video beside its bare matrix products and attention; or compare two such measurements."""
    if context.invoked_subcommand is not None:
        return 0
    if suite in suites.SUITES:
        options = suites.Options(
            suite=suite,
            dtype=dtype,
            threads=threads,
            blocks=blocks,
            seconds=seconds,
            viewers=viewers,
            device=device,
            json=json,
            png=png,
            overwrite=overwrite,
        )
        return suites.run(context.obj.interrupts, context.obj.hand_over, options)
    if device != "cpu":
        from streamgen_infer.bench import cuda

        return cuda.run(
            context.obj.interrupts,
            suite=suite,
            device=device,
            dtype=dtype,
            blocks=blocks,
            json=json,
            png=png,
            overwrite=overwrite,
        )
    from streamgen_infer.bench import command

    return command.run(
        context.obj.interrupts,
        suite=suite,
        dtype=dtype,
        threads=threads,
        blocks=blocks,
        seconds=seconds,
        json=json,
        png=png,
        overwrite=overwrite,
        overload=overload,
    )


@group.command()
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="OLD.json NEW.json", show_default=False)],
    threshold: Annotated[float, typer.Option(help="Worse by this share is a regression.", metavar="N")] = 0.05,
    times: Annotated[bool, typer.Option("--times", help="Times and rates decide too, not only ratios.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Compare other CPUs, suites and settings too.")] = False,
) -> int:
    """What got worse between two files of `bench --json`; exit code 1 if anything did."""
    from streamgen_infer.bench import compare as command

    return command.run(files, threshold=threshold, times=times, force=force)
