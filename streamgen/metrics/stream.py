"""STREAM: generated against real clips, in time (STREAM-T) and in space (STREAM-F, STREAM-D), at any length of clip.

Kim, Kim and Yoo, "STREAM: Spatio-TempoRal Evaluation and Analysis Metric for Video Generative Models" (ICLR 2024,
arXiv 2403.09669). Every frame of a clip becomes D features; a Fourier transform along time gives each feature's
amplitude at frequencies 0 to T / 2. The amplitude at 0 is the clip's mean look (its sign is kept here), the rest is how
it moves.

STREAM-T: a power law is fitted to a feature's amplitudes over frequencies 1 to T / 2; its skewness is the clip's
temporal statistic of this feature. STREAM-T is the correlation of the histograms of these skewnesses over real and
over generated clips, mean over features (the paper's figure 1). It is about 0 for motion of another kind.
STREAM-F (fidelity) is the share of generated mean looks within the support of the real ones, STREAM-D (diversity) the
share of real ones within the support of the generated.

Where the paper leaves room, or its code differs, this is what is done here: the skewness is the third standardised
moment of the normalised power law (the authors' code has other exponents); histograms have sqrt(n) bins, 4 to 50 (50
there, for thousands of clips), between the least and the greatest value of both sets; correlations are plain (squared
there); supports are unions of balls out to the fifth nearest neighbour, as in their code (Kynkaanniemi et al.,
"Improved Precision and Recall Metric for Assessing Generative Models", arXiv 1904.06991). Features are scaled by their
deviation over the real frames, so that none outweighs the others, and amplitudes below FLOOR of it count as FLOOR: a
feature that stands still has a flat spectrum and skewness 0.
Small sets do not reach 1: the score of a second real set is the ceiling to compare with.

Letters: B clips, T frames, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Features = Callable[[Array], Tensor]
"""Frames uint8 [B, T, H, W, 3] -> float [B, T, D]."""

NEIGHBOURS = 5
FLOOR = 1e-3
MIN_FRAMES = 8
_MIN_BINS, _MAX_BINS = 4, 50


def stream_scores(real_BTD: Tensor, made_BTD: Tensor) -> dict[str, float]:
    """Features of real and of generated clips -> 't' (STREAM-T), 'f' (STREAM-F) and 'd' (STREAM-D).

    All are at most 1, higher is better; 'f' and 'd' are at least 0. ValueError for fewer than two clips in a set,
    fewer than MIN_FRAMES frames, or sets of different T or D.
    """
    if real_BTD.shape[1:] != made_BTD.shape[1:]:
        raise ValueError(f"real clips are {list(real_BTD.shape[1:])} (T, D), generated ones {list(made_BTD.shape[1:])}")
    if min(len(real_BTD), len(made_BTD)) < 2 or real_BTD.shape[1] < MIN_FRAMES:
        raise ValueError(f"{len(real_BTD)} and {len(made_BTD)} clips of {real_BTD.shape[1]} frames; needed: 2 of 8")
    scale_D = real_BTD.double().flatten(0, 1).std(0)
    scale_D = torch.where(scale_D > 0, scale_D, torch.ones_like(scale_D))
    real, made = (clips.double() / scale_D for clips in (real_BTD, made_BTD))
    real_look, made_look = (clips.mean(1) for clips in (real, made))
    return {
        "t": _agreement(skewness(real).numpy(), skewness(made).numpy()),
        "f": _share_within(made_look, real_look),
        "d": _share_within(real_look, made_look),
    }


def skewness(clips_BTD: Tensor) -> Tensor:
    """Skewness [B, D] of the power law amplitude = a frequency^b that fits each feature's spectrum best, in logarithms.

    High where motion is slow and large, 0 where the spectrum is flat (frames in any order, or no motion at all).
    """
    t = clips_BTD.shape[1]
    frequency = torch.arange(1, t // 2 + 1, dtype=clips_BTD.dtype, device=clips_BTD.device)
    amplitude = 2 / t * torch.fft.rfft(clips_BTD, dim=1)[:, 1 : t // 2 + 1].abs()
    y = amplitude.clamp(min=FLOOR).log()
    x = frequency.log() - frequency.log().mean()
    exponent_BD = torch.einsum("f,bfd->bd", x, y) / x.square().sum()
    weight = (exponent_BD[:, None] * frequency.log()[:, None]).softmax(1)  # the power law, of sum 1 over frequencies
    mean = torch.einsum("f,bfd->bd", frequency, weight)
    away = frequency[:, None] - mean[:, None]
    variance = (weight * away.square()).sum(1)
    return (weight * away**3).sum(1) / variance.clamp(min=1e-12) ** 1.5


def _agreement(real_BD: Array, made_BD: Array) -> float:
    """Mean over features of the correlation of their histograms."""
    bins = min(max(round(min(len(real_BD), len(made_BD)) ** 0.5), _MIN_BINS), _MAX_BINS)
    found = []
    for real, made in zip(real_BD.T, made_BD.T, strict=True):
        low, high = min(real.min(), made.min()), max(real.max(), made.max())
        edges = (low - 1e-6, high + 1e-6)  # not empty where all values are the same
        a, b = (np.histogram(values, bins, edges)[0] / len(values) for values in (real, made))
        a, b = a - a.mean(), b - b.mean()
        norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
        found.append(float((a * b).sum()) / norm if norm > 0 else float(np.allclose(a, b)))
    return float(np.mean(found))


def _share_within(points: Tensor, others: Tensor) -> float:
    """Share of `points` [B, D] that lie within the ball around one of `others` out to its own fifth nearest neighbour.

    Sets too small for that take the farthest of their neighbours.
    """
    k = min(NEIGHBOURS, len(others) - 1)
    radius = torch.cdist(others, others).kthvalue(k + 1, dim=1).values  # the nearest one is the point itself
    return float((torch.cdist(points, others) <= radius).any(1).double().mean())


# Features


def random_conv(frames_BTHWC: Array) -> Tensor:
    """Default features: two convolutions and a projection with fixed random weights, D = 64. Nothing to download.

    Half of the first kernels sum to 0 and see edges and noise alone; the projection mixes all places, so that every
    feature changes when anything moves. Random networks tell sets apart by looks, not by meaning: scores compare with
    scores of the same features only, so the name (`FEATURES`) goes with them.
    """
    b, t = frames_BTHWC.shape[:2]
    first, second, projection = _weights()
    out = []
    with torch.inference_mode():
        for part in torch.from_numpy(frames_BTHWC).flatten(0, 1).split(256):
            x = F.adaptive_avg_pool2d(part.movedim(-1, 1).float() / 127.5 - 1, _SIDE)
            for weight in (first, second):
                x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
            out.append(x.flatten(1) @ projection)
    return torch.cat(out).unflatten(0, (b, t))


_SIDE = 64
_EDGES, _CHANNELS, _FEATURES = 16, 32, 64


@lru_cache(maxsize=1)
def _weights() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    first = torch.randn(_EDGES, 3, 3, 3, generator=rng) * (2 / 27) ** 0.5
    first[::2] -= first[::2].mean((2, 3), keepdim=True)
    second = torch.randn(_CHANNELS, _EDGES, 3, 3, generator=rng) * (2 / (9 * _EDGES)) ** 0.5
    inputs = _CHANNELS * (_SIDE // 4) ** 2
    return first, second, torch.randn(inputs, _FEATURES, generator=rng) * inputs**-0.5


DEFAULT_FEATURES = "random-conv-64"
FEATURES: dict[str, Features] = {DEFAULT_FEATURES: random_conv}
