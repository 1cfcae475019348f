"""Wan's codec, streamed, equals its whole coding to the bit, and diffusers' to rounding (a convolution of one pixel,
which diffusers runs over all frames at once, may sum in another order), for the structures of Wan 2.1 and 2.2.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamgen.codecs.tiles import Tiling
from streamgen.codecs.wan import WanCodec, WanCodecConfig, load_wan_codec
from streamgen.errors import UserError
from streamgen.weights import build_config, load_tree, save_component, save_tree

diffusers = pytest.importorskip("diffusers")

WAN_2_1: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "latents_mean": [0.3, -0.2, 0.1, 0.0],
    "latents_std": [1.5, 0.7, 2.0, 1.0],
}
WAN_2_2 = WAN_2_1 | {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
WAN_2_2 |= {"scale_factor_spatial": 16, "decoder_base_dim": 12}
CONFIGS = {"2.1": WAN_2_1, "2.2": WAN_2_2}


def pair(name: str, **ours: Any) -> tuple[WanCodec, nn.Module]:
    """Our codec and diffusers' with the same random weights."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(**CONFIGS[name]).eval().requires_grad_(False)
    codec = WanCodec(build_config(WanCodecConfig, CONFIGS[name] | ours, "test")).eval()
    codec.load_state_dict(theirs.state_dict())
    return codec, theirs


def streamed(step: Any, chunks: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    made, state = [], None
    for chunk in chunks:
        before = None if state is None else {name: tensor.clone() for name, tensor in state.items()}
        step(chunk, state)  # a block that is tried again: nothing of the old state may have changed
        assert state is None or all(torch.equal(tensor, before[name]) for name, tensor in state.items())
        out, state = step(chunk, state)
        made.append(out)
    return torch.cat(made, 1), state


def normalised(codec: WanCodec, raw_BCFHW: Tensor, sign: int) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (codec.config.latents_mean, codec.config.latents_std))
    return (raw_BCFHW - mean) / std if sign > 0 else raw_BCFHW * std + mean


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_equals_diffusers(name: str) -> None:
    codec, theirs = pair(name)
    latents = torch.randn(2, 5, 4, 2, 3)
    whole = theirs.decode(normalised(codec, latents.transpose(1, 2), -1)).sample.transpose(1, 2)
    assert whole.shape[1] == 17 and whole.abs().max() <= 1 and whole.std() > 0.01
    ours = codec.decode(latents)
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=0)
    for sizes in ([1] * 5, [3, 2], [1, 3, 1]):
        video, _ = streamed(codec.decode_stream, list(latents.split(sizes, 1)))
        assert torch.equal(video, ours), sizes


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_encoding_equals_diffusers(name: str) -> None:
    codec, theirs = pair(name)
    video = torch.rand(2, 17, 3, 32, 48) * 2 - 1
    whole = normalised(codec, theirs.encode(video.transpose(1, 2)).latent_dist.mode(), 1).transpose(1, 2)
    assert whole.shape == (2, 5, 4, 32 // codec.spatial_stride, 48 // codec.spatial_stride)
    ours = codec.encode(video)
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=0)
    for sizes in ([1, 4, 4, 4, 4], [9, 8], [1, 12, 4]):
        latents, _ = streamed(codec.encode_stream, list(video.split(sizes, 1)))
        assert torch.equal(latents, ours), sizes


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_tiles_equal_diffusers_tiles_and_stream(name: str) -> None:
    codec, theirs = pair(name, tile_pixels=64)
    theirs.enable_tiling(64, 64, 48, 48)
    s = codec.spatial_stride
    latents = torch.randn(1, 3, 4, 128 // s, 80 // s)
    whole = theirs.decode(normalised(codec, latents.transpose(1, 2), -1)).sample.transpose(1, 2)
    video, state = streamed(codec.decode_stream, list(latents.split([1, 2], 1)))
    torch.testing.assert_close(video, whole, atol=1e-6, rtol=0)
    assert {key.rsplit(".", 1)[0] for key in state} == {f"{i}.{j}" for i in range(3) for j in range(2)}
    seen = theirs.encode(video.transpose(1, 2)).latent_dist.mode() if name == "2.1" else None
    made, _ = streamed(codec.encode_stream, list(video.split([5, 4], 1)))
    assert made.shape == latents.shape
    if seen is not None:  # of 2.2 diffusers' tiles are twice as large as they say
        torch.testing.assert_close(made, normalised(codec, seen, 1).transpose(1, 2), atol=1e-6, rtol=0)
    codec.tiling = None
    untiled = codec.decode(latents)
    assert torch.equal(untiled[..., :8, :8], video[..., :8, :8]) is False  # the middle block's attention sees all
    with pytest.raises(ValueError, match="another size of video or of tiles"):
        codec.decode_stream(latents, state)


@pytest.mark.parametrize(
    ("size", "step", "length"), [(64, 48, 64), (64, 48, 65), (64, 48, 112), (64, 48, 113), (8, 4, 90)]
)
def test_tiles_cover_and_fade(size: int, step: int, length: int) -> None:
    tiling = Tiling(size=size, step=step)
    spans = tiling.spans(length)
    assert spans[0].start == 0 and spans[-1].stop == length
    assert all(after.start - before.start == step and before.stop > after.start for before, after in pairwise(spans))
    assert all(span.stop - span.start == size for span in spans[:-1])
    picture = torch.randn(2, length, length + 3)
    columns = tiling.spans(length + 3)
    joined = tiling.join([[picture[:, row, column] for column in columns] for row in spans])
    torch.testing.assert_close(joined, picture, atol=1e-6, rtol=0)
    if len(spans) > 1:  # from one value to the other, evenly
        ramp = tiling.join([[torch.full((span.stop - span.start, 1), float(i))] for i, span in enumerate(spans)])
        assert (ramp.diff(dim=0) <= 1 / (size - step) + 1e-6).all() and ramp[-1, 0] == len(spans) - 1


@torch.no_grad()
def test_state_survives_a_file(tmp_path: Path) -> None:
    """Also after one latent, when an upsampler has only its mark."""
    codec, _ = pair("2.1")
    latents = torch.randn(1, 4, 4, 4, 4)
    whole = codec.decode(latents)
    state, made = None, []
    for index, latent in enumerate(latents.split(1, 1)):
        frames, state = codec.decode_stream(latent, state)
        made.append(frames)
        save_tree({"codec": state}, tmp_path / f"{index}.safetensors", "mark")
        loaded = load_tree(tmp_path / f"{index}.safetensors", "mark")["codec"]
        assert loaded.keys() == state.keys()
        state = loaded
    assert torch.equal(torch.cat(made, 1), whole)


def test_a_folder_of_diffusers_loads(tmp_path: Path) -> None:
    codec, theirs = pair("2.1")
    theirs.save_pretrained(tmp_path / "vae")
    latents = torch.randn(1, 2, 4, 4, 4)
    loaded = load_wan_codec(tmp_path)
    assert torch.equal(loaded.decode(latents), codec.decode(latents))
    assert load_wan_codec(tmp_path / "vae", tile_pixels=64).tiling == Tiling(size=64, step=48)
    save_component(tmp_path / "codec", {"_class_name": "WanCodec", **CONFIGS["2.1"]}, codec.state_dict())
    assert torch.equal(load_wan_codec(tmp_path).decode(latents), codec.decode(latents))
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"base_dim": 12}))
    with pytest.raises(UserError, match="tensors have another shape"):
        load_wan_codec(tmp_path / "vae")


def test_geometry_and_wrong_input() -> None:
    codec, _ = pair("2.2")
    values = (codec.spatial_stride, codec.temporal_stride, codec.first_latent_frames, codec.latent_channels)
    assert values == (16, 4, 1, 4)
    with pytest.raises(ValueError, match=r"video is 4 frames of 3x32x32; the codec takes 1 \+ a multiple of 4 RGB"):
        codec.encode(torch.zeros(1, 4, 3, 32, 32))
    with pytest.raises(ValueError, match="sides that are multiples of 16"):
        codec.encode(torch.zeros(1, 5, 3, 32, 40))
    for changes, message in (
        ({"latents_std": [1.0, 1.0]}, "must be z_dim=4"),
        ({"scale_factor_temporal": 8}, "temperal_downsample says 4"),
        ({"tile_pixels": 40}, "must be multiples of 16"),
    ):
        with pytest.raises(UserError, match=message):
            build_config(WanCodecConfig, WAN_2_2 | changes, "config")


def test_without_diffusers_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(UserError, match=r"Wan's codec needs diffusers.*pip install 'streamgen\[wan\]'"):
        WanCodec(WanCodecConfig())
