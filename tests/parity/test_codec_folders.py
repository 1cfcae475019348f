"""A model folder with Wan's codec, or with a small one, streams; its stream goes on from a file to the bit."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from streamgen.codecs.taehv import TaehvCodec, TaehvConfig
from streamgen.codecs.wan import WanCodec, WanCodecConfig
from streamgen.geometry import VideoGeometry
from streamgen.pipeline import SchedulerConfig, StreamPipeline
from streamgen.text import SpritesTextConfig, SpritesTextEncoder
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig
from tests.command_line import STAR


def wan_codec() -> nn.Module:
    pytest.importorskip("diffusers")
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": (1, 1, 1, 1), "num_res_blocks": 1}
    return WanCodec(WanCodecConfig(**sizes, latents_mean=(0.1,) * 4, latents_std=(1.5,) * 4))


def small_codec() -> nn.Module:
    return TaehvCodec(TaehvConfig(latent_channels=4, encoder_dim=4, decoder_dims=(8, 4, 4, 4)))


@pytest.mark.parametrize("make", [wan_codec, small_codec])
@pytest.mark.parametrize("block_frames", [3, 1])
def test_a_folder_streams_and_resumes(make: type[nn.Module], block_frames: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "freq_dim": 16}
    pipe = StreamPipeline(
        transformer=CausalWanModel(TransformerConfig(in_channels=4, out_channels=4, text_dim=8, text_len=8, **sizes)),
        codec=make(),
        text=SpritesTextEncoder(SpritesTextConfig(text_dim=8)),
        geometry=VideoGeometry(
            height=16, width=32, latent_channels=4, first_latent_frames=1, block_frames=block_frames
        ),
        scheduler=SchedulerConfig(trained_steps=(2,), window_frames=6, sink_frames=1),
    )
    for parameter in pipe.transformer.parameters():
        nn.init.normal_(parameter, std=0.15)
    pipe.save_pretrained(tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = StreamPipeline.from_pretrained(tmp_path / "m", dtype="fp32")
    whole = [block.frames for block in pipe.stream(STAR, max_blocks=5)]
    first = 1 + 4 * (block_frames - 1)
    assert [len(frames) for frames in whole] == [first] + [4 * block_frames] * 4
    assert whole[0].shape[1:] == (16, 32, 3) and np.concatenate(whole).std() > 1
    for stop in (1, 3):
        stream = pipe.stream(STAR, max_blocks=5)
        for _ in range(stop):
            next(stream)
        stream.save_state(tmp_path / f"{stop}.state")
        rest = [block.frames for block in pipe.resume(tmp_path / f"{stop}.state", max_blocks=5)]
        assert np.array_equal(np.concatenate(rest), np.concatenate(whole[stop:]))
