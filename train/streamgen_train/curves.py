"""The numbers of a run as curves, one PNG. Needs matplotlib (extra `train`); without it there is no picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SPEED = ("tokens_per_s", "tflop_per_s", "mfu")
HIDDEN = ("step", "kind", "step_s", "steps_per_s", "clips_per_s", "elapsed_s", "lr_factor", *SPEED)
COLUMNS, MOST_POINTS, SMOOTH_FROM = 3, 2000, 100


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def panels(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Panel -> line -> (steps, values). Numbers that differ in what comes after the last _ share a panel; validation
    numbers stand apart.
    """
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for row in rows:
        for name, value in row.items():
            if name in HIDDEN or name.startswith("share_"):
                continue
            stem = name.rsplit("_", 1)[0]
            panel = stem if row["kind"] == "train" else f"validation: {stem}"
            steps, values = found.setdefault(panel, {}).setdefault(name, ([], []))
            steps.append(row["step"])
            values.append(value)
    return found


def draw(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write (or replace) the picture of these rows of a log; nothing if they hold no numbers."""
    from matplotlib.figure import Figure

    groups = panels(rows)
    if not groups:
        return
    height = -(-len(groups) // COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 3 * height), layout="constrained")
    axes = list(figure.subplots(height, COLUMNS, squeeze=False).flat)
    for axis, (title, lines) in zip(axes, groups.items(), strict=False):
        for name, (steps, values) in lines.items():
            _line(axis, np.array(steps), np.array(values), name)
        shown = np.concatenate([values for _, values in lines.values()])
        if shown.min() > 0 and shown.max() > 50 * shown.min():
            axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=7)
    for axis in axes[len(groups) :]:
        axis.set_visible(False)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=80)
    temporary.replace(path)


def _line(axis: Any, steps: np.ndarray, values: np.ndarray, name: str) -> None:
    """All points of a short curve; of a long one the means of pieces, over the points themselves in grey."""
    if len(steps) < SMOOTH_FROM:
        axis.plot(steps, values, label=name, linewidth=1, marker="." if len(steps) < 20 else None)
        return
    stride = -(-len(steps) // MOST_POINTS)
    axis.plot(steps[::stride], values[::stride], color="0.8", linewidth=0.6)
    pieces = np.array_split(np.arange(len(steps)), 50)
    axis.plot([steps[p].mean() for p in pieces], [values[p].mean() for p in pieces], label=name, linewidth=1.2)
