"""Masks against a brute-force double loop over a simulated ring, backends against each other."""

import pytest
import torch

from streamgen import attention
from streamgen.attention import BACKENDS, attend, check_trainable
from streamgen.errors import UserError
from streamgen.visibility import Layout, block_causal_mask, dense_mask, flex_mask, span_mask, teacher_forcing_mask

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

# what the noisy copy sees: copies, lag, first blocks of joint windows
CLEAN, NOISY = True, False
CONTEXTS = {
    "teacher forcing": ((CLEAN, NOISY), 1, ()),
    "diffusion forcing, same level": ((NOISY,), 1, ()),
    "lagged by 2": ((CLEAN, NOISY), 2, ()),
    "lagged by 3": ((CLEAN, NOISY), 3, ()),
    "windows of 2": ((CLEAN, NOISY), 1, (0, 2, 4)),
    "windows after a short one": ((CLEAN, NOISY), 1, (0, 1, 3, 5)),
    "windows, lagged": ((CLEAN, NOISY), 2, (0, 2, 4)),
    "bidirectional": ((NOISY,), 1, (0,)),
}


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


def listed(sizes, window, sink, copies, lag, starts):
    """[(copy, frame)] of a sequence, and for each of them the set of (copy, frame) that it sees."""
    blocks, total = len(sizes), sum(sizes)
    frames_of = [range(sum(sizes[:b]), sum(sizes[: b + 1])) for b in range(blocks)]
    block_of = [b for b, frames in enumerate(frames_of) for _ in frames]
    sequence, seen = [(copy, frame) for copy in copies for frame in range(total)], []
    for copy, frame in sequence:
        first, stop = block_of[frame], block_of[frame] + 1
        if copy is NOISY and starts:
            first = max(start for start in starts if start <= block_of[frame])
            stop = min([start for start in starts if start > first] + [blocks])
        own = [f for b in range(first, stop) for f in frames_of[b]]
        held = [f for b in range(first) for f in frames_of[b]]
        while window is not None and len(held) + len(own) > window:
            held.pop(sink)
        sees = {(copy, f) for f in own}
        for f in held:
            finished = CLEAN in copies and block_of[f] <= first - lag
            sees.add((CLEAN if copy is CLEAN or finished else NOISY, f))
        seen.append(sees)
    return sequence, seen


@pytest.mark.parametrize(("sizes", "window", "sink"), [([2] * 6, 7, 2), ([3] * 6, None, 0), ([1, 2, 2, 2, 2, 2], 6, 1)])
@pytest.mark.parametrize("name", CONTEXTS)
def test_every_context_equals_a_double_loop(sizes, window, sink, name):
    copies, lag, starts = CONTEXTS[name]
    if name == "bidirectional":
        window = None
    layout = Layout(
        block_frames=tuple(sizes),
        copies=copies,
        window_starts=starts,
        lag_blocks=lag,
        window_frames=window,
        sink_frames=sink,
    )
    sequence, seen = listed(sizes, window, sink, copies, lag, starts)
    mask = dense_mask(layout, 2)
    assert mask.shape == (2 * len(sequence),) * 2
    assert any(len({copy for copy, _ in sees}) == 2 for sees in seen) == (len(copies) == 2)
    for q in range(len(mask)):
        for k in range(len(mask)):
            assert mask[q, k] == (sequence[k // 2] in seen[q // 2]), (sequence[q // 2], sequence[k // 2])
    rule = flex_mask(layout, 2).mask_mod  # the same rule, asked token by token
    at = torch.arange(len(mask))
    assert torch.equal(rule(torch.tensor(0), torch.tensor(0), at[:, None], at), mask)
    assert torch.equal(written_out(span_mask(layout, 2)), mask)


def written_out(spans):
    """Bool [T, T]; every query is in one group."""
    mask = torch.zeros(spans.tokens, spans.tokens, dtype=torch.int64)
    for (start, stop), keys in spans.seen:
        for a, b in keys:
            mask[start:stop, a:b] += 1
    assert [start for (start, _), _ in spans.seen] == [0, *(stop for (_, stop), _ in spans.seen)][:-1]
    return mask.bool() if mask.max() == 1 else None


def test_window_must_hold_sink_and_block():
    with pytest.raises(ValueError, match="window_frames=5: must be at least 6"):
        block_causal_mask([3, 3], 1, window_frames=5, sink_frames=3)
    with pytest.raises(ValueError, match="window_frames=8: must be at least 9"):
        Layout(
            block_frames=(3,) * 4, copies=(CLEAN, NOISY), window_starts=(0, 2), window_frames=8, sink_frames=3
        )  # two blocks together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_starts": (1, 2)}, "must rise from 0"),
        ({"window_starts": (0, 2, 2)}, "must rise from 0"),
        ({"window_starts": (0, 3)}, "within 3 blocks"),
        ({"lag_blocks": 0}, "lag_blocks=0"),
    ],
)
def test_layouts_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        Layout(block_frames=(2, 2, 2), copies=(CLEAN, NOISY), **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_backends_agree(dtype, masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 12, 16).to(dtype).double()
    layout = Layout(block_frames=(3, 3), copies=(True,))
    masks = {"flex": flex_mask(layout, 2), "spans": span_mask(layout, 2)} if masked else {}
    mask = block_causal_mask([3, 3], 2) if masked else None
    scores = q @ k.mT / 16**0.5
    wanted = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v
    for name in [name for name, backend in BACKENDS.items() if backend.masks]:  # the others: test_attention_choice.py
        got = attend(q.to(dtype), k.to(dtype), v.to(dtype), masks.get(name, mask), name)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("tokens", [4, 8])  # 160 tokens, and 320: with a rest of 128 and more than two blocks
def test_flex_equals_dense_where_blocks_of_128_tokens_are_cut(tokens):
    torch.manual_seed(0)
    layout = Layout(
        block_frames=(4,) * 5, copies=(CLEAN, NOISY), window_starts=(0, 1, 3), window_frames=13, sink_frames=3
    )
    q, k, v = torch.randn(3, 1, 2, 40 * tokens, 16)
    got = attend(q, k, v, flex_mask(layout, tokens), "flex")
    torch.testing.assert_close(got, attend(q, k, v, dense_mask(layout, tokens)), atol=1e-6, rtol=0)


def test_a_block_mask_fits_its_own_length_alone():
    """The op itself would cut a longer one, and show the wrong places."""
    mask = flex_mask(Layout(block_frames=(3, 3), copies=(True,)), 2)
    with pytest.raises(ValueError, match=r"block mask for 12 x 12 tokens.*10 x 12"):
        attend(torch.zeros(1, 1, 10, 16), *torch.zeros(2, 1, 1, 12, 16), mask, "flex")
    with pytest.raises(ValueError, match="dense mask"):
        attend(*torch.zeros(3, 1, 1, 12, 16), block_causal_mask([3, 3], 2), "flex")


def test_gradients_of_spans_are_those_of_a_dense_mask():
    torch.manual_seed(0)
    layout = Layout(block_frames=(2, 3, 3), copies=(CLEAN, NOISY), window_frames=6, sink_frames=2)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 3, 32, 8).double())
    upstream = torch.randn(2, 3, 32, 8).double()
    outs = [
        attend(q, k, v, mask, name) for name, mask in (("math", dense_mask(layout, 2)), ("spans", span_mask(layout, 2)))
    ]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-12, rtol=0)
    wanted, got = (torch.autograd.grad(out, (q, k, v), upstream) for out in outs)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_spans_fit_their_own_length_alone():
    mask = span_mask(Layout(block_frames=(3, 3), copies=(True,)), 2)
    with pytest.raises(ValueError, match=r"spans of 12 tokens.*10 x 12"):
        attend(torch.zeros(1, 1, 10, 16), *torch.zeros(2, 1, 1, 12, 16), mask, "spans")
    with pytest.raises(ValueError, match="got a Tensor"):
        attend(*torch.zeros(3, 1, 1, 12, 16), block_causal_mask([3, 3], 2), "spans")


def test_flex_does_not_train_on_a_cpu():
    with pytest.raises(UserError, match="no backward on a CPU; train with sdpa, math or spans there"):
        check_trainable("flex", torch.device("cpu"))
    check_trainable("flex", torch.device("meta"))
    check_trainable("math", torch.device("cpu"))


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend='flash9'.*sdpa"):
        attend(*torch.zeros(3, 1, 1, 1, 8), backend="flash9")


@pytest.mark.parametrize("case", ["bf16", "fp32", "grad", "mask", "many scores"])
def test_auto_takes_products_for_few_bf16_scores_on_a_cpu_alone(case, monkeypatch):
    """By a rule, so that a stream comes out the same in every process; and right, with a cache's strided views."""
    taken = []
    real = attention._products
    monkeypatch.setattr(attention, "_products", lambda *args: taken.append(1) or real(*args))
    if case == "many scores":
        monkeypatch.setattr(attention, "SMALL_SCORES", 2 * 3 * 10 * 12 - 1)
    torch.manual_seed(0)
    dtype = torch.float32 if case == "fp32" else torch.bfloat16
    q = torch.randn(2, 3, 10, 16).to(dtype)
    k, v = (torch.randn(2, 3, 40, 16).to(dtype)[:, :, :12] for _ in range(2))
    mask = torch.ones(10, 12, dtype=torch.bool) if case == "mask" else None
    with torch.set_grad_enabled(case == "grad"):
        got = attend(q, k, v, mask, "auto")
    assert bool(taken) == (case == "bf16")
    wanted = (q.double() @ k.double().mT / 4).softmax(-1) @ v.double()
    torch.testing.assert_close(got.double(), wanted, atol=1e-6 if case == "fp32" else 2e-2, rtol=0)
