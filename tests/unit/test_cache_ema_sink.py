"""Reward Forcing's sink: a running average of what left, block by block, against lists written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamgen.cache import CacheSpec, KVCache
from streamgen.cache.ema_sink import SHARE
from streamgen.errors import UserError
from streamgen.parallel.job import Job, check_job
from streamgen.pipeline import StreamPipeline
from streamgen.rope import apply_rope, rope_table
from tests.tiny_model import save_tiny_model

HEADS, WIDTH, LAYERS, GRID = 2, 12, 2, (1, 2)
TOKENS = GRID[0] * GRID[1]


def new_cache(window: int, sink: int, policy: str = "ema_sink") -> KVCache:
    return KVCache(
        CacheSpec(
            num_layers=LAYERS,
            num_heads=HEADS,
            head_dim=WIDTH,
            grid_height=GRID[0],
            grid_width=GRID[1],
            window_frames=window,
            sink_frames=sink,
            policy=policy,
        )
    )


def keys(block: int, layer: int, frames: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * block + layer)
    k, v = torch.randn(2, 1, HEADS, frames * TOKENS, WIDTH, generator=generator).unbind(0)
    return k, v


def ordered(cache: KVCache, block: int, frames: int) -> tuple[list[tuple[Tensor, Tensor]], list[int]]:
    """What each layer sees in a pass over the block, its frames in time order; committed."""
    handle = cache.begin(block * frames, frames)
    seen = []
    for _ in range(2):  # two passes: what the first one overwrote is not folded again
        seen = []
        for layer in range(LAYERS):
            k, v = handle.append(layer, *keys(block, layer, frames))
            slots = [
                cache.policy.slot(f, cache.spec.window_frames, cache.spec.sink_frames) for f in handle.visible_frames
            ]
            index = torch.cat([torch.arange(s * TOKENS, (s + 1) * TOKENS) for s in slots])
            seen.append((k[:, :, index].clone(), v[:, :, index].clone()))
    cache.commit(handle)
    return seen, handle.visible_frames


def test_equals_the_published_rule() -> None:
    """Window 9, sink 3, blocks of 3: [S | 3 frames | block], S <- 0.999 S + 0.001 of the block that leaves."""
    cache = new_cache(9, 3)
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(LAYERS)]  # per layer, blocks; the first is the sink
    for block in range(8):
        seen, visible = ordered(cache, block, 3)
        assert len(visible) == min(9, 3 * (block + 1))
        for layer, blocks in enumerate(kept):
            if len(blocks) == 3:
                gone = blocks.pop(1)
                blocks[0] = tuple(SHARE * s + (1 - SHARE) * e for s, e in zip(blocks[0], gone, strict=True))  # type: ignore[assignment]
            blocks.append(keys(block, layer, 3))
            rope = rope_table(torch.arange(3.0 * len(blocks), dtype=torch.float64), *GRID, WIDTH, 10000.0)
            k = apply_rope(torch.cat([one for one, _ in blocks], 2), *rope)
            torch.testing.assert_close(seen[layer][0], k, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(seen[layer][1], torch.cat([v for _, v in blocks], 2), rtol=1e-6, atol=1e-7)
    plain = new_cache(9, 3, "relative")
    for block in range(8):
        last, _ = ordered(plain, block, 3)
    difference = (last[0][1] - seen[0][1])[:, :, : 3 * TOKENS].abs().max()
    assert difference > 1e-3  # five blocks' shares: what this test would miss


def test_single_frames_fold_into_the_sink_frame_of_their_place() -> None:
    cache = new_cache(4, 2)
    sink = [keys(block, 0, 1)[1] for block in range(2)]
    for block in range(7):
        seen, visible = ordered(cache, block, 1)
        gone = block - 2  # a ring of two: the frame two before this one leaves with it
        if gone >= 2:
            sink[gone % 2] = SHARE * sink[gone % 2] + (1 - SHARE) * keys(gone, 0, 1)[1]
        assert visible[:2] == list(range(min(block + 1, 2)))
        if block:
            torch.testing.assert_close(seen[0][1][:, :, : 2 * TOKENS], torch.cat(sink, 2), rtol=1e-6, atol=1e-7)


def test_without_a_sink_or_before_a_roll_it_is_relative() -> None:
    for window, sink, blocks in ((6, 0, 5), (9, 3, 3)):
        one, other = new_cache(window, sink), new_cache(window, sink, "relative")
        for block in range(blocks):
            for mine, theirs in zip(ordered(one, block, 3)[0], ordered(other, block, 3)[0], strict=True):
                assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


def test_a_recache_folds_nothing_and_a_saved_cache_goes_on() -> None:
    cache = new_cache(9, 3)
    for block in range(5):
        ordered(cache, block, 3)
    sink = cache.v[..., : 3 * TOKENS, :].clone()
    handle = cache.begin_recache()
    for layer in range(LAYERS):
        handle.append(layer, *keys(50, layer, 6))
    cache.commit(handle)
    assert torch.equal(cache.v[..., : 3 * TOKENS, :], sink)
    other = new_cache(9, 3)
    other.load_state_dict(cache.state_dict())
    for mine, theirs in zip(ordered(cache, 5, 3)[0], ordered(other, 5, 3)[0], strict=True):
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
    assert torch.equal(cache.v, other.v)


def test_streams_with_it_differ_late_and_what_cannot_have_it_says_so(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m")
    pipe = StreamPipeline.from_pretrained(folder, dtype="fp32")
    streams = [pipe.stream("a red star over snow", cache=cache) for cache in ("relative", "ema_sink")]
    kept = []
    for stream in streams:
        for _ in range(5):
            next(stream)
        kept.append(stream.state.cache.v[..., : pipe.geometry.tokens_per_frame, :].clone())
    assert (kept[0] - kept[1]).abs().max() > 1e-6
    with pytest.raises(UserError, match="averages of ema_sink need the model's own dtype"):
        pipe.stream("a red star", cache="ema_sink", cache_dtype="int8")
    with pytest.raises(UserError, match="cannot be made again from latents"):
        check_job(Job(model=str(folder), split="step_chain", ranks=2, steps=2, cache="ema_sink", force=True), pipe)
