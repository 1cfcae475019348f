"""What a run writes and shows: JSONL and CSV rows, pictures, optional wandb, a progress bar, and
where it ran.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from streamgen.errors import UserError
from streamgen_train.config import LogConfig

KINDS = ("train", "val")
PACKAGES = ("torch", "numpy", "omegaconf", "hydra-core", "safetensors")


class RunLog:
    """log.jsonl (all rows), train.csv and val.csv, samples/*.png, and wandb if the config asks for
    it.
    """

    def __init__(self, run_dir: Path, config: LogConfig, start_step: int, resolved: Mapping[str, Any]) -> None:
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self._jsonl = run_dir / "log.jsonl"
        self._forget_from(start_step)
        self._wandb = _start_wandb(config, run_dir, resolved) if config.wandb != "disabled" else None

    def _forget_from(self, step: int) -> None:
        """Drop rows that a killed process wrote after the checkpoint we continue from; they will be
        made again.
        """
        rows = [row for row in read_jsonl(self._jsonl) if row["step"] <= step] if self._jsonl.exists() else []
        temporary = self._jsonl.with_name(".log.jsonl.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(self._jsonl)
        for kind in KINDS:
            self._rewrite_csv(kind, [row for row in rows if row["kind"] == kind])

    def _rewrite_csv(self, kind: str, rows: list[dict[str, Any]]) -> None:
        path = self.run_dir / f"{kind}.csv"
        if not rows:
            path.unlink(missing_ok=True)
            return
        columns = list(dict.fromkeys(key for row in rows for key in row if key != "kind"))
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)

    def write(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        """Append one row; `step` counts steps done."""
        row = {"kind": kind, "step": step, **numbers}
        with open(self._jsonl, "a") as file:
            file.write(json.dumps(row) + "\n")
        self._append_csv(kind, row)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{key}": value for key, value in numbers.items()}, step=step)

    def _append_csv(self, kind: str, row: dict[str, Any]) -> None:
        path = self.run_dir / f"{kind}.csv"
        header = None
        if path.exists():
            with open(path, newline="") as file:
                header = next(csv.reader(file))
        if header is None or not set(row) - {"kind"} <= set(header):  # first row, or a new column
            self._rewrite_csv(kind, [r for r in read_jsonl(self._jsonl) if r["kind"] == kind])
            return
        with open(path, "a", newline="") as file:
            csv.DictWriter(file, header, extrasaction="ignore", restval="").writerow(row)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """samples/step_XXXXXXXX_NAME.png from uint8 [height, width, 3]."""
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        for name, picture_rgb_u8 in pictures.items():
            path = folder / f"step_{step:08d}_{name}.png"
            Image.fromarray(picture_rgb_u8).save(path)
            if self._wandb is not None:
                import wandb

                self._wandb.log({f"samples/{name}": wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a log; a last line without its newline was cut off by a kill and is left out."""
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _start_wandb(config: LogConfig, run_dir: Path, resolved: Mapping[str, Any]) -> Any:
    """Needs the package wandb (extra `train`); without it the files of the run folder hold the same
    numbers.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"train.log.wandb needs the package wandb ({error}): pip install wandb, or set train.log.wandb=disabled"
        ) from error
    try:
        return wandb.init(
            project=config.wandb_project,
            name=run_dir.name,
            dir=str(run_dir),
            mode=config.wandb,
            config=dict(resolved),
        )
    except wandb.errors.UsageError as error:  # no key, no network
        raise UserError(
            f"wandb could not start ({error}); run `wandb login`, or set train.log.wandb=offline"
        ) from error


class Display:
    """Progress on stderr: a bar when it is a terminal, else one line per log row."""

    def __init__(self, total: int, done: int, name: str) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(name, total=total, completed=done, numbers="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def advance(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def row(self, done: int, total: int, numbers: Mapping[str, float]) -> None:
        short = f"loss {numbers['loss']:.4g}  {numbers['clips_per_s']:.4g} clips/s"
        self._progress.update(self._task, completed=done, numbers=short)
        if not self._live:
            text = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
            self.say(f"step {done}/{total}  {text}")

    def say(self, line: str) -> None:
        """One line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def environment(argv: list[str]) -> dict[str, Any]:
    """Where and from what code a run was started."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "argv": argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: found[name] for name in PACKAGES if name in found},
        "code": code_version(),
    }


def code_version() -> str:
    """`git describe` of the checkout with -dirty, or the installed version where there is no
    checkout.
    """
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except FileNotFoundError:
        print("git is not installed: the run records the package version only", file=sys.stderr)
        result = None
    if result is not None and result.returncode == 0:
        return result.stdout.strip()
    from streamgen import __version__

    return str(__version__)


def write_provenance(run_dir: Path, resolved: Mapping[str, Any], step: int) -> None:
    """config.yaml and environment.json of this start; those of earlier starts are kept as
    NAME.before_step_N.
    """
    from omegaconf import OmegaConf

    texts = {
        "config.yaml": OmegaConf.to_yaml(OmegaConf.create(dict(resolved))),
        "environment.json": json.dumps(environment(sys.argv), indent=1) + "\n",
    }
    for name, text in texts.items():
        path = run_dir / name
        if path.exists() and path.read_text() != text:
            stem, suffix = name.split(".")
            path.replace(run_dir / f"{stem}.before_step_{step}.{suffix}")
        path.write_text(text)
