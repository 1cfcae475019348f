"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="A shipped model's name, or a model folder.", metavar="DIR|NAME")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps per block; the model's own by default.", metavar="N")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; torch's choice by default.", metavar="N")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or mps.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this JSON file.", metavar="FILE")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files of the same name.")]
