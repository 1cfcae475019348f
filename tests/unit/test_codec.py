"""The sprites codec: streaming equals whole, the linear maps are principal components, geometry and files."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamgen.codec import (
    SpritesCodec,
    SpritesCodecConfig,
    fit_normalisation,
    init_linear_from_pca,
    load_codec,
)
from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.pixels import to_uint8
from streamgen.weights import save_component

CONFIG = SpritesCodecConfig(latent_channels=6, encoder_dim=8, decoder_dim=8, decoder_blocks=1, head_dim=8)
LATENT_FRAMES = 7


def build(config: SpritesCodecConfig = CONFIG) -> SpritesCodec:
    """Random weights and a normalisation that is not the identity."""
    torch.manual_seed(0)
    codec = SpritesCodec(config).requires_grad_(False)
    for parameter in codec.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    codec.latents_mean.normal_()
    codec.latents_std.uniform_(0.5, 2.0)
    return codec


def video(frames: int = 4 * LATENT_FRAMES, height: int = 16, width: int = 24, batch: int = 2) -> Tensor:
    return torch.rand(batch, frames, 3, height, width) * 2 - 1


chunks = st.lists(st.integers(1, 3), min_size=1, max_size=LATENT_FRAMES).map(
    lambda sizes: [size for size, end in zip(sizes, np.cumsum(sizes), strict=True) if end <= LATENT_FRAMES]
)


@settings(max_examples=25)
@given(sizes=chunks)
def test_streaming_equals_whole_for_any_chunks(sizes: list[int]) -> None:
    codec = build()
    sizes = [*sizes, LATENT_FRAMES - sum(sizes)] if sum(sizes) < LATENT_FRAMES else sizes
    pixels = video()
    state, latents = None, []
    for piece in pixels.split([4 * size for size in sizes], 1):
        made, state = codec.encode_stream(piece, state)
        latents.append(made)
    torch.testing.assert_close(torch.cat(latents, 1), codec.encode(pixels), rtol=0, atol=1e-5)

    given_latents = torch.randn(2, LATENT_FRAMES, 6, 2, 3)
    state, frames = None, []
    for piece in given_latents.split(sizes, 1):
        made, state = codec.decode_stream(piece, state)
        frames.append(made)
    torch.testing.assert_close(torch.cat(frames, 1), codec.decode(given_latents), rtol=0, atol=1e-5)


def test_the_state_matters_and_is_not_changed_by_its_use() -> None:
    codec, pixels = build(), video()
    _, state = codec.encode_stream(pixels[:, :12], None)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    continued, _ = codec.encode_stream(pixels[:, 12:], state)
    again, _ = codec.encode_stream(pixels[:, 12:], state)
    anew, _ = codec.encode_stream(pixels[:, 12:], None)
    assert torch.equal(continued, again) and all(torch.equal(state[name], kept[name]) for name in kept)
    assert not torch.equal(continued[:, 0], anew[:, 0])  # the frame before shows
    torch.testing.assert_close(continued[:, 1:], anew[:, 1:], rtol=0, atol=1e-5)  # and is all that does

    latents = torch.randn(1, 4, 6, 2, 3)
    _, decoded = codec.decode_stream(latents[:, :2], None)
    continued, _ = codec.decode_stream(latents[:, 2:], decoded)
    anew = codec.decode(latents[:, 2:])
    assert not torch.equal(continued[:, :4], anew[:, :4])
    torch.testing.assert_close(continued[:, 4:], anew[:, 4:], rtol=0, atol=1e-5)


def test_states_are_small_plain_and_own_their_memory() -> None:
    codec, pixels = build(), video()
    latents, encoded = codec.encode_stream(pixels, None)
    _, decoded = codec.decode_stream(latents, None)
    for state in (encoded, decoded):
        (tensor,) = state.values()
        assert tensor.shape[1] == 1 and tensor.untyped_storage().nbytes() == tensor.nbytes


def test_time_is_causal() -> None:
    codec, pixels = build(), video()
    other = pixels.clone()
    other[:, 16:] = 0
    torch.testing.assert_close(codec.encode(pixels)[:, :4], codec.encode(other)[:, :4], rtol=0, atol=1e-6)
    assert not torch.allclose(codec.encode(pixels)[:, 4], codec.encode(other)[:, 4])


def test_four_frames_for_every_latent() -> None:
    codec = build()
    geometry = VideoGeometry(height=16, width=24, latent_channels=6, patch=(1, 1, 1))
    assert (codec.spatial_stride, codec.temporal_stride, codec.first_latent_frames) == (8, 4, 4)
    assert codec.latent_channels == 6
    for blocks in (1, 3):
        frames = sum(geometry.block_pixel_frames(b) for b in range(blocks))
        latents = codec.encode(video(frames))
        assert latents.shape == (2, 3 * blocks, 6, geometry.latent_height, geometry.latent_width)
        assert codec.decode(latents).shape == (2, frames, 3, 16, 24)


def test_patches_round_trip() -> None:
    codec, pixels = build(), video()
    patches = codec.patchify(pixels)
    assert patches.shape == (2, LATENT_FRAMES, 2, 3, 4 * 3 * 8 * 8)
    assert torch.equal(codec.unpatchify(patches.movedim(-1, 2).flatten(0, 1), 2), pixels)
    # One patch is 4 frames of one 8x8 square.
    assert torch.equal(patches[1, 2, 1, 0].sort().values, pixels[1, 8:12, :, 8:16, :8].flatten().sort().values)


@pytest.mark.parametrize(
    "shape", [(1, 3, 3, 16, 16), (1, 5, 3, 16, 16), (1, 4, 3, 12, 16), (1, 4, 3, 16, 20), (1, 4, 1, 16, 16)]
)
def test_bad_video_shapes_are_refused(shape: tuple[int, ...]) -> None:
    _, frames, channels, height, width = shape
    with pytest.raises(ValueError, match=rf"video is {frames} frames of {channels}x{height}x{width}; .*multiples of 4"):
        build().encode(torch.zeros(shape))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SpritesCodecConfig)])
def test_empty_sizes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"codec {name} is 0; it must be at least 1"):
        SpritesCodecConfig(**{name: 0})


def correlated(batch: int = 24) -> Tensor:
    """Small video whose patches have far fewer directions than values."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(batch, 2, 2, 2, 30, generator=generator) * torch.linspace(1, 0.1, 30)
    patches = values @ torch.randn(30, 768, generator=generator) * 0.02 + 0.1
    return build().unpatchify(patches.movedim(-1, 2).flatten(0, 1), batch)


def test_the_linear_maps_are_principal_components() -> None:
    """A fresh codec's squared error is the tail of the spectrum: no linear codec of its size does better."""
    torch.manual_seed(0)
    codec = SpritesCodec(CONFIG).requires_grad_(False)
    pixels = correlated()
    assert float(pixels.abs().max()) < 1  # nothing is clamped
    init_linear_from_pca(codec, pixels)
    patches = codec.patchify(pixels).flatten(0, -2).double()
    spectrum = torch.linalg.svdvals(patches - patches.mean(0)).square() / len(patches)
    error = (codec.decode(codec.encode(pixels)) - pixels).double().square().mean() * patches.shape[1]
    assert float(error) == pytest.approx(float(spectrum[6:].sum()), rel=1e-3)
    raw = codec.encode(pixels).double().flatten(0, 1).movedim(1, -1).flatten(0, 2)
    covariance = raw.T @ raw / len(raw)
    # Component k is scaled by deviation^-1/2, so its variance is the deviation, and components do not mix.
    torch.testing.assert_close(covariance, torch.diag(spectrum[:6].sqrt()), rtol=0, atol=1e-4)
    assert float(raw.mean(0).abs().max()) < 1e-5


def test_residuals_add_nothing_at_first() -> None:
    torch.manual_seed(0)
    codec = SpritesCodec(CONFIG).requires_grad_(False)
    pixels = video(8) * 0.1
    torch.testing.assert_close(codec.encode(pixels), codec.encode_linear(codec.patchify(pixels)).movedim(-1, 2))
    raw = torch.randn(3, 6, 2, 3) * 0.1
    torch.testing.assert_close(codec.decode_raw(raw, torch.randn_like(raw)), codec.decode_linear(raw))


def test_normalisation_centres_and_scales_half_way() -> None:
    codec, pixels = build(), video(batch=4) * torch.linspace(0.2, 1, 4).view(4, 1, 1, 1, 1)
    codec.latents_mean.zero_()
    codec.latents_std.fill_(1.0)
    raw = codec.encode(pixels)
    before = codec.decode(raw)
    deviation = raw.std((0, 1, 3, 4))
    fit_normalisation(codec, pixels)
    latents = codec.encode(pixels)
    assert float(latents.mean((0, 1, 3, 4)).abs().max()) < 1e-5
    expected = (deviation / deviation.square().mean().sqrt()).sqrt()
    torch.testing.assert_close(latents.std((0, 1, 3, 4)), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(codec.decode(latents), before, rtol=0, atol=1e-5)  # a change of units, no more
    kept = codec.latents_std.clone()
    fit_normalisation(codec, pixels)
    torch.testing.assert_close(codec.latents_std, kept)


@pytest.mark.parametrize("inside", ["", "codec"])
def test_files_round_trip(tmp_path: Path, inside: str) -> None:
    """From a component folder or a model folder, in fp32 however it is stored."""
    codec = build().half()
    save_component(tmp_path / inside, {"_class_name": "SpritesCodec", **codec.config_dict()}, codec.state_dict())
    loaded = load_codec(tmp_path)
    assert loaded.config == CONFIG
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, codec.state_dict()[name].float()), name


def test_files_of_another_size_or_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_codec(tmp_path)
    save_component(tmp_path, {**asdict(CONFIG), "latent_channels": 5}, build().state_dict())
    with pytest.raises(UserError, match="its config says"):
        load_codec(tmp_path)
    save_component(tmp_path, {**asdict(CONFIG), "channels": 5}, build().state_dict())
    with pytest.raises(UserError, match="unknown key 'channels'"):
        load_codec(tmp_path)


def test_uint8_is_rounded_clamped_and_channels_last() -> None:
    levels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    out = to_uint8(levels.view(1, 5, 1, 1, 1).expand(1, 5, 3, 2, 4).bfloat16()).numpy()
    assert out.dtype == np.uint8 and out.shape == (1, 5, 2, 4, 3) and out.flags["C_CONTIGUOUS"]
    assert out[0, :, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
