"""The commands `record` and `replay` and their options. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamgen_infer.arguments import Device, Json, Model, Overwrite, Steps, Threads

app = typer.Typer(rich_markup_mode=None)


@app.command()
def record(
    out: Annotated[Path, typer.Option(help="The recording, .safetensors.", metavar="FILE", show_default=False)],
    weights: Annotated[
        Path | None,
        typer.Option(help="The weights; beside the recording as NAME.weights.safetensors by default.", metavar="FILE"),
    ] = None,
    model: Model = "sprites",
    random: Annotated[
        Path | None,
        typer.Option(help="No model but random weights, of the sizes in this JSON file.", metavar="FILE"),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a red star spinning over a snow background",
    blocks: Annotated[int, typer.Option(help="Blocks to record.", metavar="N")] = 8,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Of the noise (and of random weights).", metavar="N")] = 0,
    cache: Annotated[str | None, typer.Option(help="relative | window; the model's own by default")] = None,
    flows: Annotated[bool, typer.Option("--flows", help="Also what the network answers in every pass.")] = False,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32 | bf16")] = "fp32",
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> int:
    """Write weights, inputs and outputs of a rollout to neutral files, for checking another implementation."""
    from streamgen_infer.models import record as command

    return command.run(
        command.Options(
            out=out,
            weights=weights,
            model=model,
            random=random,
            prompt=prompt,
            blocks=blocks,
            steps=steps,
            seed=seed,
            cache=cache,
            flows=flows,
            device=device,
            dtype=dtype,
            threads=threads,
            overwrite=overwrite,
        )
    )


@app.command()
def replay(
    weights: Annotated[
        Path, typer.Option(help="Safetensors under Wan's original names.", metavar="FILE", show_default=False)
    ],
    recording: Annotated[
        Path, typer.Option(help="A file of `record`, or of another program.", metavar="FILE", show_default=False)
    ],
    atol: Annotated[float, typer.Option(help="Largest absolute difference allowed.", metavar="X")] = 2e-5,
    dtype: Annotated[str, typer.Option(help="fp32 | bf16")] = "fp32",
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = None,
    overwrite: Overwrite = False,
) -> int:
    """Run a recording through this program and print how far the results differ; exit code 1 beyond --atol."""
    from streamgen_infer.models import replay as command

    return command.run(
        command.Options(
            weights=weights,
            recording=recording,
            atol=atol,
            dtype=dtype,
            device=device,
            threads=threads,
            json=json,
            overwrite=overwrite,
        )
    )
