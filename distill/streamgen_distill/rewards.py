"""Rewards of generated video, and what they do to a distillation loss (Reward Forcing, arXiv 2512.04678).

A reward is a number per clip that nothing is differentiated through: Re-DMD multiplies a clip's distribution matching
loss by exp(beta r), so that good samples pull harder. Plain distribution matching loses motion over time, because a
still clip is an easy clip; a reward for motion pays for it.

Letters: B clips, T pixel frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamgen.worlds import checker, grammar

STATIC = ("count", "color", "shape", "background")


class Reward(Protocol):
    """Scores clips: uint8 [B, T, H, W, 3] with a caption each -> float32 [B], in [0, 1]; higher is better."""

    def __call__(self, frames_BTHWC: Tensor, captions: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckerReward:
    """The world's checker as a judge: is the motion the caption's, and how much of the rest is right?

    r = motion_weight [motion right] + (1 - motion_weight) share of count, color, shape and background that are right.
    """

    fps: float = 16.0
    motion_weight: float = 0.5

    def __call__(self, frames_BTHWC: Tensor, captions: Sequence[str]) -> Tensor:
        if len(frames_BTHWC) != len(captions):
            raise ValueError(f"{len(frames_BTHWC)} clips and {len(captions)} captions; give one caption per clip")
        return torch.tensor([self._one(clip, text) for clip, text in zip(frames_BTHWC, captions, strict=True)])

    def _one(self, frames_THWC: Tensor, text: str) -> float:
        right = checker.obeys(checker.check(frames_THWC, self.fps), grammar.parse(text))
        rest = sum(right[attribute] for attribute in STATIC) / len(STATIC)
        return self.motion_weight * right["motion"] + (1 - self.motion_weight) * rest


def reward_weight(reward_B: Tensor, beta: float) -> Tensor:
    """exp(beta r) per clip (Reward Forcing; its paper writes exp(r / beta)): [B], 1 for beta = 0."""
    return torch.exp(beta * reward_B)
