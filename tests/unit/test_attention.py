"""Masks against a brute-force double loop over a simulated ring, backends against each other."""

import pytest
import torch

from streamgen.attention import BACKENDS, attend, block_causal_mask, teacher_forcing_mask

LAYOUTS = [
    ([3, 3, 3, 3, 3, 3], None, 0),
    ([3, 3, 3, 3, 3, 3], 9, 3),
    ([3, 3, 3, 3, 3, 3], 9, 0),
    ([3] * 7, 13, 1),
    ([1, 3, 3, 3, 3, 3], 8, 2),
    ([1, 3, 3, 3], 4, 1),
    ([1] * 8, 3, 1),
    ([2, 2], 2, 0),
]
EACH = pytest.mark.parametrize(("sizes", "window", "sink"), LAYOUTS, ids=str)


def ring(sizes, window, sink):
    """Per block, the past frames that a list cache holds while the block is made (oldest evicted after the sink)."""
    held, start, past = [], 0, []
    for size in sizes:
        block = list(range(start, start + size))
        while window is not None and len(held) + size > window:
            held.pop(sink)
        past.append(list(held))
        held += block
        start += size
    return past


@EACH
@pytest.mark.parametrize("tokens", [1, 2])
def test_masks_equal_a_double_loop(sizes, window, sink, tokens):
    past, total = ring(sizes, window, sink), sum(sizes)
    block_of = [b for b, size in enumerate(sizes) for _ in range(size)]
    causal = block_causal_mask(sizes, tokens, window_frames=window, sink_frames=sink)
    forced = teacher_forcing_mask(sizes, tokens, window_frames=window, sink_frames=sink)
    assert causal.shape == (total * tokens,) * 2 and forced.shape == (2 * total * tokens,) * 2
    assert torch.equal(forced[: total * tokens, : total * tokens], causal)
    for q in range(2 * total * tokens):
        for k in range(2 * total * tokens):
            (q_copy, q_frame), (k_copy, k_frame) = divmod(q // tokens, total), divmod(k // tokens, total)
            own = q_copy == k_copy and block_of[q_frame] == block_of[k_frame]
            seen = own or (k_copy == 0 and k_frame in past[block_of[q_frame]])
            assert forced[q, k] == seen, (q, k)


def test_window_must_hold_sink_and_block():
    with pytest.raises(ValueError, match="window_frames=5"):
        block_causal_mask([3, 3], 1, window_frames=5, sink_frames=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_backends_agree(dtype, masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 12, 16).to(dtype).double()
    mask = block_causal_mask([3, 3], 2) if masked else None
    scores = q @ k.mT / 16**0.5
    wanted = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v
    for name in BACKENDS:
        got = attend(q.to(dtype), k.to(dtype), v.to(dtype), mask, name)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=0)


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend='flash9'.*sdpa"):
        attend(*torch.zeros(3, 1, 1, 1, 8), backend="flash9")
