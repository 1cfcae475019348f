"""Training clips of the sprites world, as a stream would hold them: blocks of frames, each under its own prompt.

A batch is one of three kinds:
    single   one block from nothing: what the first block of a stream must do
    story    consecutive blocks, in many clips with a change of prompt at a block's edge
    gap      a first block (the sink) from long ago, perhaps of another scene, then consecutive blocks:
             what a stream sees minutes later, when the sink is old and the window has moved on
Letters: B clips, G blocks, T pixel frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from streamgen.geometry import VideoGeometry
from streamgen.worlds import sprites
from streamgen.worlds.grammar import WHOLE, Caption, Part
from streamgen_train.data import pick_captions

Kind = Literal["single", "story", "gap"]


@dataclass(slots=True)
class Clips:
    """Video [B, T, 3, h, w] in [-1, 1], the caption of each block [B][G], and where the video starts anew."""

    video: Tensor
    captions: list[list[Caption]]
    lead_frames: int
    """Frames at the front of the second piece that only the codec's state sees (kind 'gap'), else 0."""
    kind: Kind


def make_clips(
    kind: Kind,
    count: int,
    blocks: int,
    geometry: VideoGeometry,
    rng: torch.Generator,
    switch_share: float,
    paint: sprites.Painter | None = None,
    part: Part = WHOLE,
) -> Clips:
    """Render `count` clips of `blocks` blocks; in a share of the longer ones the prompt changes once."""
    first = pick_captions(count, rng, part=part)
    frames, fps, side = geometry.block_pixel_frames(0), geometry.fps, geometry.height
    if kind == "single":
        video = sprites.render(sprites.sample_scenes(first, rng), frames, fps=fps, side=side, paint=paint)
        return Clips(video, [[c] for c in first], 0, kind)
    if kind == "story":
        video, captions = _story(first, blocks, geometry, rng, switch_share, 0, paint, part)
        return Clips(video, captions, 0, kind)
    # The codec sees the frames before a block, so the later piece begins one latent frame early.
    lead = geometry.temporal_stride
    others, stays = pick_captions(count, rng, part=part), _coin(count, rng)
    later = [c if stay else other for c, other, stay in zip(first, others, stays, strict=True)]
    sink = sprites.render(sprites.sample_scenes(first, rng), frames, fps=fps, side=side, paint=paint)
    video, captions = _story(later, blocks - 1, geometry, rng, switch_share, lead, paint, part)
    return Clips(torch.cat([sink, video], 1), [[c, *rest] for c, rest in zip(first, captions, strict=True)], lead, kind)


def _coin(count: int, rng: torch.Generator, share: float = 0.5) -> list[bool]:
    return (torch.rand(count, generator=rng) < share).tolist()


def _story(
    first: list[Caption],
    blocks: int,
    geometry: VideoGeometry,
    rng: torch.Generator,
    switch_share: float,
    lead: int,
    paint: sprites.Painter | None,
    part: Part,
) -> tuple[Tensor, list[list[Caption]]]:
    count, per_block = len(first), geometry.block_pixel_frames(0)
    total = lead + blocks * per_block
    second = pick_captions(count, rng, part=part)
    at_block = torch.randint(1, max(blocks, 2), (count,), generator=rng)
    at_block[~torch.tensor(_coin(count, rng, switch_share))] = blocks  # never
    start = torch.where(at_block < blocks, lead + at_block * per_block, total)
    video = sprites.render_switched(
        [first, second],
        [torch.zeros(count, dtype=torch.long), start],
        total,
        rng,
        fps=geometry.fps,
        side=geometry.height,
        paint=paint,
    )
    captions = [
        [a if block < at else b for block in range(blocks)]
        for a, b, at in zip(first, second, at_block.tolist(), strict=True)
    ]
    return video, captions
