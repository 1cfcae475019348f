"""How much moves and how smoothly: speed, dynamic degree and jerk, from tracks of the sprites.

Nothing is compared with a caption here. A figure means something beside the same figure of rendered video of the same
captions: spinning sprites stay where they are, bouncing ones have jerk at the floor, and centroids of pixels shake.
Letters: T frames, P sprites, K blobs. Lengths are fractions of the frame's side.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from streamgen.metrics.intervals import median_with_interval, wilson
from streamgen.worlds.regions import (
    MIN_FRAMES,
    Blobs,
    backdrop_of,
    find_blobs,
    flicker,
    foreground,
    per_frame,
    planar,
    tracks,
    wrap,
)

Array = NDArray[Any]

LAG_S = 0.25  # speeds are over this time: less would measure the shaking of centroids
MOVING_PER_S = 0.05  # speed, in sides per second, from which on a sprite moves
GROWING_PER_S = 0.2  # rate of the logarithm of the size, likewise


@dataclass(frozen=True, slots=True)
class Motion:
    """How one clip moves; nan where nothing could be followed."""

    speed: float
    """Median speed of the sprites, sides per second."""
    growth: float
    """Median absolute rate of the logarithm of their size, per second."""
    jerk: float
    """Median size of the third difference of their position over time, sides per second cubed."""
    tracked: float
    """Share of frames in which every sprite was found."""

    @property
    def moving(self) -> bool:
        """Whether the clip moves or changes size: what the share of moving clips counts."""
        return self.speed > MOVING_PER_S or self.growth > GROWING_PER_S


def motion_of(frames_rgb_u8: Array | Tensor, fps: float = 16.0) -> Motion:
    """The motion of a clip, uint8 [T, S, S, 3], of one scene, a second or more."""
    place, size = follow(frames_rgb_u8)
    known = ~np.isnan(size)
    lag = max(round(LAG_S * fps), 1)
    if known.all(1).sum() < MIN_FRAMES or len(place) <= max(lag, 3):
        return Motion(math.nan, math.nan, math.nan, float(known.all(1).mean()))
    path = np.nancumsum(np.concatenate([place[:1], _step(place)]), axis=0)
    path[~known] = math.nan
    speed = np.linalg.norm(path[lag:] - path[:-lag], axis=-1) * fps / lag
    growth = np.abs(np.log(size[lag:] / size[:-lag])) * fps / lag
    jerk = np.linalg.norm(np.diff(path, 3, axis=0), axis=-1) * fps**3
    return Motion(_typical(speed), _typical(growth), _typical(jerk), float(known.all(1).mean()))


def motion_report(motions: Sequence[Motion]) -> dict[str, Any]:
    """Of clips: medians of 'speed' (sides/s), 'jerk' (sides/s^3) and 'growth' (1/s), 'moving' (share), 'tracked', 'n',
    and 'intervals' of the first three and of 'moving'.

    Clips in which nothing could be followed count as not moving and nowhere else.
    """
    out: dict[str, Any] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for name in ("speed", "jerk", "growth"):
        middle, low, high = median_with_interval([v for m in motions if not math.isnan(v := getattr(m, name))])
        out[name], intervals[name] = middle, (low, high)
    out["moving"] = statistics.fmean(m.moving for m in motions)
    intervals["moving"] = wilson(out["moving"], len(motions))
    out["tracked"] = statistics.fmean(m.tracked for m in motions)
    return {**out, "n": len(motions), "intervals": intervals}


def follow(frames_rgb_u8: Array | Tensor) -> tuple[Array, Array]:
    """Centres [T, P, 2] (x, y in [0, 1)) and sizes [T, P] (root mean square radius) of the sprites of a clip.

    P is 1 or 2, whichever most frames show; nan in frames that do not show all of them. On another background than
    the world's nothing is found.
    """
    video = planar(frames_rgb_u8)
    name, backdrop = backdrop_of(video)
    if name is None:
        return np.full((video.shape[1], 1, 2), math.nan), np.full((video.shape[1], 1), math.nan)
    video -= flicker(video, backdrop)
    mask, contrast = foreground(video, backdrop)
    blobs = find_blobs(mask, contrast)
    number, slots = per_frame(blobs, len(mask))
    shown = 2 if (number > 0).any() and np.median(number[number > 0]) == 2 else 1
    track = tracks(slots, number, blobs, shown)[:, :shown]
    centre = np.concatenate([_centres(blobs, contrast), np.full((1, 2), math.nan)])  # the last one is slot -1: not seen
    size = np.append(blobs.gyration, math.nan)
    return centre[track], size[track]


def _centres(blobs: Blobs, contrast: Array) -> Array:
    """Centroids [K, 2] weighted by contrast: the anti-aliased rim places them to a fraction of a pixel."""
    side = contrast.shape[-1]
    weight = contrast.reshape(-1)[blobs.pixel]
    total = np.bincount(blobs.owner, weight, len(blobs.x))
    out = []
    for pixel, rough in ((blobs.pixel % side, blobs.x), (blobs.pixel // side % side, blobs.y)):
        away = wrap((pixel + 0.5) / side - rough[blobs.owner])
        out.append((rough + np.bincount(blobs.owner, away * weight, len(rough)) / np.maximum(total, 1e-9)) % 1.0)
    return np.stack(out, 1)


def _step(place: Array) -> Array:
    """Steps from frame to frame, the short way around the frame's edge, from the last place known."""
    last = place.copy()
    for t in range(1, len(last)):
        last[t] = np.where(np.isnan(last[t]), last[t - 1], last[t])
    return wrap(np.diff(last, axis=0))


def _typical(values: Array) -> float:
    """Median over time of each sprite, mean over sprites; nan if one was never followed."""
    seen = [one[~np.isnan(one)] for one in values.T]
    return statistics.fmean(float(np.median(one)) if len(one) else math.nan for one in seen)
