"""Streaming through the cache equals one forward over the whole video under the block-causal mask.

fp32, one thread, atol 1e-5 on outputs of order 1. There are always more than window / block + 1 blocks: fewer cannot
see an error in window, sink or re-indexing.
"""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from streamgen.attention import attend
from streamgen.cache import CacheSpec, KVCache
from streamgen.rope import apply_rope, rope_table
from streamgen.transformer import CausalWanModel, TextContext
from streamgen.transformer_config import TransformerConfig
from streamgen.visibility import block_causal_mask, teacher_forcing_mask

CHANNELS, TEXT_LEN, TEXT_DIM = 4, 5, 12
SIGMA = 0.8

# blocks, window, sink, grid (height, width in tokens)
CASES = {
    "rollover": ([3] * 8, 9, 0, (2, 3)),
    "sink": ([3] * 8, 9, 3, (2, 3)),
    "sink not of block size": ([3] * 9, 10, 1, (2, 2)),
    "ring not divisible by the block": ([3] * 10, 11, 3, (2, 2)),
    "sink longer than a block": ([2] * 9, 9, 5, (2, 2)),
    "one-frame first block": ([1] + [3] * 7, 9, 3, (2, 2)),
    "one-frame first block, wrapping": ([1] + [3] * 8, 8, 1, (1, 3)),
    "mixed sizes": ([2, 3, 1, 3, 2, 2, 3, 1], 7, 2, (1, 3)),
    "one frame per block": ([1] * 9, 4, 1, (2, 2)),
    "window of one block": ([3] * 4, 3, 0, (2, 2)),
    "keys a multiple of 128": ([2] * 5, 4, 0, (4, 8)),
    "queries a multiple of 128": ([2] * 4, 6, 2, (8, 8)),
    "never full": ([3] * 3, 12, 3, (2, 3)),
}
EXACT_RELATIVE = [name for name, case in CASES.items() if case[2] == 0 or name == "never full"]


def build_model(seed: int = 0) -> CausalWanModel:
    torch.manual_seed(seed)
    model = CausalWanModel(
        TransformerConfig(
            dim=48,
            ffn_dim=64,
            num_heads=4,
            num_layers=3,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT_DIM,
            text_len=TEXT_LEN,
            freq_dim=32,
        )
    )
    for parameter in model.parameters():  # Wan's initial weights answer zero and hardly look at the context
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def text_context(model: CausalWanModel, batch: int) -> TextContext:
    return model.encode_text(torch.randn(batch, 1, TEXT_LEN, TEXT_DIM))


def run_cached(
    model: CausalWanModel,
    text: TextContext,
    clean: Tensor,
    noisy: Tensor,
    case: tuple[list[int], int, int, tuple[int, int]],
    policy: str,
) -> tuple[Tensor, Tensor]:
    """Outputs of the noisy and of the commit passes of all blocks, each [B, F, C, H, W]."""
    blocks, window, sink, grid = case
    spec = CacheSpec(
        num_layers=3,
        num_heads=4,
        head_dim=12,
        grid_height=grid[0],
        grid_width=grid[1],
        window_frames=window,
        sink_frames=sink,
        policy=policy,
    )
    cache = KVCache(spec, batch=clean.shape[0])
    denoised, committed = [], []
    for start, size in zip(accumulate([0, *blocks]), blocks, strict=False):
        block = cache.begin(start, size)
        frames = slice(start, start + size)
        model(
            torch.randn_like(clean[:, frames]), timestep(clean, size, 1.0), text, cache=block
        )  # an earlier step: no trace
        denoised.append(model(noisy[:, frames], timestep(clean, size, SIGMA), text, cache=block))
        committed.append(model(clean[:, frames], timestep(clean, size, 0.0), text, cache=block))
        cache.commit(block)
    return torch.cat(denoised, 1), torch.cat(committed, 1)


def timestep(like: Tensor, frames: int, sigma: float) -> Tensor:
    return torch.full((like.shape[0], frames), 1000 * sigma)


def videos(case: tuple[list[int], int, int, tuple[int, int]], batch: int = 2) -> tuple[Tensor, Tensor]:
    shape = (batch, sum(case[0]), CHANNELS, 2 * case[3][0], 2 * case[3][1])
    return torch.randn(shape), torch.randn(shape)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_window_policy_equals_full_forward(name: str) -> None:
    case = CASES[name]
    blocks, window, sink, grid = case
    model = build_model()
    clean, noisy = videos(case)
    text = text_context(model, 2)
    denoised, committed = run_cached(model, text, clean, noisy, case, "window")

    frames = sum(blocks)
    rope = rope_table(range(frames), *grid, 12)
    mask = block_causal_mask(blocks, grid[0] * grid[1], window_frames=window, sink_frames=sink)
    full = model(clean, timestep(clean, frames, 0.0), text, rope=rope, mask=mask)
    torch.testing.assert_close(committed, full, atol=1e-5, rtol=0)

    # [clean | noisy]: what teacher forcing trains is what streaming computes at every step
    both = torch.cat([clean, noisy], 1)
    rope = rope_table([*range(frames), *range(frames)], *grid, 12)
    mask = teacher_forcing_mask(blocks, grid[0] * grid[1], window_frames=window, sink_frames=sink)
    steps = torch.cat([timestep(clean, frames, 0.0), timestep(clean, frames, SIGMA)], 1)
    full = model(both, steps, text, rope=rope, mask=mask, text_repeats=2)[:, frames:]
    torch.testing.assert_close(denoised, full, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", EXACT_RELATIVE)
def test_relative_equals_window_without_sink_or_eviction(name: str) -> None:
    """Rotary attention sees differences of positions only, so re-indexing changes nothing while no distance is cut."""
    case = CASES[name]
    model = build_model()
    clean, noisy = videos(case)
    text = text_context(model, 2)
    for one, other in zip(
        run_cached(model, text, clean, noisy, case, "window"),
        run_cached(model, text, clean, noisy, case, "relative"),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_relative_cuts_the_sinks_distance_from_the_first_eviction_on() -> None:
    case = CASES["sink"]
    blocks, window, _, _ = case
    model = build_model()
    clean, noisy = videos(case)
    text = text_context(model, 2)
    _, absolute = run_cached(model, text, clean, noisy, case, "window")
    _, relative = run_cached(model, text, clean, noisy, case, "relative")
    torch.testing.assert_close(absolute[:, :window], relative[:, :window], atol=1e-5, rtol=0)
    first_cut = slice(window, window + blocks[0])
    assert (absolute[:, first_cut] - relative[:, first_cut]).abs().max() > 1e-3


@torch.no_grad()
def test_relative_equals_attention_over_reindexed_lists() -> None:
    """Past the window with a sink, against lists: one layer's keys kept as they come, joined and rotated anew."""
    blocks, window, sink, grid = CASES["ring not divisible by the block"]
    tokens = grid[0] * grid[1]
    spec = CacheSpec(
        num_layers=1,
        num_heads=2,
        head_dim=12,
        grid_height=grid[0],
        grid_width=grid[1],
        window_frames=window,
        sink_frames=sink,
    )
    cache = KVCache(spec)
    past: list[tuple[Tensor, Tensor]] = []  # per frame
    for start, size in zip(accumulate([0, *blocks]), blocks, strict=False):
        q, k, v = torch.randn(3, 1, 2, size * tokens, 12)
        block = cache.begin(start, size)
        keys, values = block.append(0, k, v)
        cached = attend(apply_rope(q, *block.rope()), keys, values)
        cache.commit(block)
        past += zip(k.split(tokens, 2), v.split(tokens, 2), strict=True)
        seen = past if len(past) <= window else past[:sink] + past[sink - window :]
        cos, sin = rope_table(range(len(seen)), *grid, 12)
        listed = attend(
            apply_rope(q, cos[-size * tokens :], sin[-size * tokens :]),
            apply_rope(torch.cat([k for k, _ in seen], 2), cos, sin),
            torch.cat([v for _, v in seen], 2),
        )
        torch.testing.assert_close(cached, listed, atol=1e-6, rtol=0)
