"""Reads a sprites clip back from the pixels: count, size, colour, shape, motion and background.

The judged video comes from a generative model, so every threshold is wide: backgrounds may be a
little off in tone and their edges a little displaced, outlines soft, a frame now and then odd. What
is not forgiven is what would fake adherence: sprites that vanish, clips that stand still, frames in
the wrong order. Two limits are in the world itself: a still circle or ring is one that spins, and
bouncing looks the same backwards.

Letters: T frames, S side of the (reduced) frame in pixels, K blobs of all frames, M some of them,
P sprites (at most 2), R radii and A angles of polar samples.
Lengths are fractions of the side, times seconds, y points down, colours 0..255.
"""

from __future__ import annotations

import math
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
SIZELESS_MOTIONS = (
    "growing",
    "shrinking",
)  # their radius runs through the whole range: no size to read
STILL_SHAPES = ("circle", "ring")  # spinning, they look still
PRESENCE_SHARE, BOTH_SHARE = 0.90, 0.85

_MAX_BACKGROUND_ERROR = 45.0  # mean colour distance beyond which it is none of the five
_BACKGROUND_SHARE = 0.75  # of the pixels, the nearest ones: a sprite that stays in place covers less than the rest
_MEDIAN_TRUST = 30.0  # the clip's own median is the background where the two are this close
_MAX_FLICKER = 25.0  # by which the tone of a whole frame may differ from the clip's
_SMOOTH_THRESHOLD, _RAW_THRESHOLD = 26.0, 46.0
_EDGE_SLACK = 2  # px by which edges of the background may be displaced
_MIN_AREA, _MAX_AREA = 0.0025, 0.25  # of a sprite, in units of the frame
_MIN_AREA_RATIO = 0.3  # smaller blobs beside a big one are specks
_MAX_COLOR_ERROR = 90.0
_SHADES = (0.45, 1.1)  # rim darkening keeps the hue
_MAX_SHAPE_ERROR = 0.40
_SHAPE_FRAMES = 16  # shape is read from the frames with the largest sprites
_COHERENCE = 0.75


@dataclass(frozen=True, slots=True)
class Reading:
    """What a window shows; None is 'nothing of the grammar'.

    A still circle or ring reads 'spinning'. size is None while the sprite grows or shrinks.
    presence is the share of frames with at least one sprite, both the share with two, frames in
    which two sprites touch set aside.
    """

    count: str | None = None
    size: str | None = None
    color: str | None = None
    shape: str | None = None
    motion: str | None = None
    background: str | None = None
    presence: float = 0.0
    both: float = 0.0


def check(frames_rgb_u8: Array | Tensor, fps: float = 16.0) -> Reading:
    """Read a window of about two seconds (24 to 80 frames at 16 fps), uint8 [T, S, S, 3]."""
    video = _planar(frames_rgb_u8)
    name, backdrop = _backdrop(video)
    if name is None:
        return Reading()
    video -= _flicker(video, backdrop)
    mask, contrast = _foreground(video, backdrop)
    blobs = _blobs(mask, contrast)
    number, slots = _per_frame(blobs, len(mask))
    presence = float((number > 0).mean())
    both = _both(number, slots, blobs)
    if (number > 0).sum() < MIN_FRAMES:
        return Reading(background=name, presence=presence, both=both)

    median = int(np.median(number[number > 0]))
    count = {1: "a", 2: "two"}.get(median)
    slots = _tracks(slots, number, blobs, 2 if count == "two" else 1)
    shown = slots[slots >= 0]
    color = _color(video, contrast, blobs, shown)
    shape, radius = _shape(contrast, blobs, shown)
    motions = {_motion(contrast, blobs, track, count or "a", shape, fps) for track in slots.T}
    motion = motions.pop() if len(motions) == 1 else None
    size = None
    if motion not in SIZELESS_MOTIONS:
        large, small = (sprites.RADIUS[count or "a", s] for s in ("large", "small"))
        size = "large" if radius > math.sqrt(large * small) else "small"
    return Reading(count, size, color, shape, motion, name, presence, both)


def is_present(reading: Reading, count: str) -> bool:
    """The presence rule: sprites gone for part of the window do not obey, whatever else is so."""
    return reading.presence >= PRESENCE_SHARE and (count != "two" or reading.both >= BOTH_SHARE)


def obeys(reading: Reading, caption: sprites.Caption) -> dict[str, bool]:
    """Which attributes of the caption the window shows; 'obeys' is all of them but size.

    Unless the sprites are present (see `is_present`) everything but the background is wrong. The
    size of sprites that grow or shrink cannot be read: it is not applicable, given as right if they
    are present, and left out of averages (`SIZELESS_MOTIONS`).
    """
    present = is_present(reading, caption.count)
    right = {
        a: getattr(reading, a) == getattr(caption, a) and (present or a == "background") for a in sprites.ATTRIBUTES
    }
    if caption.motion in SIZELESS_MOTIONS:
        right["size"] = present
    right["obeys"] = all(v for a, v in right.items() if a != "size")
    return right


# Frames and background


def _planar(frames_rgb_u8: Array | Tensor) -> Array:
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


def _backdrop(video: Array) -> tuple[str | None, Array]:
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


def _flicker(video: Array, backdrop: Array) -> Array:
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


def _foreground(video: Array, backdrop: Array) -> tuple[Array, Array]:
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
class _Blobs:
    """Sprite-sized connected regions of all frames."""

    frame: Array  # [K]
    area: Array  # [K], of the frame
    x: Array  # [K] centroid in [0, 1)
    y: Array
    gyration: Array  # [K] root mean square distance from the centroid
    contrast: Array  # [K] mean colour distance from the background
    pixel: Array  # [N] flat index into the mask
    owner: Array  # [N] blob of that pixel


def _components(mask: Array) -> tuple[Array, Array, int]:
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


def _blobs(mask: Array, contrast: Array) -> _Blobs:
    """Regions of mask [T, S, S]; parts two pixels apart are one, as faint rings fall to pieces."""
    side = mask.shape[-1]
    pixel, owner, number = _components(_grow(mask))
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
    return _Blobs(
        pixel[first] // (side * side),
        pixels / side**2,
        x,
        y,
        gyration,
        mean_contrast,
        pixel,
        owner,
    )


def _per_frame(blobs: _Blobs, num_frames: int) -> tuple[Array, Array]:
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


def _both(number: Array, slots: Array, blobs: _Blobs) -> float:
    """Share of frames with two sprites, not counting those where one blob is as large as both."""
    pairs, lone = np.nonzero(number >= 2)[0], np.nonzero(number == 1)[0]
    if not len(pairs):
        return 0.0
    together = blobs.area[slots[pairs]].sum(1)
    nearest = np.abs(lone[:, None] - pairs).argmin(1)
    touching = (blobs.area[slots[lone, 0]] > 0.8 * together[nearest]).sum()
    return float(len(pairs) / (len(number) - touching))


def _wrap(x: Array) -> Array:
    return x - np.floor(x + 0.5)


def _tracks(slots: Array, number: Array, blobs: _Blobs, sprites_shown: int) -> Array:
    """Slots [T, P] with one sprite per column; frames that do not show all of them are -1."""
    if sprites_shown == 1:
        return slots[:, :1]
    slots = np.where((number >= 2)[:, None], slots, -1)
    last = None
    for t in np.nonzero(number >= 2)[0]:
        here = np.stack([blobs.x[slots[t]], blobs.y[slots[t]]], 1)
        if last is not None and np.abs(_wrap(here - last)).sum() > np.abs(_wrap(here[::-1] - last)).sum():
            slots[t], here = slots[t, ::-1].copy(), here[::-1]
        last = here
    return slots


# Colour and shape


def _color(video: Array, contrast: Array, blobs: _Blobs, shown: Array) -> str | None:
    """Nearest colour of the sprites' most distinct pixels, however shaded; median over blobs."""
    # The cube, because outlines, the more so if blurred, are mixed with the background.
    weight = contrast.reshape(-1)[blobs.pixel] ** 3
    total = np.bincount(blobs.owner, weight)
    planes = video.reshape(3, -1)
    mean = np.stack([np.bincount(blobs.owner, weight * plane[blobs.pixel]) / total for plane in planes], 1)
    seen = np.median(mean[shown], axis=0)
    palette = np.array(list(sprites.COLORS.values()), dtype=float)
    shade = np.clip((palette @ seen) / (palette * palette).sum(1), *_SHADES)
    error = np.sqrt(((shade[:, None] * palette - seen) ** 2).sum(1))
    return list(sprites.COLORS)[error.argmin()] if error.min() < _MAX_COLOR_ERROR else None


_MIN_CONTRAST = 60.0
_EMPTY, _FULL = 0.2, 0.7  # of a blob's mean contrast, where a pixel counts as background, as sprite
_RINGS, _SPOKES, _REACH = 10, 40, 2.1  # polar samples, out to _REACH radii of gyration
_SCALES = (
    1.0,
    0.8,
    0.9,
    1.1,
)  # outline over mask: the mask's outline depends on colour and background
_GROWN = (0.0, 0.1)  # of thin parts, which noise and smoothing thicken, in radii
_SOFT = 0.25  # width of an edge, in radii


def _polar_grid() -> tuple[Array, Array]:
    """Radii [R] in radii of gyration and angles [A], clockwise from the top."""
    return (np.arange(_RINGS) + 0.5) / _RINGS * _REACH, np.arange(_SPOKES) / _SPOKES * 2 * math.pi


@dataclass(frozen=True, slots=True)
class _Templates:
    """Spectra along the angle [shape, variant, R, A // 2 + 1] and energies [shape, variant].

    The first variant is the plain outline: its `radius` [shape] is in radii of gyration, its `area`
    [shape] in units of the polar grid.
    """

    spectrum: Array
    energy: Array
    radius: Array
    area: Array


@lru_cache(maxsize=1)
def _templates() -> _Templates:
    rho, theta = (torch.from_numpy(v).float() for v in _polar_grid())
    line = torch.linspace(-1.4, 1.4, 141)
    y, x = torch.meshgrid(line, line, indexing="ij")
    one, zero = torch.ones(()), torch.zeros(())
    images, radii = [], []
    for shape in map(torch.tensor, range(len(sprites.SHAPES))):
        for grown in _GROWN:
            inside = (sprites.signed_distance(x, y, one, zero, shape) < grown).float()
            gyration = (((x * x + y * y) * inside).sum() / inside.sum()).sqrt()
            radii.append(float(1 / gyration))
            for scale in _SCALES:
                reach = (gyration / scale * rho)[:, None]
                px, py = reach * torch.sin(theta), -reach * torch.cos(theta)
                edge = sprites.signed_distance(px, py, one, zero, shape) - grown
                images.append((0.5 - edge / _SOFT).clamp(0, 1).numpy())
    image = np.stack(images).reshape(len(sprites.SHAPES), -1, _RINGS, _SPOKES)
    energy = (image**2 * rho.numpy()[:, None]).sum((-2, -1))
    area = (image[:, 0] * rho.numpy()[:, None]).sum((-2, -1))
    return _Templates(np.fft.rfft(image), energy, np.array(radii[:: len(_GROWN)]), area)


def _polar(contrast: Array, blobs: _Blobs, which: Array) -> Array:
    """How much of a sprite there is around the blobs `which` [M], 0..1, bilinear: [M, R, A].

    A pixel counts by its contrast, relative to the blob's mean.
    """
    side = contrast.shape[-1]
    rho, theta = _polar_grid()
    reach = (blobs.gyration[which] * side)[:, None, None] * rho[:, None]
    x = (blobs.x[which] * side - 0.5)[:, None, None] + reach * np.sin(theta)
    y = (blobs.y[which] * side - 0.5)[:, None, None] - reach * np.cos(theta)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = x - x0, y - y0
    base = (blobs.frame[which] * side * side)[:, None, None]
    level = np.maximum(blobs.contrast[which], _MIN_CONTRAST)[:, None, None]
    flat = contrast.reshape(-1)
    out = np.zeros(x.shape)
    for dy, wy in ((0, 1 - fy), (1, fy)):
        line = base + (y0 + dy) % side * side
        for dx, wx in ((0, 1 - fx), (1, fx)):
            out += wy * wx * np.clip((flat[line + (x0 + dx) % side] / level - _EMPTY) / (_FULL - _EMPTY), 0, 1)
    return out


def _shape(contrast: Array, blobs: _Blobs, shown: Array) -> tuple[str | None, float]:
    """Shape with the least difference from its template over rotation; the radius by its area."""
    largest = shown[np.argsort(-blobs.area[shown], kind="stable")[:_SHAPE_FRAMES]]
    rho = _polar_grid()[0]
    image = _polar(contrast, blobs, largest)
    templates = _templates()
    spectrum = np.fft.rfft(image) * rho[:, None]
    flat = templates.spectrum.conj().reshape(-1, *spectrum.shape[1:])
    product = np.einsum("mra,kra->mka", spectrum, flat, optimize=True)
    match = np.fft.irfft(product, _SPOKES).max(-1).reshape(len(largest), *templates.energy.shape)
    energy = (image**2 * rho[:, None]).sum((-2, -1))
    error = np.median((energy[:, None, None] + templates.energy - 2 * match) / templates.energy, axis=0)
    shape = int(error.min(1).argmin())
    area = (image * rho[:, None]).sum((-2, -1)) / templates.area[shape]
    radius = float(np.median(blobs.gyration[largest] * np.sqrt(area))) * float(templates.radius[shape])
    return (sprites.SHAPES[shape] if error[shape].min() < _MAX_SHAPE_ERROR else None), radius


def _angles(contrast: Array, blobs: _Blobs, which: Array, shape: str) -> tuple[Array, int]:
    """Orientation times the order of symmetry [M] (rad, clockwise on the screen), and the order."""
    order = {"square": 4, "triangle": 3, "star": 5}[shape]
    seen = np.fft.fft(_polar(contrast, blobs, which))[:, :, order]
    template = np.conj(_templates().spectrum[sprites.SHAPES.index(shape), 0, :, order])
    return -np.angle((seen * template * _polar_grid()[0]).sum(1)), order


# Motion


def _rate(phase: Array, t: Array, limit: float) -> tuple[float, float]:
    """Rate of a phase (rad/s) up to +-limit, and how coherently it runs, 0..1.

    The peak of a periodogram: it needs no unwrapping, bears outliers, and is low for frames out of
    order.
    """
    rates = np.arange(-limit, limit + 0.1, 0.2)
    power = np.abs(np.exp(1j * (phase - rates[:, None] * t)).mean(1))
    peak = int(power.argmax())
    return float(rates[peak]), float(power[peak])


def _line(values: Array, t: Array) -> tuple[float, float]:
    """Slope and root mean square residual of a straight line through values [M]."""
    centred = t - t.mean()
    slope = float((centred * values).sum() / (centred * centred).sum())
    return slope, float((values - values.mean() - slope * centred).std())


def _bounces(y: Array, t: Array) -> bool:
    """Whether y [M] follows parabolas between bounces, for some period, phase, scale and offset."""
    period = np.linspace(1.5, 2.1, 7)[:, None, None]
    tau = (t + np.linspace(0, 1, 20, endpoint=False)[:, None] * period) % period
    height = tau * (period - tau)
    height = height - height.mean(-1, keepdims=True)
    down = y - y.mean()
    scale = -(height * down).sum(-1) / (height * height).sum(-1)
    left = ((down + scale[..., None] * height) ** 2).sum(-1) / (down * down).sum()
    allowed = (scale > 0.25 * sprites.GRAVITY) & (scale < 1.0 * sprites.GRAVITY)
    return bool(allowed.any() and left[allowed].min() < 0.2)


def _motion(contrast: Array, blobs: _Blobs, track: Array, count: str, shape: str | None, fps: float) -> str | None:
    """Motion of one sprite from its blobs [T] (-1: not seen)."""
    seen = np.nonzero(track >= 0)[0]
    if len(seen) < MIN_FRAMES:
        return None
    t, blob = seen / fps, track[seen]
    x0, y0 = blobs.x[blob], blobs.y[blob]
    x, y = (v[0] + np.concatenate([[0.0], np.cumsum(_wrap(np.diff(v)))]) for v in (x0, y0))
    (vx, rx), (vy, ry) = _line(x, t), _line(y, t)
    spread_x, spread_y = float(x.std()), float(y.std())

    if max(rx, ry) < 0.04 and max(abs(vx), abs(vy)) > 0.12:
        if abs(vy) < 0.3 * abs(vx):
            return "moving right" if vx > 0 else "moving left"
        if abs(vx) < 0.3 * abs(vy):
            return "falling" if vy > 0 else "rising"
        return None
    if spread_x < 0.03 and spread_y > 0.06:
        return "bouncing" if _bounces(y, t) else None
    if max(spread_x, spread_y) > 0.03:
        reach = np.hypot(x0 - 0.5, y0 - 0.5)
        rate, coherence = _rate(np.arctan2(0.5 - y0, x0 - 0.5), t, 8.0)
        near = abs(float(np.median(reach)) - sprites.ORBIT_RADIUS) < 0.08 and reach.std() < 0.06
        return "orbiting" if near and coherence > _COHERENCE and 1.0 < rate < 4.5 else None

    low, high = sprites.RADIUS_RANGE[count]
    turn = 2 * math.pi / math.log(high / low)
    log_radius = np.log(blobs.gyration[blob])
    rate, coherence = _rate(turn * log_radius, t, 12.0)
    growth = rate / turn
    if log_radius.std() > 0.12:
        if coherence < _COHERENCE or not 0.5 < abs(growth) / sprites.GROWTH_PER_S < 1.8:
            return None
        return "growing" if growth > 0 else "shrinking"
    if shape is None:
        return None
    if shape in STILL_SHAPES:
        return "spinning"
    phase, order = _angles(contrast, blobs, blob, shape)
    rate, coherence = _rate(phase, t, 6.0 * order)
    return "spinning" if coherence > _COHERENCE and 1.0 < rate / order < 4.0 else None
