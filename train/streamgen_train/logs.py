"""What a run writes: JSONL and CSV rows, curves, pictures and videos, and all of it to wandb if that is asked for."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from streamgen.errors import UserError
from streamgen_train import curves
from streamgen_train.config import LogConfig

KINDS = ("train", "val")


class RunLog:
    """log.jsonl (all rows), train.csv and val.csv, curves.png, samples/*.png and *.mp4, and wandb if the config asks
    for it. `notes`: what the person should know at once.
    """

    def __init__(self, run_dir: Path, config: LogConfig, start_step: int, resolved: Mapping[str, Any]) -> None:
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self._jsonl = run_dir / "log.jsonl"
        self._forget_from(start_step)
        self.notes: list[str] = []
        self._fps, self._curves = config.video_fps, config.curves
        if config.curves and not curves.can_draw():
            self.notes.append("no curves.png: it needs the package matplotlib (pip install 'streamgen[train]')")
            self._curves = False
        self._wandb = _start_wandb(config, run_dir, resolved, self.notes) if config.wandb != "disabled" else None

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

    def draw_curves(self) -> None:
        """curves.png from all rows so far."""
        if self._curves and self._jsonl.exists():
            curves.draw(read_jsonl(self._jsonl), self.run_dir / "curves.png")

    def samples(self, step: int, samples: Mapping[str, np.ndarray]) -> None:
        """samples/step_XXXXXXXX_NAME.png from uint8 [height, width, 3], .mp4 from uint8 [frames, height, width, 3]."""
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        for name, sample_rgb_u8 in samples.items():
            is_video = sample_rgb_u8.ndim == 4
            path = folder / f"step_{step:08d}_{name}.{'mp4' if is_video else 'png'}"
            temporary = path.with_name(f".tmp_{path.name}")
            if is_video:
                write_video(temporary, sample_rgb_u8, self._fps)
            else:
                Image.fromarray(sample_rgb_u8).save(temporary)
            temporary.replace(path)
            if self._wandb is not None:
                import wandb

                shown = wandb.Video(str(path), format="mp4") if is_video else wandb.Image(str(path))
                self._wandb.log({f"samples/{name}": shown}, step=step)

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a log; a last line without its newline was cut off by a kill and is left out."""
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def write_video(path: Path, video_rgb_u8: np.ndarray, fps: float) -> None:
    """H.264 of uint8 [frames, height, width, 3]; an odd last row or column is doubled, as 4:2:0 has none."""
    import imageio.v3 as iio

    height, width = video_rgb_u8.shape[1:3]
    even = np.pad(video_rgb_u8, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    iio.imwrite(path, even, plugin="pyav", codec="libx264", fps=fps, out_pixel_format="yuv420p")


def _start_wandb(config: LogConfig, run_dir: Path, resolved: Mapping[str, Any], notes: list[str]) -> Any:
    """Needs the package wandb (extra `train`); without it the files of the run folder hold the same
    numbers. Without network it writes to the run folder, for `wandb sync` later.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"train.log.wandb needs the package wandb ({error}): pip install wandb, or set train.log.wandb=disabled"
        ) from error
    options: dict[str, Any] = {
        "project": config.wandb_project,
        "name": run_dir.name,
        "dir": str(run_dir),
        "config": dict(resolved),
    }
    try:
        settings = wandb.Settings(init_timeout=config.wandb_timeout_s)
        return wandb.init(mode=config.wandb, settings=settings, **options)
    except wandb.errors.UsageError as error:  # no key
        raise UserError(
            f"wandb could not start ({error}); run `wandb login`, or set train.log.wandb=offline"
        ) from error
    except wandb.errors.CommError as error:
        reason = str(error).split("\n", 1)[0]
        run = wandb.init(mode="offline", **options)
        notes.append(f"wandb is not reached ({reason}): logging offline; later run: wandb sync {Path(run.dir).parent}")
        return run
