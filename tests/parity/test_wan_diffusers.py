"""The transformer against diffusers' `WanTransformer3DModel` with the same weights, through our own name map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from streamgen.checkpoints.detect import Network, original_names
from streamgen.checkpoints.sizes import config_of, diffusers_settings
from streamgen.checkpoints.tensors import in_memory
from streamgen.rope import rope_table
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig
from streamgen.weights import load_weights
from tests.tiny_wan import TEXT_DIM, TEXT_LEN, config, spread

diffusers = pytest.importorskip("diffusers")

# (latent frames, rows, columns) of latents
RESOLUTIONS = ((1, 4, 4), (3, 6, 10), (5, 10, 4))


def pair(sizes: TransformerConfig, dtype: torch.dtype = torch.float32) -> tuple[Any, CausalWanModel]:
    """diffusers' model with random weights, and ours with the same ones, found by shape and name."""
    settings = {key: value for key, value in diffusers_settings(sizes).items() if not key.startswith("_")}
    theirs = diffusers.WanTransformer3DModel(**settings).eval().requires_grad_(False)
    spread(theirs, 0.08)
    network = Network(kind="transformer", layout="diffusers", tensors=in_memory(theirs.state_dict()))
    tensors = original_names(network, "theirs")
    known = {"num_attention_heads": sizes.num_heads, "text_len": sizes.text_len}
    ours = CausalWanModel(config_of(tensors.shapes, "theirs", settings=known))
    load_weights(ours, tensors, where="theirs", dtype=dtype)
    return theirs, ours.eval().requires_grad_(False)


def inputs(channels: int, frames: int, height: int, width: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents_BFCHW = torch.randn(2, frames, channels, height, width, generator=generator)
    text_BGLD = torch.randn(2, 1, TEXT_LEN, TEXT_DIM, generator=generator)
    text_BGLD[:, :, 7:] = 0
    return latents_BFCHW, text_BGLD


def run_ours(model: CausalWanModel, latents_BFCHW: Tensor, timestep_BF: Tensor, text_BGLD: Tensor) -> Tensor:
    frames, height, width = latents_BFCHW.shape[1], latents_BFCHW.shape[3], latents_BFCHW.shape[4]
    rope = rope_table(range(frames), height // 2, width // 2, model.config.head_dim)
    return model(latents_BFCHW, timestep_BF, model.encode_text(text_BGLD.to(model.head.modulation)), rope=rope)


def run_theirs(model: Any, latents_BFCHW: Tensor, timestep: Tensor, text_BGLD: Tensor) -> Tensor:
    out = model(latents_BFCHW.transpose(1, 2), timestep, text_BGLD[:, 0], return_dict=False)[0]
    return out.transpose(1, 2)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_text_to_video(resolution: tuple[int, int, int]) -> None:
    theirs, ours = pair(config())
    latents, text = inputs(4, *resolution)
    timestep_B = torch.tensor([937.5, 24.25])
    expected = run_theirs(theirs, latents, timestep_B, text)
    found = run_ours(ours, latents, timestep_B[:, None], text)
    assert expected.abs().max() > 0.5
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_per_token_timesteps(resolution: tuple[int, int, int]) -> None:
    """Wan 2.2 5B: a timestep for every token; the first frame is an image at 0."""
    theirs, ours = pair(config(6))
    frames, height, width = resolution
    latents, text = inputs(6, *resolution)
    timestep_BF = torch.tensor([[625.0], [833.25]]).repeat(1, frames)
    timestep_BF[:, 0] = 0
    expected = run_theirs(theirs, latents, timestep_BF.repeat_interleave(height * width // 4, 1), text)
    found = run_ours(ours, latents, timestep_BF, text)
    assert expected.abs().max() > 0.5
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("changes", [{"num_heads": 4}, {"cross_attn_norm": False}, {"freq_dim": 32, "num_layers": 1}])
def test_other_structures(changes: dict[str, Any]) -> None:
    theirs, ours = pair(config(**changes))
    latents, text = inputs(4, 2, 4, 6)
    timestep_B = torch.tensor([1000.0, 500.0])
    difference = run_ours(ours, latents, timestep_B[:, None], text) - run_theirs(theirs, latents, timestep_B, text)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("channels", [4, 6])
def test_bfloat16(tmp_path: Any, channels: int) -> None:
    """Their weights in bf16 as diffusers loads them (norms, time embedding and tables in float32), ours all in bf16."""
    theirs, ours = pair(config(channels), torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    latents, text = (tensor.bfloat16() for tensor in inputs(channels, 3, 6, 10))
    timestep_B = torch.tensor([937.5, 625.0])
    with torch.no_grad():
        expected = run_theirs(theirs, latents, timestep_B, text).float()
    found = run_ours(ours, latents, timestep_B[:, None], text).float()
    assert (found - expected).norm() / expected.norm() < 2e-2


def test_a_swapped_norm_would_be_seen() -> None:
    """The map's one trap: original norm3 is diffusers' norm2. The tolerance above is far below that mistake."""
    theirs, ours = pair(config())
    latents, text = inputs(4, 2, 4, 4)
    timestep_B = torch.tensor([500.0, 500.0])
    ours.blocks[0].norm3.weight = torch.nn.Parameter(torch.ones(256))
    difference = run_ours(ours, latents, timestep_B[:, None], text) - run_theirs(theirs, latents, timestep_B, text)
    assert difference.abs().max() > 1e-3
