"""Rotary embedding against Wan's own arithmetic (complex128, a table per axis) written out."""

import pytest
import torch

from streamgen.rope import apply_rope, rope_table


def wan_rope(x_BNTK, frames, height, width):
    """As in Wan: one frequency table per axis, indexed by whole positions, multiplied as complex128."""
    half = x_BNTK.shape[-1] // 2
    sizes = (half - 2 * (half * 2 // 6), half * 2 // 6, half * 2 // 6)
    rows = [(f, h, w) for f in frames for h in range(height) for w in range(width)]
    freqs = torch.empty(len(rows), half, dtype=torch.complex128)
    for t, places in enumerate(rows):
        angles = [
            place / 10000 ** (2 * i / (2 * size))
            for place, size in zip(places, sizes, strict=True)
            for i in range(size)
        ]
        freqs[t] = torch.polar(torch.ones(half, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
    x = torch.view_as_complex(x_BNTK.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(x * freqs).flatten(-2)


@pytest.mark.parametrize("head_dim", [6, 32, 64, 128])
def test_equals_wan(head_dim):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 24, head_dim)
    cos, sin = rope_table([0, 1, 900, 1021], 2, 3, head_dim)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (24, head_dim // 2)
    wanted = wan_rope(x, [0, 1, 900, 1021], 2, 3)
    torch.testing.assert_close(apply_rope(x, cos, sin).double(), wanted, atol=2e-6, rtol=0)
    compiled = torch.compile(apply_rope, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, cos, sin).double(), wanted, atol=2e-6, rtol=0)


def test_only_distances_matter_however_far():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 6, 64)

    def scores(first):
        cos, sin = rope_table(torch.arange(3) + first, 1, 2, 64)
        return apply_rope(q, cos, sin) @ apply_rope(k, cos, sin).mT

    for first in (5, 0.5, 10_000_000):
        torch.testing.assert_close(scores(first), scores(0), atol=2e-5, rtol=0)


def test_dtype_and_transposed_input():
    x = torch.randn(1, 4, 2, 32, dtype=torch.bfloat16).transpose(1, 2)
    cos, sin = rope_table([3], 2, 2, 32)
    y = apply_rope(x, cos, sin)
    assert y.dtype == torch.bfloat16 and y.is_contiguous()
    torch.testing.assert_close(y, apply_rope(x.float(), cos, sin).bfloat16())


def test_bad_head():
    with pytest.raises(ValueError, match="head_dim=7"):
        rope_table([0], 1, 1, 7)
