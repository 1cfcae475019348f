"""Attention over the ring where it lies: lengths, pages, what must not be read, and the cache's own answer."""

import pytest
import torch

from streamgen.cache import CacheSpec, KVCache
from streamgen.ops import rms_norm, rms_norm_rope
from streamgen_kernels.attention import attend, reference, ring_attention
from streamgen_kernels.norm_rope_store import norm_rope_store
from streamgen_kernels.quantise import quantise_rows

B, N, K = 3, 2, 12


def normal(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device)


def ints(values: object, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)


def test_nothing_beyond_a_rows_length_is_read(device):
    torch.manual_seed(0)
    q, k, v = (normal(B, N, n, K, device=device) for n in (5, 90, 90))
    lengths = ints([90, 67, 3], device)
    wanted = reference(q, k, v, lengths, ints([[0]] * B, device), 90)
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:], v[b, :, length:] = torch.nan, torch.nan
    close(ring_attention(q, k, v, lengths), wanted)


def test_pages_are_read_through_their_table(device):
    """Rows with other pages, in another order, and pages that are not visible hold NaN."""
    torch.manual_seed(0)
    q, k, v, block_k, block_v = (normal(B, N, n, K, device=device) for n in (9, 70, 70, 9, 9))
    pages, lengths = ints([[4, 0, 3], [1, 2, 3], [3, 6, 0]], device), ints([30, 20, 10], device)
    wanted = reference(q, k, v, lengths, pages, 10, block_k, block_v)
    for b in range(B):
        seen = pages[b, : int(lengths[b]) // 10].tolist()
        for page in set(range(7)) - set(seen):
            k[b, :, page * 10 : page * 10 + 10], v[b, :, page * 10 : page * 10 + 10] = torch.nan, torch.nan
    close(ring_attention(q, k, v, lengths, pages, 10, block_k_BNTK=block_k, block_v_BNTK=block_v), wanted)


def test_an_empty_ring_leaves_the_block_and_nothing_leaves_zero(device):
    torch.manual_seed(0)
    q, k, v, block_k, block_v = (normal(B, N, n, K, device=device) for n in (5, 8, 8, 5, 5))
    none = ints([0] * B, device)
    alone = ring_attention(q, k, v, none, block_k_BNTK=block_k, block_v_BNTK=block_v)
    close(alone, torch.nn.functional.scaled_dot_product_attention(q, block_k, block_v))
    assert ring_attention(q, k, v, none).eq(0).all()


def test_large_scores(device):
    """The maximum rises from tile to tile, by more than a float's exponent."""
    torch.manual_seed(0)
    q, k, v = (normal(1, 1, n, 16, device=device) for n in (4, 200, 200))
    k = k * torch.linspace(0, 300, 200, device=device)[:, None]
    wanted = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double()).float()
    torch.testing.assert_close(attend(q, k, v), wanted, atol=1e-4, rtol=1e-4)


def test_views_of_a_longer_buffer(device):
    torch.manual_seed(0)
    buffer = normal(2, B, N, 40, K, device=device)
    q = normal(B, 6, N, K, device=device).transpose(1, 2)
    k, v = buffer[0, :, :, :25], buffer[1, :, :, :25]
    close(attend(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_stored_in_one_byte(device, dtype):
    """Exactly attention over what was stored, and near that over what was meant; half the bytes of 16 bits."""
    torch.manual_seed(0)
    q, k, v = (normal(B, N, n, 128, device=device) for n in (4, 70, 70))
    (kq, k_scale), (vq, v_scale) = quantise_rows(k, dtype), quantise_rows(v, dtype)
    k_scale, v_scale = k_scale.half(), v_scale.half()
    assert k.numel() * 2 >= 1.9 * (kq.nbytes + k_scale.nbytes)
    lengths = ints([70, 64, 1], device)
    got = ring_attention(q, kq, vq, lengths, k_scale_BNS=k_scale, v_scale_BNS=v_scale)
    brought_back = [x.float() * s.float()[..., None] for x, s in ((kq, k_scale), (vq, v_scale))]
    close(got, ring_attention(q, *brought_back, lengths))
    exact = ring_attention(q, k, v, lengths)
    assert (got - exact).norm() / exact.norm() < {torch.int8: 0.02, torch.float8_e4m3fn: 0.06}[dtype]


@pytest.mark.parametrize("policy", ["relative", "window"])
def test_the_same_stream_as_the_cache(device, policy):
    """Seven blocks through a ring of five frames with a sink: store and attend are what `KVCache.append` gives."""
    torch.manual_seed(0)
    frames, tokens, heads = 2, 4, 3
    spec = CacheSpec(
        num_layers=1, num_heads=heads, head_dim=12, grid_height=2, grid_width=2, window_frames=5, sink_frames=1,
        policy=policy,
    )  # fmt: skip
    cache = KVCache(spec, device=device)
    rings = tuple(torch.full_like(cache.k[0], torch.nan) for _ in "kv")
    weights = normal(36, device=device), normal(36, device=device)
    for block in range(7):
        qkv = tuple(normal(1, frames * tokens, 36, device=device) for _ in "qkv")
        handle = cache.begin(block * frames, frames)
        k = rms_norm(qkv[1], weights[1], 1e-6, heads)
        seen = handle.append(0, k, rms_norm(qkv[2], None, 1e-6, heads))
        wanted = torch.nn.functional.scaled_dot_product_attention(
            rms_norm_rope(qkv[0], weights[0], 1e-6, heads, *handle.rope()), *seen
        )
        cache.commit(handle)
        slots = [cache.policy.slot(f, spec.window_frames, spec.sink_frames) for f in handle.visible_frames]
        places = ints([[slot * tokens + i for slot in slots[-frames:] for i in range(tokens)]], device)
        raw = torch.zeros_like(rings[0])
        q = norm_rope_store(qkv, weights, 1e-6, handle.rope(), places, rings, raw)
        close(raw[:, :, places[0].long()], k)
        if not cache.policy.stores_rotated:  # positions moved: the cache turned its context anew
            rings[0].copy_(cache.read_k[0])
        # As one view of the ring, which holds the block already; and the past by its pages, with the block beside it.
        lengths = ints([len(slots) * tokens], device)
        close(ring_attention(q, *rings, lengths), wanted)
        pages = ints([[*slots[:-frames], 0]], device)
        past = ints([(len(slots) - frames) * tokens], device)
        own = [ring[:, :, places[0].long()] for ring in rings]
        close(ring_attention(q, *rings, past, pages, tokens, block_k_BNTK=own[0], block_v_BNTK=own[1]), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths_B": torch.zeros(1)}, "lengths is torch.float32: must be int32"),
        ({"lengths_B": torch.zeros(2, dtype=torch.int32)}, r"lengths is \[2\]: must be \[1\]"),
        ({"ring_v_BNSK": torch.zeros(1, 2, 5, 8)}, r"ring_v is \[1, 2, 5, 8\]: must be \[1, 2, 6, 8\]"),
        ({"ring_v_BNSK": torch.zeros(1, 2, 6, 8).half()}, "keys and values must both be one of"),
        ({"block_k_BNTK": torch.zeros(1, 2, 4, 8)}, "give both or neither"),
        ({"k_scale_BNS": torch.zeros(1, 2, 6)}, "k_scale: a ring of torch.float32 has no scales"),
        ({"pages_BP": torch.zeros(2, 3, dtype=torch.int32)}, r"pages is \[2, 3\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_go_together(device, changes, message):
    given = {name: torch.zeros(1, 2, 6, 8) for name in ("q_BNTK", "ring_k_BNSK", "ring_v_BNSK")}
    given |= {"lengths_B": torch.zeros(1, dtype=torch.int32), **changes}
    with pytest.raises(ValueError, match=message):
        ring_attention(**{name: value.to(device) for name, value in given.items()})
