"""The backends "triton" of operations and of attention: the transformer is the same, and what cannot run says so."""

import sys

import pytest
import torch

from streamgen import attention, ops
from streamgen.errors import UserError
from streamgen.rope import apply_rope, rope_table
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig
from streamgen_kernels import gate_residual, gelu, norm_modulate, norm_rope

CONFIG = TransformerConfig(
    dim=36, ffn_dim=40, num_heads=3, num_layers=2, in_channels=3, out_channels=3, text_dim=10, text_len=5
)


def run(model: CausalWanModel, device: torch.device) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(size, generator=random).to(device) for size in ((2, 3, 3, 4, 6), (2, 1, 5, 10)))
    rope = tuple(table.to(device) for table in rope_table([0, 1, 2], 2, 3, CONFIG.head_dim, CONFIG.rope_theta))
    return model(latents, torch.tensor([[0.0, 500, 937.5]] * 2, device=device), model.encode_text(text), rope=rope)


def test_transformer_is_the_same(device):
    """Forward and all gradients, with frames of different noise levels."""
    torch.manual_seed(0)
    model = CausalWanModel(CONFIG).to(device)
    torch.nn.init.normal_(model.head.head.weight)
    torch.nn.init.normal_(model.blocks[0].self_attn.norm_q.weight)
    assert set(model.ops.active().values()) == {"streamgen.ops"}
    found = []
    for backend in ("reference", "triton"):
        model.ops = ops.select(backend)
        model.zero_grad()
        out = run(model, device)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters())])
    modules = model.ops.active()
    assert modules.pop("attend_cached") == "streamgen.cached_attention"  # of kernels, see test_streams.py
    assert all(name.startswith("streamgen_kernels.") for name in modules.values())
    for got, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=1e-4)


def test_attention_is_the_same(device):
    torch.manual_seed(0)
    model = CausalWanModel(CONFIG).to(device).requires_grad_(False)
    torch.nn.init.normal_(model.head.head.weight)
    wanted = run(model, device)
    model.attention_backend = "triton"
    torch.testing.assert_close(run(model, device), wanted, atol=1e-5, rtol=1e-4)


def test_attention_has_limits(device):
    q = torch.zeros(1, 1, 4, 8, device=device)
    with pytest.raises(ValueError, match="got a mask"):
        attention.attend(q, q, q, torch.ones(4, 4, dtype=torch.bool, device=device), "triton")
    with pytest.raises(UserError, match="attention_backend=triton has no backward"):
        attention.check_trainable("triton", device)


def test_references_are_those_of_the_transformer(device):
    """Two packages hold a reference of each: they may not drift apart."""
    torch.manual_seed(0)
    x, y, row = torch.randn(2, 3, 4, 12), torch.randn(2, 3, 4, 12), torch.randn(2, 3, 1, 12)
    torch.testing.assert_close(
        norm_modulate.reference(x, row, row, 1e-6), ops.layer_norm_modulate(x, row, row, 1e-6), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(gate_residual.reference(x, y, row), ops.gate_residual(x, y, row))
    torch.testing.assert_close(gelu.reference(x), ops.gelu_tanh(x))
    tables = rope_table([3.0, 4.5, 9], 2, 2, 12)
    heads = norm_rope.reference(x.flatten(1, 2), torch.ones(12), 1e-6, 1, *tables)
    torch.testing.assert_close(heads, ops.rms_norm_rope(x.flatten(1, 2), torch.ones(12), 1e-6, 1, *tables))
    torch.testing.assert_close(heads, apply_rope(ops.rms_norm(x.flatten(1, 2), torch.ones(12), 1e-6, 1), *tables))


@pytest.mark.parametrize("shape", [(1, 1, 1, 36), (1, 3, 1, 36), (2, 1, 1, 36), (2, 3, 1, 36)], ids=str)
def test_rows_broadcast_and_their_gradients_are_summed(device, shape):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 36, device=device)
    leaves = [torch.randn(shape, device=device, requires_grad=True) for _ in range(2)]
    found = []
    for function in (norm_modulate.reference, norm_modulate.norm_modulate):
        out = function(x, *leaves, 1e-6)
        found.append((out, *torch.autograd.grad(out.pow(2).sum(), leaves)))
    for got, wanted in zip(found[1], found[0], strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_heads_without_norm_or_rotation(device):
    x = torch.randn(2, 7, 36, device=device)
    torch.testing.assert_close(norm_rope.norm_rope(x, None, 1e-6, 3), ops.rms_norm(x, None, 1e-6, 3))


def test_compiles_without_a_graph_break(device):
    """As operators that the compiler knows shapes and gradients of."""
    x = torch.randn(2, 3, 5, 36, device=device, requires_grad=True)
    row = torch.randn(2, 3, 1, 36, device=device)

    def block(x):
        y = norm_modulate.norm_modulate(x, row, row, 1e-6)
        return gate_residual.gate_residual(x, gelu.gelu_tanh(y), row)

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    out, wanted = compiled(x), block(x)
    torch.testing.assert_close(out, wanted)
    (got,), (right,) = (torch.autograd.grad(o.square().sum(), x) for o in (out, wanted))
    torch.testing.assert_close(got, right)


def test_what_cannot_run_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        UserError, match="ops backend 'triton' cannot run here: there is no CUDA device; use 'reference'"
    ):
        ops.select("triton")
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="triton is not installed"):
        ops.kernel_attention()


def test_importing_streamgen_imports_no_triton(run_python):
    code = "import sys; from streamgen import ops, attention, transformer, pipeline; print('triton' in sys.modules)"
    done = run_python("-c", code)
    assert (done.returncode, done.stdout.split()) == (0, ["False"]), done


def test_cpu_tensors_are_refused_without_the_interpreter(run_python):
    code = """
import sys, torch
from streamgen_kernels.gelu import gelu_tanh
try:
    gelu_tanh(torch.ones(3))
except ValueError as error:
    print(error)
"""
    done = run_python("-c", code, env={"TRITON_INTERPRET": "0", "PYTHONPATH": ":".join(sys.path)})
    assert "tensors on cpu: Triton kernels need a CUDA device" in done.stdout, done


OPERATORS = {
    "norm_modulate": lambda r: (r(2, 3, 4, 12), r(2, 3, 1, 12), r(2, 3, 1, 12), 1e-6),
    "norm_modulate_backward": lambda r: (r(2, 3, 4, 12), r(2, 3, 4, 12), r(2, 3, 1, 12), 1e-6),
    "gate_residual": lambda r: (r(2, 3, 4, 12), r(2, 3, 4, 12), r(2, 3, 1, 12)),
    "gate_residual_norm": lambda r: (r(2, 3, 4, 12), r(2, 3, 4, 12), *(r(2, 3, 1, 12) for _ in range(3)), 1e-6),
    "norm_rope": lambda r: (r(2, 4, 12), r(12), 1e-6, 2, r(4, 3), r(4, 3)),
    "gelu_tanh": lambda r: (r(2, 5),),
    "quantise_rows": lambda r: (r(3, 4, 8), torch.int8),
    "cell_noise": lambda r: (torch.zeros(2, 4, dtype=torch.int64, device=r(1).device), 7),
    "renoise": lambda r: (
        r(1, 2, 3, 4, 4), r(1, 2, 3, 4, 4), torch.zeros(1, 4, dtype=torch.int64, device=r(1).device), 0.9, 0.5, True,
    ),
    "ring_attention": lambda r: (
        r(1, 2, 5, 8), r(1, 2, 6, 8), r(1, 2, 6, 8), torch.ones(1, dtype=torch.int32, device=r(1).device),
        None, 1, None, None, None, None,
    ),
    "ring_rope": lambda r: (r(1, 2, 5, 8), r(5, 4), r(5, 4), r(1, 2, 7, 8)[:, :, 2:]),
    "norm_rope_store": lambda r: (
        r(1, 2, 12), r(1, 2, 12), r(1, 2, 12), None, r(12), 1e-6, r(2, 3), r(2, 3),
        torch.tensor([[3, 1]], dtype=torch.int32, device=r(1).device),
        r(1, 2, 4, 6), r(1, 2, 4, 6), r(1, 2, 4, 6), None, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_their_word(device, name):
    """What each says of its outputs' shapes and of the tensors that it writes is what it does."""
    import streamgen_kernels.cases  # noqa: F401 (registers all of them)

    given = OPERATORS[name](lambda *size: torch.randn(size, device=device))
    operator = getattr(torch.ops.streamgen, name).default
    torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
