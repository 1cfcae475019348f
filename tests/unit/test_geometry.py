"""Geometry against counting one frame at a time."""

import pytest

from streamgen.geometry import VideoGeometry

SPRITES = VideoGeometry(height=64, width=64, latent_channels=48)
WAN = VideoGeometry(height=480, width=832, latent_channels=16, first_latent_frames=1)
IMAGE_FIRST = VideoGeometry(height=64, width=96, latent_channels=4, fps=30, first_latent_frames=1, first_block_frames=1)
ALL = pytest.mark.parametrize("geometry", [SPRITES, WAN, IMAGE_FIRST], ids=["sprites", "wan", "image"])


def test_known_grids():
    assert (WAN.grid_height, WAN.grid_width, WAN.tokens_per_frame, WAN.tokens(21)) == (30, 52, 1560, 32760)
    assert WAN.pixel_frames(0, 21) == 81
    assert (SPRITES.latent_height, SPRITES.tokens_per_frame, SPRITES.block_pixel_frames(7)) == (8, 16, 12)
    assert [IMAGE_FIRST.block_size(b) for b in range(3)] == [1, 3, 3]
    assert [IMAGE_FIRST.block_pixel_frames(b) for b in range(3)] == [1, 12, 12]


@ALL
def test_blocks_tile_the_frames(geometry):
    latent = pixel = 0
    for block in range(50):
        assert geometry.block_start(block) == latent
        assert geometry.block_pixel_start(block) == pixel
        for _ in range(geometry.block_size(block)):
            assert geometry.block_of_latent(latent) == block
            assert geometry.pixel_start(latent) == pixel
            frames = geometry.first_latent_frames if latent == 0 else geometry.temporal_stride
            assert geometry.pixel_frames(latent, latent + 1) == frames
            latent += 1
            pixel += frames


@ALL
def test_seconds_against_a_search(geometry):
    for tenth in range(200):
        frames = tenth * geometry.fps / 10
        first = next(b for b in range(1000) if geometry.block_pixel_start(b) >= frames - 1e-6)
        assert geometry.block_at_seconds(tenth / 10) == first
        assert geometry.blocks_for_seconds(tenth / 10) == first


@pytest.mark.parametrize(
    "change",
    [
        {"height": 0},
        {"width": 72},
        {"fps": 0.0},
        {"fps": float("inf")},
        {"first_latent_frames": 5},
        {"patch": (2, 2, 2)},
        {"patch": (1, 2)},
        {"block_frames": 0},
        {"first_block_frames": 4},
        {"latent_channels": -1},
    ],
    ids=str,
)
def test_bad_values_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        VideoGeometry(**{"height": 64, "width": 64, "latent_channels": 4} | change)


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_bad_seconds(seconds):
    with pytest.raises(ValueError, match="seconds"):
        SPRITES.block_at_seconds(seconds)
