"""STREAM tells time from space: each kind of damage lowers the score that it should lower, and no other."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from streamgen.metrics.stream import (
    DEFAULT_FEATURES,
    FEATURES,
    FLOOR,
    random_conv,
    skewness,
    stream_scores,
)
from streamgen.worlds import sprites

CLIPS, FRAMES = 48, 32


@pytest.fixture(scope="module")
def videos() -> tuple[np.ndarray, np.ndarray]:
    """The same captions, rendered twice."""
    captions = random.Random(0).sample(sprites.captions("heldout"), CLIPS)
    first, second = (
        sprites.render(sprites.sample_scenes(captions, torch.Generator().manual_seed(seed)), FRAMES) for seed in (0, 1)
    )
    return sprites.to_uint8(first).numpy(), sprites.to_uint8(second).numpy()


@pytest.fixture(scope="module")
def real(videos: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
    return random_conv(videos[0])


@pytest.fixture(scope="module")
def other(videos: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
    return random_conv(videos[1])


def test_identical_sets_score_one_and_other_real_video_nearly(real: torch.Tensor, other: torch.Tensor) -> None:
    assert stream_scores(real, real) == pytest.approx({"t": 1, "f": 1, "d": 1})
    scores = stream_scores(real, other)
    assert min(scores.values()) > 0.6


def test_frames_in_another_order_lower_t_alone(real: torch.Tensor, other: torch.Tensor) -> None:
    rng = torch.Generator().manual_seed(0)
    shuffled = torch.stack([clip[torch.randperm(FRAMES, generator=rng)] for clip in other])
    before, after = stream_scores(real, other), stream_scores(real, shuffled)
    assert after["t"] < 0.2 < before["t"] - 0.4
    assert (after["f"], after["d"]) == (before["f"], before["d"])


def test_frozen_video_lowers_t(real: torch.Tensor, other: torch.Tensor) -> None:
    assert stream_scores(real, other[:, :1].expand(-1, FRAMES, -1))["t"] < 0.2


def test_half_the_speed_lowers_t(real: torch.Tensor, other: torch.Tensor) -> None:
    slow = other[:, : FRAMES // 2].repeat_interleave(2, 1)
    assert stream_scores(real, slow)["t"] < stream_scores(real, other)["t"] - 0.3


def test_noise_lowers_fidelity_and_diversity(videos: tuple[np.ndarray, np.ndarray], real: torch.Tensor) -> None:
    rng = np.random.default_rng(0)
    noisy = np.clip(videos[1] + rng.normal(0, 30, videos[1].shape), 0, 255).astype(np.uint8)
    before, after = stream_scores(real, random_conv(videos[1])), stream_scores(real, random_conv(noisy))
    assert after["f"] < before["f"] - 0.2 and after["d"] < before["d"] - 0.2


def test_few_modes_lower_diversity_alone(real: torch.Tensor, other: torch.Tensor) -> None:
    before, after = stream_scores(real, other), stream_scores(real, other[torch.arange(CLIPS) % 6])
    assert after["d"] < 0.1 and after["f"] >= before["f"] - 0.1


def test_skewness_is_that_of_the_power_law() -> None:
    t, frequency = 64, torch.arange(1, 33, dtype=torch.float64)
    time = torch.arange(t, dtype=torch.float64)
    for exponent in (-2.0, -1.0, 0.0):
        amplitude = 10 * frequency**exponent
        amplitude[-1] /= 2  # the last frequency is its own mirror image
        waves = torch.cos(2 * torch.pi * frequency[:, None] * time / t)
        found = skewness((amplitude[:, None] * waves).sum(0)[None, :, None])
        weight = frequency**exponent / (frequency**exponent).sum()
        mean = (weight * frequency).sum()
        spread = (weight * (frequency - mean) ** 2).sum()
        expected = (weight * (frequency - mean) ** 3).sum() / spread**1.5
        assert float(found) == pytest.approx(float(expected), abs=1e-6)
    assert float(skewness(torch.full((1, t, 1), 5.0).double())) == pytest.approx(0, abs=1e-9)
    less = FLOOR / 100 * torch.cos(2 * torch.pi * time / t)
    assert float(skewness(less[None, :, None])) == pytest.approx(0, abs=1e-9)


def test_features_are_the_same_every_time_and_bear_other_sizes(videos: tuple[np.ndarray, np.ndarray]) -> None:
    some = videos[0][:2, :9]
    features = FEATURES[DEFAULT_FEATURES](some)
    assert features.shape == (2, 9, 64) and torch.equal(features, random_conv(some))
    assert torch.allclose(features[1:], random_conv(some[1:]), atol=1e-5)
    larger = some.repeat(2, 2).repeat(2, 3)
    assert torch.allclose(random_conv(larger), features, atol=1e-4)


def test_sets_that_cannot_be_compared_are_refused(real: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"\[32, 64\].*\[16, 64\]"):
        stream_scores(real, real[:, :16])
    with pytest.raises(ValueError, match="1 clips"):
        stream_scores(real, real[:1])
    assert stream_scores(real[:3], real[:3]) == pytest.approx({"t": 1, "f": 1, "d": 1})
