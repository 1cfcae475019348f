"""GELU, tanh form: x/2 (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from streamgen_kernels.common import check_place, rows_for


def reference(x: Tensor) -> Tensor:
    """In plain torch."""
    return F.gelu(x, approximate="tanh")


@triton.jit
def _gate(x):  # type: ignore[no-untyped-def]
    """sigmoid(2u) and d(2u)/dx."""
    inner = x * (1.5957691216057308 + 0.07135481627159637 * x * x)
    return tl.sigmoid(inner), 1.5957691216057308 + 0.2140644488147891 * x * x


@triton.jit
def _forward(x_ptr, out_ptr, total, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + places, places < total, 0.0).to(tl.float32)
    gate, _ = _gate(x)
    tl.store(out_ptr + places, x * gate, places < total)


@triton.jit
def _backward(grad_ptr, x_ptr, dx_ptr, total, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + places, places < total, 0.0).to(tl.float32)
    grad = tl.load(grad_ptr + places, places < total, 0.0).to(tl.float32)
    gate, slope = _gate(x)
    tl.store(dx_ptr + places, grad * gate * (1.0 + x * (1.0 - gate) * slope), places < total)


def _launch(x: Tensor) -> tuple[tuple[int], int]:
    size = rows_for(1, x.numel())
    return (triton.cdiv(x.numel(), size),), size


@torch.library.custom_op("streamgen::gelu_tanh", mutates_args=())
def _op(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    grid, size = _launch(x)
    _forward[grid](x, out, x.numel(), SIZE=size)
    return out


@_op.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("streamgen::gelu_tanh_backward", mutates_args=())
def _backward_op(grad: Tensor, x: Tensor) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    grid, size = _launch(x)
    _backward[grid](grad, x, dx, x.numel(), SIZE=size)
    return dx


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    out: Tensor = _backward_op(grad, *ctx.saved_tensors)
    return out


_op.register_autograd(_gradient, setup_context=_save)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU of every element -> x's shape and dtype."""
    check_place(x)
    out: Tensor = _op(x)
    return out
