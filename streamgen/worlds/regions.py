"""Where things are in a clip: the background, what stands out from it, connected regions and their tracks.

The first half of the checker (`checker.py` has its letters and units); it knows nothing of captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgen.worlds import sprites

Array = NDArray[Any]

WORKING_SIDE = 64  # frames are box-averaged down to about this side
MIN_FRAMES = 8
_MAX_BACKGROUND_ERROR = 45.0  # mean colour distance beyond which it is none of the five
_BACKGROUND_SHARE = 0.75  # of the pixels, the nearest ones: a sprite that stays in place covers less than the rest
_MEDIAN_TRUST = 30.0  # the clip's own median is the background where the two are this close
_MAX_FLICKER = 25.0  # by which the tone of a whole frame may differ from the clip's
_SMOOTH_THRESHOLD, _RAW_THRESHOLD = 26.0, 46.0
_EDGE_SLACK = 2  # px by which edges of the background may be displaced
_MIN_AREA, _MAX_AREA = 0.0025, 0.25  # of a sprite, in units of the frame
_MIN_AREA_RATIO = 0.3  # smaller blobs beside a big one are specks


# Frames and background


def planar(frames_rgb_u8: Array | Tensor) -> Array:
    """uint8 [T, H, W, 3] -> float32 [3, T, S, S], box-averaged to about WORKING_SIDE."""
    frames = frames_rgb_u8.cpu().numpy() if isinstance(frames_rgb_u8, Tensor) else np.asarray(frames_rgb_u8)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.shape[1] != frames.shape[2]:
        raise ValueError(f"frames have shape {frames.shape}; allowed: [T, side, side, 3]")
    if frames.dtype != np.uint8:
        raise ValueError(f"frames have dtype {frames.dtype}; allowed: uint8, see sprites.to_uint8")
    if len(frames) < MIN_FRAMES:
        raise ValueError(f"{len(frames)} frames; at least {MIN_FRAMES} are needed, best are 2 seconds")
    video = np.ascontiguousarray(frames.transpose(3, 0, 1, 2), dtype=np.float32)
    side = frames.shape[1]
    factor = next(f for f in range(max(side // WORKING_SIDE, 1), 0, -1) if side % f == 0)
    if factor > 1:
        small = side // factor
        video = video.reshape(3, -1, small, factor, small, factor).mean((3, 5))
    return video


def _box3(planes: Array) -> Array:
    """3 x 3 mean of [..., S, S], edges repeated."""
    tall = planes.copy()
    tall[..., 1:, :] += planes[..., :-1, :]
    tall[..., :1, :] += planes[..., :1, :]
    tall[..., :-1, :] += planes[..., 1:, :]
    tall[..., -1:, :] += planes[..., -1:, :]
    out = tall.copy()
    out[..., 1:] += tall[..., :-1]
    out[..., :1] += tall[..., :1]
    out[..., :-1] += tall[..., 1:]
    out[..., -1:] += tall[..., -1:]
    out *= 1 / 9
    return out


@lru_cache(maxsize=4)
def _nominal(side: int) -> Array:
    """The five backgrounds, float32 [5, 3, S, S]."""
    return torch.stack([sprites.background_image(name, side) for name in sprites.BACKGROUNDS]).numpy()


def backdrop_of(video: Array) -> tuple[str | None, Array]:
    """Name of the background and its image [3, S, S], the clip's own where it can be seen."""
    num_frames, side = video.shape[1], video.shape[-1]
    some = video[:, np.linspace(0, num_frames - 1, min(num_frames, 9)).round().astype(int)]
    median = _box3(np.median(some, axis=1))
    nominal = _nominal(side)
    distance = np.sqrt(((median - nominal) ** 2).sum(1)).reshape(len(nominal), -1)
    kept = int(_BACKGROUND_SHARE * side * side)
    errors = np.partition(distance, kept, axis=1)[:, :kept].mean(1)
    best = int(errors.argmin())
    if errors[best] > _MAX_BACKGROUND_ERROR:
        return None, nominal[best]
    near = (distance[best] <= np.partition(distance[best], kept)[kept]).reshape(side, side)
    image = _retoned(nominal[best], median, near)
    off = np.sqrt(((median - image) ** 2).sum(0))
    image = image + _spread(median - image, near & (off < _MEDIAN_TRUST))
    trusted = _distance2(median[:, None], image)[0] < _MEDIAN_TRUST**2
    return sprites.BACKGROUNDS[best], np.where(trusted, median, image)


def _retoned(image: Array, seen: Array, where: Array) -> Array:
    """image [3, S, S] with the gain and offset per channel that fit `seen` best over `where`."""
    a, b = image[:, where], seen[:, where]
    a0, b0 = a.mean(1, keepdims=True), b.mean(1, keepdims=True)
    gain = 1 + ((a - a0) * (b - b0 - a + a0)).mean(1) / ((a - a0).var(1) + 25.0)
    return (image - a0[..., None]) * gain.clip(0.7, 1.3)[:, None, None] + b0[..., None]


def _spread(values: Array, where: Array) -> Array:
    """Mean of values [3, S, S] over the pixels `where` up to S / 8 away; zero without any."""
    side = values.shape[-1]
    index = np.arange(side)
    window = (np.abs(index[:, None] - index) <= side // 8).astype(np.float32)
    total = window @ (values * where) @ window
    return total / np.maximum(window @ where.astype(np.float32) @ window, 1.0)


def flicker(video: Array, backdrop: Array) -> Array:
    """Change of tone of each whole frame, [3, T, 1, 1]."""
    change = (video - backdrop[:, None])[..., 1::3, 1::3]
    typical = np.median(change.reshape(*change.shape[:2], -1), axis=-1)
    return typical.clip(-_MAX_FLICKER, _MAX_FLICKER)[..., None, None]


def _distance2(video: Array, image: Array) -> Array:
    """Squared colour distance [T, S, S] of video [3, T, S, S] from the background image [3, S, S].

    Mixtures of what lies _EDGE_SLACK rows above and below a pixel are background too.
    """
    slack = _EDGE_SLACK
    above = np.concatenate([image[:, :1].repeat(slack, 1), image[:, :-slack]], 1)
    below = np.concatenate([image[:, slack:], image[:, -1:].repeat(slack, 1)], 1)
    span = below - above
    span2 = (span * span).sum(0)
    away2 = np.zeros(video.shape[1:], np.float32)
    along = np.zeros(video.shape[1:], np.float32)
    for plane, start, step in zip(video, above, span, strict=True):
        away = plane - start
        along += away * step
        away *= away
        away2 += away
    part = np.clip(along / (span2 + 1e-3), 0, 1)
    return away2 - part * (2 * along - part * span2)


def foreground(video: Array, backdrop: Array) -> tuple[Array, Array]:
    """Sprite pixels (bool) and the colour distance of pixels from the background, both [T, S, S].

    A sprite is where the smoothed frame differs or one pixel differs much; small gaps are closed.
    """
    contrast = np.sqrt(np.maximum(_distance2(video, backdrop), 0))
    mask = _distance2(_box3(video), _box3(backdrop)) > _SMOOTH_THRESHOLD**2
    mask |= contrast > _RAW_THRESHOLD
    return ~_grow(~_grow(mask)), contrast


def _grow(mask: Array) -> Array:
    """3 x 3 dilation of [T, S, S] on the torus."""
    for axis in (1, 2):
        mask = mask | np.roll(mask, 1, axis) | np.roll(mask, -1, axis)
    return mask


# Connected regions


@dataclass(frozen=True, slots=True)
class Blobs:
    """Sprite-sized connected regions of all frames."""

    frame: Array  # [K]
    area: Array  # [K], of the frame
    x: Array  # [K] centroid in [0, 1)
    y: Array
    gyration: Array  # [K] root mean square distance from the centroid
    contrast: Array  # [K] mean colour distance from the background
    pixel: Array  # [N] flat index into the mask
    owner: Array  # [N] blob of that pixel


def components(mask: Array) -> tuple[Array, Array, int]:
    """Flat indices of the set pixels of [T, S, S], the region of each, and the number of regions.

    Runs of pixels in a row are joined with the runs that touch them (also diagonally) in the next
    row and with the run at the other end of their own row: every frame is a torus, since sprites
    wrap.
    """
    num_frames, side, _ = mask.shape
    padded = np.zeros((num_frames * side, side + 2), np.int8)
    padded[:, 1:-1] = mask.reshape(-1, side)
    edge = np.diff(padded, axis=1)
    row, start = np.nonzero(edge == 1)
    end = np.nonzero(edge == -1)[1]
    runs = len(row)
    pitch = side + 2
    below = np.where(row % side == side - 1, row - side + 1, row + 1)
    low = np.searchsorted(row * pitch + end, below * pitch + start, "left")
    high = np.searchsorted(row * pitch + start, below * pitch + end, "right")
    touching = np.maximum(high - low, 0)
    upper = np.repeat(np.arange(runs), touching)
    lower = np.arange(len(upper)) - np.repeat(np.cumsum(touching) - touching, touching) + np.repeat(low, touching)
    left, right = np.nonzero(start == 0)[0], np.nonzero(end == side)[0]
    at_left = np.full(num_frames * side, -1)
    at_left[row[left]] = left
    around = right[at_left[row[right]] >= 0]
    a = np.concatenate([upper, around])
    b = np.concatenate([lower, at_left[row[around]]])

    label = np.arange(runs)
    while True:
        la, lb = label[a], label[b]
        if (la == lb).all():
            break
        least = np.minimum(la, lb)
        np.minimum.at(label, la, least)
        np.minimum.at(label, lb, least)
        while (label[label] != label).any():
            label = label[label]
    roots, label = np.unique(label, return_inverse=True)
    return np.flatnonzero(mask), np.repeat(label, end - start), len(roots)


def find_blobs(mask: Array, contrast: Array) -> Blobs:
    """Regions of mask [T, S, S]; parts two pixels apart are one, as faint rings fall to pieces."""
    side = mask.shape[-1]
    pixel, owner, number = components(_grow(mask))
    shown = mask.reshape(-1)[pixel]
    pixel, owner = pixel[shown], owner[shown]
    pixels = np.bincount(owner, minlength=number)
    fits = (pixels >= _MIN_AREA * side * side) & (pixels <= _MAX_AREA * side * side)
    renumbered = np.cumsum(fits) - 1
    keep = fits[owner]
    pixel, owner, pixels = pixel[keep], renumbered[owner[keep]], pixels[fits]
    first = np.unique(owner, return_index=True)[1]
    centre, spread = [], np.zeros(len(pixels))
    for coordinate in (pixel % side, pixel // side % side):
        # Relative to one of its pixels, the short way around: blobs are smaller than half a frame.
        anchor = coordinate[first]
        offset = (coordinate - anchor[owner] + side // 2) % side - side // 2
        mean = np.bincount(owner, offset, len(pixels)) / pixels
        spread += np.bincount(owner, offset * offset, len(pixels)) / pixels - mean * mean
        centre.append((anchor + 0.5 + mean) / side % 1.0)
    gyration = np.sqrt(np.maximum(spread, 0.25)) / side
    mean_contrast = np.bincount(owner, contrast.reshape(-1)[pixel], len(pixels)) / pixels
    x, y = centre
    return Blobs(
        pixel[first] // (side * side),
        pixels / side**2,
        x,
        y,
        gyration,
        mean_contrast,
        pixel,
        owner,
    )


def per_frame(blobs: Blobs, num_frames: int) -> tuple[Array, Array]:
    """Sprites in each frame [T], and the two largest as blob indices [T, 2], -1 for none."""
    order = np.lexsort((-blobs.area, blobs.frame))
    frame = blobs.frame[order]
    first = np.searchsorted(frame, np.arange(num_frames))
    largest = blobs.area[order][np.minimum(first, max(len(order) - 1, 0))] if len(order) else np.zeros(num_frames)
    real = blobs.area[order] >= _MIN_AREA_RATIO * largest[frame]
    number = np.bincount(frame[real], minlength=num_frames)
    slots = np.full((num_frames, 2), -1)
    for p in range(2):
        has = number > p
        slots[has, p] = order[first[has] + p]
    return number, slots


def share_of_both(number: Array, slots: Array, blobs: Blobs) -> float:
    """Share of frames with two sprites, not counting those where one blob is as large as both."""
    pairs, lone = np.nonzero(number >= 2)[0], np.nonzero(number == 1)[0]
    if not len(pairs):
        return 0.0
    together = blobs.area[slots[pairs]].sum(1)
    nearest = np.abs(lone[:, None] - pairs).argmin(1)
    touching = (blobs.area[slots[lone, 0]] > 0.8 * together[nearest]).sum()
    return float(len(pairs) / (len(number) - touching))


def wrap(x: Array) -> Array:
    return x - np.floor(x + 0.5)


def tracks(slots: Array, number: Array, blobs: Blobs, sprites_shown: int) -> Array:
    """Slots [T, P] with one sprite per column; frames that do not show all of them are -1."""
    if sprites_shown == 1:
        return slots[:, :1]
    slots = np.where((number >= 2)[:, None], slots, -1)
    last = None
    for t in np.nonzero(number >= 2)[0]:
        here = np.stack([blobs.x[slots[t]], blobs.y[slots[t]]], 1)
        if last is not None and np.abs(wrap(here - last)).sum() > np.abs(wrap(here[::-1] - last)).sum():
            slots[t], here = slots[t, ::-1].copy(), here[::-1]
        last = here
    return slots
