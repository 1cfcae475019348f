"""The sprites world: procedural video of the captions of `grammar.py`, which can be read back from the pixels.

Lengths are fractions of the frame's side, times are seconds, y points down, so that any square size
and any frame rate works. Letters: B scenes, T frames, P sprites (always 2; the second may be hidden).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from streamgen.pixels import to_uint8
from streamgen.worlds.grammar import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    COUNTS,
    MOTIONS,
    SHAPES,
    SIZES,
    Caption,
    all_captions,
    captions,
    is_held_out,
    parse,
)
from streamgen.worlds.painting import (
    SHAPE_EXTENT,
    Painter,
    around,
    background_bank,
    background_image,
    paint_frames,
    signed_distance,
)

__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "COLORS",
    "COUNTS",
    "MOTIONS",
    "RADIUS",
    "RADIUS_RANGE",
    "SHAPES",
    "SHAPE_EXTENT",
    "SIZES",
    "Caption",
    "Painter",
    "Scenes",
    "Track",
    "all_captions",
    "background_image",
    "captions",
    "draw",
    "is_held_out",
    "paint_frames",
    "parse",
    "render",
    "render_switched",
    "sample_scenes",
    "signed_distance",
    "switch_scenes",
    "to_uint8",
    "track",
]

RADIUS = {("a", "large"): 0.19, ("two", "large"): 0.16, ("a", "small"): 0.11, ("two", "small"): 0.10}
RADIUS_RANGE = {"a": (0.08, 0.22), "two": (0.07, 0.16)}  # of growing and shrinking sprites
RADIUS_JITTER = 0.04
GROWTH_PER_S = 0.55
ORBIT_RADIUS = 0.23
FLOOR = 0.91
GRAVITY = 1.0  # apex of 0.32 to 0.5 at periods of 1.6 to 2.0 s: the sprite never leaves the frame
FOLLOW_PER_S = 1.2  # how fast size and position follow a change of prompt
TILT = 0.25
PAIR_DISTANCE = (0.45, 0.50)


@dataclass(slots=True)
class Scenes:
    """A batch of scenes as tensors: one segment of captions with its motion's parameters.

    Shapes: [B] unless noted. Positions are sprite centres at the segment's start.
    """

    count: Tensor  # 0: one, 1: two
    size: Tensor
    color: Tensor
    shape: Tensor
    motion: Tensor
    background: Tensor
    position: Tensor  # [B, P, 2] ideal centre (x, y) at the start of the segment
    position_offset: Tensor  # [B, P, 2] shown minus ideal at the start; decays at FOLLOW_PER_S
    radius: Tensor  # ideal radius at the start
    radius_offset: Tensor
    angle: Tensor
    speed: Tensor  # of the straight motions, per s
    orbit_phase: Tensor  # [B, P]
    orbit_rate: Tensor
    bounce_phase: Tensor  # s since the last bounce
    bounce_period: Tensor
    spin_rate: Tensor

    def __len__(self) -> int:
        return self.count.shape[0]


@dataclass(slots=True)
class Track:
    """What is on the screen, per frame: centres [B, T, P, 2], radius and angle [B, T], and indices [B, T]."""

    centre: Tensor
    radius: Tensor
    angle: Tensor
    count: Tensor
    color: Tensor
    shape: Tensor
    background: Tensor


def _index(items: Sequence[str], values: Sequence[str]) -> Tensor:
    return torch.tensor([items.index(v) for v in values])


def _uniform(rng: torch.Generator | None, low: float | Tensor, high: float | Tensor, *shape: int) -> Tensor:
    return low + (torch.as_tensor(high) - low) * torch.rand(*shape, generator=rng)


def sample_scenes(items: Sequence[Caption], rng: torch.Generator | None = None) -> Scenes:
    """Draw positions, speeds and phases for `items`; all randomness comes from `rng`."""
    b = len(items)
    count = _index(COUNTS, [c.count for c in items])
    motion = _index(MOTIONS, [c.motion for c in items])
    two = count == 1
    target = torch.tensor([RADIUS[c.count, c.size] for c in items])
    radius = target * _uniform(rng, 1 - RADIUS_JITTER, 1 + RADIUS_JITTER, b)
    scale = torch.isin(motion, torch.tensor([6, 7]))
    reach = torch.where(scale, _radius_range(count)[1], radius) * SHAPE_EXTENT
    # Straight motions wrap, so the coordinate along them is free; the other one keeps the frame's edge.
    free = torch.rand(b, 2, generator=rng)
    centre = reach[:, None] + (1 - 2 * reach[:, None]) * free
    along = _along(motion)
    centre = torch.where(along > 0, free, centre)
    axis = _pair_axis(motion)
    gap = _uniform(rng, *PAIR_DISTANCE, b) / 2
    jitter = (0.5 - gap - reach).clamp(min=0.0)
    middle = 0.5 + jitter * _uniform(rng, -1.0, 1.0, b)
    pair_centre = torch.where(axis > 0, middle[:, None], centre)
    first = torch.where(two[:, None], pair_centre - axis * gap[:, None], centre)
    second = torch.where(two[:, None], pair_centre + axis * gap[:, None], centre)
    phase = _uniform(rng, 0.0, 2 * math.pi, b)
    period = _uniform(rng, 1.6, 2.0, b)
    return Scenes(
        count=count,
        size=_index(SIZES, [c.size for c in items]),
        color=_index(tuple(COLORS), [c.color for c in items]),
        shape=_index(SHAPES, [c.shape for c in items]),
        motion=motion,
        background=_index(BACKGROUNDS, [c.background for c in items]),
        position=torch.stack([first, second], 1),
        position_offset=torch.zeros(b, 2, 2),
        radius=radius,
        radius_offset=torch.zeros(b),
        angle=_uniform(rng, -TILT, TILT, b),
        speed=_uniform(rng, 0.25, 0.40, b),
        orbit_phase=torch.stack([phase, phase + math.pi], 1),
        orbit_rate=_uniform(rng, 1.8, 2.8, b),
        bounce_phase=torch.rand(b, generator=rng) * period,
        bounce_period=period,
        spin_rate=_uniform(rng, 1.6, 2.4, b),
    )


def _along(motion: Tensor) -> Tensor:
    """[B, 2]: 1 on the axis along which a straight motion runs."""
    horizontal, vertical = motion <= 1, (motion == 2) | (motion == 3)
    return torch.stack([horizontal, vertical], 1).float()


def _pair_axis(motion: Tensor) -> Tensor:
    """[B, 2]: the axis on which two sprites stand apart: y for horizontal motions, x for the others."""
    horizontal = (motion <= 1).float()
    return torch.stack([1 - horizontal, horizontal], 1)


def _radius_range(count: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.where(count == 1, RADIUS_RANGE["two"][0], RADIUS_RANGE["a"][0])
    return low, torch.where(count == 1, RADIUS_RANGE["two"][1], RADIUS_RANGE["a"][1])


def _decay(offset: Tensor, t: Tensor) -> Tensor:
    """A difference that shrinks towards zero by FOLLOW_PER_S; offset [B, ...], t [T] -> [B, T, ...]."""
    t = t.view(1, -1, *([1] * (offset.dim() - 1)))
    value = offset[:, None]
    return value.sign() * (value.abs() - FOLLOW_PER_S * t).clamp(min=0.0)


def track(scenes: Scenes, t: Tensor) -> Track:
    """Where everything is at times t [T] (seconds after the segment's start)."""
    m, b, n = scenes.motion, len(scenes), t.shape[0]
    time = t[None, :]
    direction = torch.zeros(b, 2)
    for index, vector in enumerate(((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))):
        direction[m == index] = torch.tensor(vector)
    step = direction[:, None, None] * (scenes.speed[:, None] * time)[..., None, None]
    centre = scenes.position[:, None] + step

    tau = torch.remainder(scenes.bounce_phase[:, None] + time, scenes.bounce_period[:, None])
    height = 0.5 * GRAVITY * tau * (scenes.bounce_period[:, None] - tau)
    bounce_y = FLOOR - scenes.radius[:, None] - height
    bouncing = (m == 4)[:, None, None]
    y = torch.where(bouncing, bounce_y[..., None], centre[..., 1])

    phase = scenes.orbit_phase[:, None] + (scenes.orbit_rate[:, None] * time)[..., None]
    orbiting = (m == 5)[:, None, None]
    x = torch.where(orbiting, 0.5 + ORBIT_RADIUS * torch.cos(phase), centre[..., 0])
    y = torch.where(orbiting, 0.5 - ORBIT_RADIUS * torch.sin(phase), y)
    centre = torch.stack([x, y], -1) + _decay(scenes.position_offset, t)

    low, high = (v[:, None] for v in _radius_range(scenes.count))
    sign = torch.where(m == 6, 1.0, -1.0)[:, None]
    log_radius = torch.log(scenes.radius[:, None] / low) + sign * GROWTH_PER_S * time
    saw = low * torch.exp(torch.remainder(log_radius, torch.log(high / low)))
    radius = torch.where(((m == 6) | (m == 7))[:, None], saw, scenes.radius[:, None].expand(b, n))
    radius = (radius + _decay(scenes.radius_offset, t)).clamp(min=0.02)
    angle = scenes.angle[:, None] + torch.where((m == 8)[:, None], scenes.spin_rate[:, None] * time, 0.0)

    def still(v: Tensor) -> Tensor:
        return v[:, None].repeat(1, n)

    return Track(
        torch.remainder(centre, 1.0),
        radius,
        angle,
        still(scenes.count),
        still(scenes.color),
        still(scenes.shape),
        still(scenes.background),
    )


def switch_scenes(before: Scenes, after_s: Tensor, items: Sequence[Caption], rng: torch.Generator | None) -> Scenes:
    """Scenes of new captions that go on from where `before` stands `after_s` [B] seconds into it.

    Position and phase are kept where the new motion allows; what it does not allow is caught up with at
    FOLLOW_PER_S, as the size is.
    """
    new = sample_scenes(items, rng)
    b = len(new)
    shown = _at(before, after_s)
    centre, radius = shown.centre[:, 0], shown.radius[:, 0]
    new.angle = shown.angle[:, 0]
    grows = (new.motion == 6) | (new.motion == 7)
    low, high = _radius_range(new.count)
    new.radius = torch.where(grows, radius.clamp(min=low * 1.001, max=high * 0.999), new.radius)
    new.radius_offset = radius - new.radius

    reach = (torch.where(grows, high, new.radius) * SHAPE_EXTENT)[:, None]
    along, axis = _along(new.motion), _pair_axis(new.motion)
    two = (new.count == 1)[:, None]
    inside = centre[:, 0].clamp(min=reach, max=1 - reach)
    anchor = torch.where(along > 0, centre[:, 0], inside)
    gap = (new.position[:, 1] - new.position[:, 0]).abs().sum(1, keepdim=True)
    middle = new.position.mean(1)
    side = torch.where(((centre[:, 0] - 0.5) * axis).sum(1, keepdim=True) < 0, -1.0, 1.0)
    pair = torch.where(axis > 0, middle + side * axis * gap / 2, anchor)
    first = torch.where(two, pair, anchor)
    second = torch.where(two, pair - side * axis * gap, anchor)
    new.position = torch.stack([first, second], 1)

    phase = torch.atan2(0.5 - centre[:, 0, 1], centre[:, 0, 0] - 0.5)
    new.orbit_phase = torch.stack([phase, phase + math.pi], 1)
    apex = 0.125 * GRAVITY * new.bounce_period**2
    height = (FLOOR - new.radius - centre[:, 0, 1]).clamp(min=torch.zeros(b), max=apex)
    fall = torch.sqrt((new.bounce_period**2 / 4 - 2 * height / GRAVITY).clamp(min=0.0))
    new.bounce_phase = new.bounce_period / 2 + fall

    ideal = track(new, torch.zeros(1)).centre[:, 0]
    offset = around(centre - ideal)
    had_two = (before.count == 1)[:, None]
    offset[:, 1] = torch.where(had_two & two, offset[:, 1], torch.zeros_like(offset[:, 1]))
    new.position_offset = offset
    return new


def _at(scenes: Scenes, when_s: Tensor) -> Track:
    """The track at one time per scene: `track` is evaluated at each distinct time and gathered."""
    times, inverse = torch.unique(when_s, return_inverse=True)
    full = track(scenes, times)
    rows = torch.arange(len(scenes))
    return Track(*(getattr(full, f.name)[rows, inverse][:, None] for f in fields(Track)))


def render(
    scenes: Scenes,
    num_frames: int,
    *,
    fps: float = 16.0,
    side: int = 64,
    start_s: float = 0.0,
    paint: Painter | None = None,
) -> Tensor:
    """Draw `num_frames` frames as float32 [B, T, 3, side, side] in [-1, 1]."""
    t = start_s + torch.arange(num_frames, dtype=torch.float32) / fps
    return draw(track(scenes, t), side, paint)


def render_switched(
    segments: Sequence[Sequence[Caption]],
    starts_frames: Sequence[Tensor],
    num_frames: int,
    rng: torch.Generator | None,
    *,
    fps: float = 16.0,
    side: int = 64,
    paint: Painter | None = None,
) -> Tensor:
    """Draw clips whose prompts change: segment k of scene b begins at frame starts_frames[k][b].

    starts_frames[0] must be zeros; float32 [B, T, 3, side, side] in [-1, 1].
    """
    frame = torch.arange(num_frames)
    scenes = sample_scenes(segments[0], rng)
    out = track(scenes, frame / fps)
    for items, start, previous in zip(segments[1:], starts_frames[1:], starts_frames[:-1], strict=True):
        scenes = switch_scenes(scenes, (start - previous) / fps, items, rng)
        for value in torch.unique(start).tolist():
            rows = start == value
            if value >= num_frames:
                continue
            late = track(scenes, frame[value:].sub(value) / fps)
            for f in fields(Track):
                getattr(out, f.name)[rows, value:] = getattr(late, f.name)[rows]
    return draw(out, side, paint)


def draw(what: Track, side: int, paint: Painter | None = None) -> Tensor:
    """Rasterise a track: float32 [B, T, 3, side, side] in [-1, 1]. `paint`: a compiled `paint_frames`, for training."""
    b, n = what.radius.shape
    flat = Track(*(getattr(what, f.name).flatten(0, 1) for f in fields(Track)))
    colors = torch.tensor(list(COLORS.values()), dtype=torch.float32)[flat.color]
    frames = (paint or paint_frames)(
        background_bank(side), flat.background, flat.centre, flat.radius, flat.angle, flat.shape, flat.count, colors
    )
    return frames.view(b, n, 3, side, side)
