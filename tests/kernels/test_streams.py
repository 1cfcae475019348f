"""A whole stream by the kernels equals the same stream by the reference table: the ring wraps, a sink, a recache.

In float32 latents differ by 2e-5 of their largest value at most: after four blocks of three passes each.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from streamgen import ops
from streamgen.cache import CacheSpec, KVCache, QuantisedKVCache, RowsCache
from streamgen.cached_attention import Projected
from streamgen.flow import step_sigmas
from streamgen.geometry import VideoGeometry
from streamgen.rollout import Sampling, StreamState, rollout_block
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig

CONFIG = TransformerConfig(
    dim=36, ffn_dim=40, num_heads=3, num_layers=2, in_channels=3, out_channels=3, text_dim=10, text_len=5, freq_dim=8
)
GEOMETRY = VideoGeometry(height=32, width=48, latent_channels=3, block_frames=2)
SPEC = CacheSpec(
    num_layers=2, num_heads=3, head_dim=12, grid_height=2, grid_width=3, window_frames=5, sink_frames=1, policy="window"
)
SAMPLING = Sampling(sigmas=step_sigmas(2, 5.0))
BLOCKS = 4


def make_model(device: torch.device) -> CausalWanModel:
    torch.manual_seed(0)
    model = CausalWanModel(CONFIG).to(device).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_text(model: CausalWanModel, rows: int = 1):
    text = torch.randn(rows, 1, 5, 10, generator=torch.Generator().manual_seed(1))
    return model.encode_text(text.to(model.head.modulation.device))


@torch.no_grad()
def run(
    model: CausalWanModel,
    cache: KVCache,
    recache_at: int | None = 3,
    blocks: int = BLOCKS,
    sampling: Sampling = SAMPLING,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Latents of every block, and what the cache holds at the end."""
    state = StreamState(geometry=GEOMETRY, cache=cache, seeds=tuple(range(7, 7 + cache.k.shape[1])), ops=model.ops)
    text = make_text(model, cache.k.shape[1])
    made = [
        rollout_block(model, state, text, sampling, transition="recache" if block == recache_at else None)
        for block in range(blocks)
    ]
    return made, cache.state_dict()


def compared(device: torch.device, make_cache, **options) -> tuple[tuple, tuple]:
    model, found = make_model(device), []
    for backend in ("reference", "triton"):
        model.ops = ops.select(backend)
        found.append(run(model, make_cache(), **options))
    return found[0], found[1]


def assert_near(got: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    assert float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize(("policy", "batch"), [("window", 2), ("relative", 1)])
def test_stream_is_the_same(device, policy, batch):
    wanted, got = compared(device, lambda: KVCache(replace(SPEC, policy=policy), batch=batch, device=device))
    for one, other in zip(got[0], wanted[0], strict=True):
        assert_near(one, other)
    for name in ("k", "v"):
        assert_near(got[1][name], wanted[1][name])
    assert len({float(block.sum()) for block in wanted[0]}) == BLOCKS


@pytest.mark.parametrize(("policy", "storage"), [("window", "fp8"), ("window", "int8"), ("relative", "int8")])
def test_stream_of_a_cache_of_codes(device, policy, storage):
    """A value on the edge of two codes may fall either way, and later blocks see it."""
    spec = replace(SPEC, policy=policy)
    wanted, got = compared(device, lambda: QuantisedKVCache(spec, storage=storage, device=device), recache_at=None)
    assert_near(got[0][0], wanted[0][0])  # sees no code
    for one, other in zip(got[0], wanted[0], strict=True):
        assert_near(one, other, 2e-2)
    exact, _ = run(make_model(device), KVCache(spec, device=device), recache_at=None)
    assert float((got[0][-1] - exact[-1]).abs().max()) > 1e-4  # of codes indeed


@torch.inference_mode()
def test_rows_at_different_places(device):
    """Two streams share a forward at other positions and lengths: each reads and writes its own ring."""
    model, found = make_model(device), []
    for backend in ("reference", "triton"):
        model.ops = ops.select(backend)
        caches = [KVCache(SPEC, device=device) for _ in range(2)]
        for number, blocks in enumerate((1, 3)):  # the second stream's ring has wrapped
            text = make_text(model)
            for block in range(blocks):
                handle = caches[number].begin(2 * block, 2)
                model(noise(block, 1), torch.zeros(1, 1, device=device), text, cache=handle)
                caches[number].commit(handle)
        handles = [cache.begin(2 * blocks, 2) for cache, blocks in zip(caches, (1, 3), strict=True)]
        out = model(noise(9, 2), torch.full((2, 1), 500.0), make_text(model, 2), cache=RowsCache(handles))
        found.append((out, *(cache.k for cache in caches), *(cache.v for cache in caches)))
    for got, wanted in zip(found[1], found[0], strict=True):
        assert_near(got, wanted)


def noise(seed: int, rows: int) -> Tensor:
    return torch.randn(rows, 2, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


def test_what_the_ring_is_not_written_for(device):
    """Gradients, a pass that peeks and a mask go part by part, and leave the ring as it was."""
    calls = []
    table = ops.select("triton")
    model = make_model(device)
    cache = KVCache(SPEC, device=device)
    projected = Projected(
        *(torch.randn(1, 12, 36, requires_grad=True) for _ in range(3)), None, None, 1e-6, 3, cache.rope([0, 1])
    )
    handle = cache.begin(0, 2)
    append = handle.append
    handle.append = lambda *given: calls.append(given) or append(*given)  # type: ignore[method-assign]
    out = table.attend_cached(handle, 0, projected, None, "sdpa")
    torch.autograd.grad(out.sum(), projected.q_BTD)
    with torch.no_grad():
        peeked = table.attend_cached(cache.begin(0, 2, peek=True), 0, projected, None, "sdpa")
        assert len(calls) == 1 and not cache.k.any()
        written = table.attend_cached(handle, 0, projected, None, "sdpa")
        assert len(calls) == 1 and cache.k[0].any() and handle.written == {0}
    assert_near(peeked, out.detach())
    assert_near(written, out.detach())
    assert model.ops.attend_cached is ops.select().attend_cached
