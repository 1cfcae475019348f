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

import numpy as np
import torch
from torch import Tensor

from streamgen.worlds import sprites
from streamgen.worlds.regions import (
    MIN_FRAMES,
    Array,
    Blobs,
    backdrop_of,
    find_blobs,
    flicker,
    foreground,
    per_frame,
    planar,
    share_of_both,
    tracks,
    wrap,
)

SIZELESS_MOTIONS = (
    "growing",
    "shrinking",
)  # their radius runs through the whole range: no size to read
STILL_SHAPES = ("circle", "ring")  # spinning, they look still
PRESENCE_SHARE, BOTH_SHARE = 0.90, 0.85

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
    video = planar(frames_rgb_u8)
    name, backdrop = backdrop_of(video)
    if name is None:
        return Reading()
    video -= flicker(video, backdrop)
    mask, contrast = foreground(video, backdrop)
    blobs = find_blobs(mask, contrast)
    number, slots = per_frame(blobs, len(mask))
    presence = float((number > 0).mean())
    both = share_of_both(number, slots, blobs)
    if (number > 0).sum() < MIN_FRAMES:
        return Reading(background=name, presence=presence, both=both)

    median = int(np.median(number[number > 0]))
    count = {1: "a", 2: "two"}.get(median)
    slots = tracks(slots, number, blobs, 2 if count == "two" else 1)
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


# Colour and shape


def _color(video: Array, contrast: Array, blobs: Blobs, shown: Array) -> str | None:
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


def _polar(contrast: Array, blobs: Blobs, which: Array) -> Array:
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


def _shape(contrast: Array, blobs: Blobs, shown: Array) -> tuple[str | None, float]:
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


def _angles(contrast: Array, blobs: Blobs, which: Array, shape: str) -> tuple[Array, int]:
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


def _motion(contrast: Array, blobs: Blobs, track: Array, count: str, shape: str | None, fps: float) -> str | None:
    """Motion of one sprite from its blobs [T] (-1: not seen)."""
    seen = np.nonzero(track >= 0)[0]
    if len(seen) < MIN_FRAMES:
        return None
    t, blob = seen / fps, track[seen]
    x0, y0 = blobs.x[blob], blobs.y[blob]
    x, y = (v[0] + np.concatenate([[0.0], np.cumsum(wrap(np.diff(v)))]) for v in (x0, y0))
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
