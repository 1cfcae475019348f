"""Products through oneDNN: equal to the plain ones but for rounding, and only where nobody differentiates."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from streamgen import linear as module
from streamgen.linear import (
    Linear,
    attend_by_heads,
    attends_by_heads,
    fuses_gelu,
    linear,
    linear_gelu,
    mkl_is_slow,
)
from streamgen.transformer import Block, Call
from streamgen.transformer_config import TransformerConfig

CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=1, in_channels=4, out_channels=4, text_dim=8, text_len=7
)


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "mkl_is_slow", lambda: True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("rows", [(40,), (2, 3, 17)])
def test_equal_but_for_rounding(dtype: torch.dtype, tolerance: float, rows: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Linear(24, 40).to(dtype)
    x = torch.randn(*rows, 24, generator=generator).to(dtype)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        assert fuses_gelu(x, layer)
        out, wide = layer(x), linear_gelu(x, layer)
        bare = linear(x, layer.weight, None)
    assert out.dtype == wide.dtype == dtype and out.shape == wide.shape == (*rows, 40)
    scale = exact.abs().max()
    assert (out - exact).abs().max() < tolerance * scale
    assert (wide - F.gelu(exact, approximate="tanh")).abs().max() < tolerance * scale
    assert (bare + layer.bias - exact).abs().max() < 2 * tolerance * scale


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    """Streams share forwards, and come out as they do alone."""
    layer, x = Linear(64, 96), torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(layer(x)[:32], layer(x[:32]))
        assert torch.equal(linear_gelu(x, layer)[:32], linear_gelu(x[:32], layer))


@torch.no_grad()
def test_attention_by_heads() -> None:
    """Of a view of a longer cache, whose rows are strided; a stream alone is equal to the bit."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 20, 16, generator=generator)
    k, v = (torch.randn(2, 3, 100, 16, generator=generator)[:, :, :70] for _ in range(2))
    out = attend_by_heads(q, k, v)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=0)
    assert torch.equal(out[1:], attend_by_heads(q[1:], k[1:], v[1:]))
    assert attends_by_heads(q, k) and not attends_by_heads(q, k[:, :, :63]) and not attends_by_heads(q.bfloat16(), k)
    with torch.enable_grad():
        assert not attends_by_heads(q, k)


def test_who_differentiates_gets_gradients() -> None:
    layer, x = Linear(24, 40), torch.randn(40, 24, requires_grad=True)
    assert not fuses_gelu(x, layer)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None


@torch.no_grad()
def test_not_for_few_rows_other_dtypes_and_wrapped_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Linear(24, 40)
    assert not fuses_gelu(torch.randn(15, 24), layer) and fuses_gelu(torch.randn(16, 24), layer)
    assert not fuses_gelu(torch.randn(16, 24).double(), layer.double())
    assert not fuses_gelu(torch.randn(16, 24), torch.nn.Linear(24, 40))
    assert not fuses_gelu(torch.randn(16, 24).bfloat16(), Linear(24, 40))  # mixed: as torch says
    monkeypatch.setattr(module, "mkl_is_slow", lambda: False)
    assert not fuses_gelu(torch.randn(16, 24), layer.float()) and fuses_gelu(
        torch.randn(16, 24).bfloat16(), layer.bfloat16()
    )


def test_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for maker, slow in (("GenuineIntel", False), ("AuthenticAMD", True)):
        file = tmp_path / maker
        file.write_text(f"processor\t: 0\nvendor_id\t: {maker}\nmodel\t: 2\n")
        monkeypatch.setattr(module, "CPUINFO", file)
        mkl_is_slow.cache_clear()
        assert mkl_is_slow() is slow
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "none")
    mkl_is_slow.cache_clear()
    assert mkl_is_slow() is False
    monkeypatch.undo()
    mkl_is_slow.cache_clear()


@torch.no_grad()
def test_the_feed_forward_is_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamgen.ops import Ops

    assert Call.__annotations__["ops"] is Ops
    block, x = Block(CONFIG), torch.randn(1, 3, 8, 24, generator=torch.Generator().manual_seed(0))
    fused = block.widen(x, Ops())
    monkeypatch.setattr("streamgen.transformer.fuses_gelu", lambda x, layer: False)
    plain = block.widen(x, Ops())
    torch.testing.assert_close(fused, plain, atol=2e-6, rtol=0)
    other = block.widen(x, Ops(gelu_tanh=lambda y: y * 0))  # another backend's operation is not passed over
    assert not other.any()
