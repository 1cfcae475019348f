"""The pictures of the sprites world: backgrounds, shapes by their signed distance, and frames painted from both.

Lengths are fractions of the frame's side and y points down, so that any square size works. Letters: N frames,
P sprites (always 2; the second may be hidden).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from streamgen.worlds.grammar import BACKGROUNDS

Painter = Callable[..., Tensor]  # of the signature of `paint_frames`

RIM_WIDTH, RIM_DARKENING = 0.025, 0.55

# Lengths of the shapes, in radii: half side, apothem, ring's middle and half width, star's tips and dents.
SQUARE_HALF, TRIANGLE_APOTHEM, RING_MIDDLE, RING_HALF = 0.80, 0.56, 0.78, 0.22
STAR_TIP, STAR_DENT = 1.12, 0.52
SHAPE_EXTENT = 1.14  # the farthest point of any shape


def background_image(name: str, side: int) -> Tensor:
    """The still background `name` as float [3, side, side] in 0..255."""
    centre = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    y, x = centre[:, None].expand(side, side), centre[None, :].expand(side, side)

    def flat(*rgb: int) -> Tensor:
        return torch.tensor(rgb, dtype=torch.float32)[:, None, None].expand(3, side, side)

    def split(above: Tensor, below: Tensor, edge: Tensor) -> Tensor:
        below_part = ((y - edge) * side + 0.5).clamp(0, 1)
        return above + (below - above) * below_part

    if name == "black":
        return flat(8, 8, 10).clone()
    if name == "navy":
        return flat(12, 20, 70) * (1 + 0.35 * y)
    if name == "sunset":
        return flat(70, 30, 90) + (flat(250, 130, 60) - flat(70, 30, 90)) * y
    if name == "grass":
        edge = 0.55 + 0.06 * torch.sin(2 * math.pi * x)
        return split(flat(110, 175, 225), flat(30, 95, 35), edge)
    if name == "snow":
        edge = 0.70 + 0.05 * torch.cos(2 * math.pi * x)
        return split(flat(150, 165, 190), flat(205, 215, 228), edge)
    raise ValueError(f"background is {name!r}; allowed: {', '.join(BACKGROUNDS)}")


@lru_cache(maxsize=4)
def background_bank(side: int) -> Tensor:
    return torch.stack([background_image(name, side) for name in BACKGROUNDS])


def signed_distance(x: Tensor, y: Tensor, radius: Tensor, angle: Tensor, shape: Tensor) -> Tensor:
    """Signed distance (negative inside) of points to shapes centred at the origin.

    x, y: coordinates, y down, any shape [..., h, w]; radius, angle (clockwise on the screen) and shape
    (index into SHAPES): [...]. Distances have the unit of `radius`; outside of corners they are to the edge's line.
    """
    r, c, s, kind = (v[..., None, None] for v in (radius, torch.cos(angle), torch.sin(angle), shape))
    # The shape's own axes, y up; every shape is its own mirror image, so one half plane is enough.
    u, v = (x * c + y * s).abs(), x * s - y * c
    rho = torch.sqrt(x * x + y * y)
    circle = rho - r
    ring = (rho - RING_MIDDLE * r).abs() - RING_HALF * r
    square = torch.maximum(u, v.abs()) - SQUARE_HALF * r
    triangle = torch.maximum(u * math.cos(math.pi / 6) + v * 0.5, -v) - TRIANGLE_APOTHEM * r
    star = _star_distance(u, v, r)
    d = torch.where(kind == 1, square, torch.where(kind == 2, triangle, torch.where(kind == 3, star, circle)))
    return torch.where(kind == 4, ring, d)


def _star_distance(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Two mirrors fold the right half plane (u >= 0) into the upper tip's sector; there one edge's line is left."""
    sin, cos = math.sin(math.pi / 5), math.cos(math.pi / 5)
    beyond = (u * cos - v * sin).clamp(min=0.0)  # the line through the dent on the right of the upper tip
    u, v = u - 2 * beyond * cos, v + 2 * beyond * sin
    beyond = (-u * cos - v * sin).clamp(min=0.0)  # and through the one on its left
    u, v = (u + 2 * beyond * cos).abs(), v + 2 * beyond * sin
    edge_u, edge_v = STAR_DENT * sin, STAR_DENT * cos - STAR_TIP
    length = math.hypot(edge_u, edge_v)
    return (-edge_v * u + edge_u * (v - STAR_TIP * r)) / length


def around(x: Tensor) -> Tensor:
    """To [-0.5, 0.5): the shortest way around the frame."""
    return x - torch.floor(x + 0.5)


def paint_frames(
    backgrounds: Tensor,
    background: Tensor,
    centre: Tensor,
    radius: Tensor,
    angle: Tensor,
    shape: Tensor,
    count: Tensor,
    colors: Tensor,
) -> Tensor:
    """N frames [N, 3, side, side]: anti-aliased sprites over the backgrounds, around the frame's edge."""
    side = backgrounds.shape[-1]
    pixel = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    frames = backgrounds[background]
    for sprite in range(2):
        x = around(pixel - centre[:, sprite, :1])[:, None, :]
        y = around(pixel - centre[:, sprite, 1:])[:, :, None]
        d = signed_distance(x, y, radius, angle, shape)
        alpha = (0.5 - d * side).clamp(0, 1)
        if sprite == 1:
            alpha = alpha * (count == 1).float()[:, None, None]
        shade = 1 - RIM_DARKENING * (1 + d / RIM_WIDTH).clamp(0, 1)
        paint = colors[:, :, None, None] * shade[:, None]
        frames = frames + (paint - frames) * alpha[:, None]
    return frames * (2 / 255) - 1
