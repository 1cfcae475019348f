"""The small codecs: the published files' structure, streaming equals whole, and both equal a plain reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from streamgen.codecs.taehv import TaehvCodec, TaehvConfig, load_taehv, taehv_codec
from streamgen.errors import UserError

CONFIGS = {
    "taew2_1": TaehvConfig(latent_channels=16, encoder_dim=8, decoder_dims=(16, 12, 8, 8)),
    "taew2_2": TaehvConfig(latent_channels=48, patch_size=2, encoder_dim=8, decoder_dims=(16, 12, 8, 8)),
}
MEMORIES = {"encoder": (4, 5, 6, 9, 10, 11, 14, 15, 16), "decoder": (3, 4, 5, 9, 10, 11, 15, 16, 17)}
TIME = {"encoder": {2: 2, 7: 2, 12: 1}, "decoder": {7: 1, 13: 2, 19: 2}}
PLAIN = {"encoder": (0, 3, 8, 13, 17), "decoder": (1, 8, 14, 20, 22)}
NO_BIAS = {"encoder": (3, 8, 13), "decoder": (8, 14, 20)}


def build(name: str) -> TaehvCodec:
    codec = TaehvCodec(CONFIGS[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in codec.parameters():  # so that values neither vanish nor grow from layer to layer
            std = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        codec.decoder[22].bias += 0.5
    return codec.requires_grad_(False)


def published_names() -> set[str]:
    names = set()
    for side in ("encoder", "decoder"):
        names |= {f"{side}.{i}.weight" for i in PLAIN[side]}
        names |= {f"{side}.{i}.bias" for i in PLAIN[side] if i not in NO_BIAS[side]}
        names |= {f"{side}.{i}.conv.weight" for i in TIME[side]}
        names |= {f"{side}.{i}.conv.{j}.{p}" for i in MEMORIES[side] for j in (0, 2, 4) for p in ("weight", "bias")}
    return names


def reference(codec: TaehvCodec, side: str, x: Tensor) -> Tensor:
    """All time steps of [B, T, C, H, W] at once, layer by layer, from the weights alone."""
    w, B = codec.state_dict(), x.shape[0]
    relus, last = {"encoder": (0,), "decoder": (1, 20)}[side], {"encoder": 17, "decoder": 22}[side]
    x = (torch.tanh(x / 3) * 3 if side == "decoder" else x).flatten(0, 1)
    for i in range(last + 1):
        name = f"{side}.{i}"
        if i in MEMORIES[side]:
            now = x.view(B, -1, *x.shape[1:])
            h = torch.cat([now, torch.cat([torch.zeros_like(now[:, :1]), now[:, :-1]], 1)], 2).flatten(0, 1)
            for j in (0, 2, 4):
                h = F.conv2d(F.relu(h) if j else h, w[f"{name}.conv.{j}.weight"], w[f"{name}.conv.{j}.bias"], padding=1)
            x = F.relu(h + x)
        elif i in TIME[side]:
            if side == "encoder":
                x = x.reshape(-1, TIME[side][i] * x.shape[1], *x.shape[2:])
            else:
                x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)  # the upsampling before it
            x = F.conv2d(x, w[f"{name}.conv.weight"])
            x = x if side == "encoder" else x.reshape(-1, x.shape[1] // TIME[side][i], *x.shape[2:])
        elif i in PLAIN[side]:
            stride = 2 if side == "encoder" and i in NO_BIAS[side] else 1
            x = F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding=1)
            x = F.relu(x) if i in relus else x
    return x.view(B, -1, *x.shape[1:])


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_streams_and_equals_the_reference(name: str) -> None:
    codec = build(name)
    latents = 2 * torch.randn(2, 5, codec.latent_channels, 4, 6)
    raw = reference(codec, "decoder", latents)[:, 3:]
    raw = F.pixel_shuffle(raw, 2) if name == "taew2_2" else raw
    expected = raw.clamp(0, 1) * 2 - 1
    assert expected.shape == (2, 17, 3, 4 * codec.spatial_stride, 6 * codec.spatial_stride)
    assert 0.05 < (expected.abs() < 1).float().mean() < 0.95
    whole = codec.decode(latents)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0)
    for sizes in ([1] * 5, [3, 2], [2, 1, 2]):
        state, made = None, []
        for chunk in latents.split(sizes, 1):
            codec.decode_stream(torch.randn_like(chunk), state)  # a try that failed leaves the old state as it was
            frames, state = codec.decode_stream(chunk, state)
            made.append(frames)
        assert torch.equal(torch.cat(made, 1), whole), sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_encoding_streams_and_equals_the_reference(name: str) -> None:
    codec = build(name)
    video = torch.rand(1, 9, 3, 32, 48) * 2 - 1
    padded = torch.cat([video, video[:, -1:].expand(-1, 3, -1, -1, -1)], 1) * 0.5 + 0.5
    expected = reference(codec, "encoder", F.pixel_unshuffle(padded, 2) if name == "taew2_2" else padded)
    whole = codec.encode(video)
    assert whole.shape == (1, 3, codec.latent_channels, 32 // codec.spatial_stride, 48 // codec.spatial_stride)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0)
    state, made = None, []
    for chunk in video.split([1, 4, 2, 2], 1):
        latents, state = codec.encode_stream(chunk, state)
        made.append(latents)
    assert [one.shape[1] for one in made] == [0, 1, 0, 1] and state["waiting"].shape[1] == 1
    assert torch.equal(torch.cat(made, 1), whole[:, :2])


def test_the_structure_of_the_published_files() -> None:
    codec = TaehvCodec(TaehvConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in codec.state_dict().items()}
    assert shapes.keys() == published_names()
    assert shapes["decoder.1.weight"] == (256, 16, 3, 3) and shapes["encoder.2.conv.weight"] == (64, 128, 1, 1)
    assert shapes["decoder.13.conv.weight"] == (256, 128, 1, 1) and shapes["decoder.22.weight"] == (3, 64, 3, 3)
    values = (codec.spatial_stride, codec.temporal_stride, codec.first_latent_frames, codec.latent_channels)
    assert values == (8, 4, 1, 16)


@pytest.mark.parametrize("name", CONFIGS)
def test_files_load_by_their_structure(name: str, tmp_path: Path) -> None:
    codec = build(name)
    latents = torch.randn(1, 2, codec.latent_channels, 2, 2)
    torch.save(codec.state_dict(), tmp_path / "whatever.pth")
    loaded = load_taehv(tmp_path / "whatever.pth")
    assert loaded.config == CONFIGS[name] and torch.equal(loaded.decode(latents), codec.decode(latents))
    assert loaded.decoder[1].weight.dtype == torch.float32
    half = load_taehv(tmp_path / "whatever.pth", dtype=torch.bfloat16)
    off = (half.decode(latents).float() - codec.decode(latents)).abs()
    assert 0 < off.max() < 0.3 and off.mean() < 0.02


def test_a_decoder_that_could_make_more_frames_is_cut() -> None:
    codec = build("taew2_1")
    tensors = dict(codec.state_dict())
    tensors["decoder.7.conv.weight"] = torch.cat([torch.randn(16, 16, 1, 1), tensors["decoder.7.conv.weight"]])
    latents = torch.randn(1, 2, 16, 2, 2)
    assert torch.equal(taehv_codec(tensors, "file").decode(latents), codec.decode(latents))


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    tensors = dict(build("taew2_1").state_dict())
    with pytest.raises(UserError, match=r"file is no TAEHV checkpoint: it has no encoder\.0\.weight"):
        taehv_codec({name: t for name, t in tensors.items() if name.startswith("decoder")}, "file")
    with pytest.raises(UserError, match=r"1 of \d+ tensors are missing: decoder"):
        taehv_codec({name: t for name, t in tensors.items() if name != "decoder.3.conv.0.weight"}, "file")
    with pytest.raises(UserError, match="4 channels; must be 3 times a square"):
        taehv_codec({**tensors, "encoder.0.weight": torch.zeros(8, 4, 3, 3)}, "file")
