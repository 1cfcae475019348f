"""PNGs of an evaluation: drift curves, the same captions by every number of steps, and what a switch looks like."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from streamgen.metrics.adherence import SEGMENT_S, by_segment
from streamgen.sheets import contact_sheet
from streamgen.worlds import sprites
from streamgen.worlds.sprites import Caption
from streamgen_infer.evaluation.show import steps_text

if TYPE_CHECKING:
    from streamgen_infer.evaluation.measure import Evaluation

Clip = np.ndarray
SHEET_FRAMES = 8
CURVES = ("color", "shape", "motion", "presence")


def draw(evaluation: Evaluation, values: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write what there is to show (`values` are the report's fields) -> the files written."""
    folder.mkdir(exist_ok=True)
    pictures: dict[str, bytes] = {}
    several = values.get("by_steps", [values])
    if any(len(one["by_segment"]) > 1 for one in several):
        pictures["drift.png"] = drift_curves(several, str(values["model"]))
    if evaluation.fixed:
        pictures["captions.png"] = png(captions_sheet(evaluation))
    if any(evaluation.shown_switches.values()):
        pictures["switches.png"] = png(switches_sheet(evaluation))
    for name, content in pictures.items():
        write_whole(folder / name, content)
    return [folder / name for name in pictures]


def drift_curves(several: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Adherence over the time of the stream with 95 % bands, as a PNG: obeys left, its parts right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for one in several:
        _curve(left, one["by_segment"], "obeys", f"obeys, {steps_text(one['steps'])}")
    for name in CURVES:
        _curve(right, several[0]["by_segment"], name, name)
    for axes in (left, right):
        axes.set(xlabel="seconds of stream", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_ylabel(f"share of windows, n = {several[0]['by_segment'][0]['n']} streams")
    left.set_title(title[-60:], fontsize=9)
    right.set_title(steps_text(several[0]["steps"]), fontsize=9)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()


def _curve(axes: Any, segments: Sequence[Mapping[str, Any]], name: str, label: str) -> None:
    known = [one for one in segments if one[name] is not None]
    middle = [one["start_s"] + SEGMENT_S / 2 for one in known]
    (line,) = axes.plot(middle, [one[name] for one in known], marker=".", label=label)
    low, high = zip(*(one["intervals"][name] for one in known), strict=True)
    axes.fill_between(middle, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def captions_sheet(evaluation: Evaluation) -> Image.Image:
    """The fixed captions: rendered, and made with each number of steps, side by side; + obeys, - does not."""
    from streamgen_infer.evaluation.measure import fixed_captions

    captions = fixed_captions(evaluation.heldout)
    geometry = evaluation.geometry
    size = round(SEGMENT_S * geometry.fps)
    scenes = sprites.sample_scenes(captions, torch.Generator().manual_seed(0))
    real = sprites.to_uint8(sprites.render(scenes, size, fps=geometry.fps, side=geometry.height)).numpy()
    clips: list[Clip] = []
    texts: list[str] = []
    for row, caption in enumerate(captions):
        clips.append(real[row])
        texts.append(f"rendered: {caption.text}")
        for steps, made in evaluation.fixed.items():
            clip = made[row, :size]
            clips.append(clip)
            texts.append(f"{mark(clip, caption, geometry.fps)} {steps_text(steps)}")
    sheet = contact_sheet(clips, texts, frames=SHEET_FRAMES, columns=1 + len(evaluation.fixed))
    return Image.fromarray(sheet)


def switches_sheet(evaluation: Evaluation) -> Image.Image:
    """The same changes of prompt, one column per transition: a second before to three after."""
    shown = [(name, pairs) for name, pairs in evaluation.shown_switches.items() if pairs]
    rows = min(len(pairs) for _, pairs in shown)
    cells = [(name, *pairs[row]) for row in range(rows) for name, pairs in shown]
    texts = [f"{name}: {before.text} -> {after.text}" for name, _, before, after in cells]
    sheet = contact_sheet([clip for _, clip, _, _ in cells], texts, frames=12, columns=len(shown))
    return Image.fromarray(sheet)


def marked_sheet(clips: Sequence[Clip], captions: Sequence[Caption], fps: float) -> Image.Image:
    """Clips under their captions, marked."""
    texts = [f"{mark(clip, item, fps)} {item.text}" for clip, item in zip(clips, captions, strict=True)]
    return Image.fromarray(contact_sheet(clips, texts, frames=SHEET_FRAMES, columns=2))


def mark(clip: Clip, caption: Caption, fps: float) -> str:
    """+ if more than half of its windows obey, - if not."""
    return "+" if by_segment(clip, caption, fps)[0]["obeys"] > 0.5 else "-"


def png(image: Image.Image) -> bytes:
    target = io.BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
