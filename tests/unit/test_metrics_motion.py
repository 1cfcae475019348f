"""Motion read from pixels is the motion that was drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from streamgen.metrics.motion import Motion, follow, motion_of, motion_report
from streamgen.worlds import sprites
from streamgen.worlds.sprites import parse


def scenes_of(text: str, count: int = 4) -> sprites.Scenes:
    return sprites.sample_scenes([parse(text)] * count, torch.Generator().manual_seed(3))


def clips_of(scenes: sprites.Scenes, frames: int = 48) -> list[np.ndarray]:
    return list(sprites.to_uint8(sprites.render(scenes, frames)).numpy())


@pytest.mark.parametrize("word", ["moving left", "falling"])
@pytest.mark.parametrize("count", ["a large red square", "two small white circles"])
def test_straight_motion_has_the_speed_drawn_also_across_the_edge(count: str, word: str) -> None:
    scenes = scenes_of(f"{count} {word} over a navy background")
    for clip, speed in zip(clips_of(scenes), scenes.speed.tolist(), strict=True):
        found = motion_of(clip)
        assert found.speed == pytest.approx(speed, abs=0.01)
        assert found.moving and found.tracked > 0.9 and found.growth < 0.1
        assert found.jerk < 8  # the truth is 0; a tenth of a pixel of shaking would be 25


def test_orbits_have_the_speed_of_a_circle() -> None:
    scenes = scenes_of("a small green ring orbiting over a black background")
    for clip, rate in zip(clips_of(scenes), scenes.orbit_rate.tolist(), strict=True):
        found = motion_of(clip)
        assert found.speed == pytest.approx(sprites.ORBIT_RADIUS * rate, rel=0.05)


def test_jerk_is_the_third_difference() -> None:
    """Of a square that jumps a whole number of pixels to and fro: 2 px, 8 px after three differences."""
    clip = np.full((32, 64, 64, 3), (8, 8, 10), np.uint8)
    for t in range(32):
        clip[t, 20:40, 20 + 2 * (t % 2) : 40 + 2 * (t % 2)] = (230, 40, 40)
    assert motion_of(clip).jerk == pytest.approx(8 / 64 * 16**3, rel=0.02)
    assert motion_of(clip, fps=8.0).jerk == pytest.approx(8 / 64 * 8**3, rel=0.02)


def test_growing_moves_by_its_size_and_spinning_does_not_move() -> None:
    grows = motion_of(clips_of(scenes_of("a large red circle growing over a snow background"))[0])
    assert grows.speed < 0.02 and grows.moving
    assert grows.growth == pytest.approx(sprites.GROWTH_PER_S, rel=0.1)
    spins = motion_of(clips_of(scenes_of("a large red star spinning over a snow background"))[0])
    assert not spins.moving and spins.speed < 0.02


def test_shaking_shows_as_jerk_and_stillness_as_nothing() -> None:
    clip = clips_of(scenes_of("a large blue circle moving right over a grass background"))[0]
    steady = motion_of(clip)
    rng = np.random.default_rng(0)
    shaken = np.stack([np.roll(frame, rng.integers(-1, 2, 2), (0, 1)) for frame in clip])
    # Horizontal shaking of what moves by a third of a pixel a frame: the background shakes with it and stays grass.
    assert motion_of(shaken).jerk > 10 * steady.jerk
    still = motion_of(clip[:1].repeat(48, 0))
    assert (still.speed, still.growth, still.jerk, still.moving) == (0, 0, 0, False)


def test_what_cannot_be_followed_counts_as_not_moving() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 64, 3)).astype(np.uint8)
    lost = motion_of(noise)
    assert math.isnan(lost.speed) and lost.tracked == 0 and not lost.moving
    place, size = follow(noise)
    assert place.shape == (48, 1, 2) and np.isnan(size).all()
    report = motion_report([lost, Motion(0.3, 0.0, 2.0, 1.0), Motion(0.4, 0.0, 4.0, 1.0)])
    assert report["speed"] == 0.3 and report["jerk"] == 2.0 and report["n"] == 3
    assert report["moving"] == pytest.approx(2 / 3) and report["tracked"] == pytest.approx(2 / 3)
    low, high = report["intervals"]["moving"]
    assert low < 2 / 3 < high


def test_a_sprite_that_is_gone_for_a_while_is_found_again() -> None:
    scenes = scenes_of("a large red square moving left over a navy background", 1)
    clip = clips_of(scenes)[0]
    clip[20:26] = sprites.background_image("navy", 64).round().byte().permute(1, 2, 0).numpy()
    found = motion_of(clip)
    assert found.tracked == pytest.approx(42 / 48) and found.speed == pytest.approx(float(scenes.speed[0]), abs=0.01)
