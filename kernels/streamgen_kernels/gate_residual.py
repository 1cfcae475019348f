"""The end of a branch of a block: x + gate y, in one pass; and the same with the next norm and modulation behind it.

The second saves a pass over the residual stream: [B, F, S, D] is read and written once where two kernels read it twice.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from streamgen_kernels import norm_modulate
from streamgen_kernels.common import dense_rows
from streamgen_kernels.norm_modulate import (
    check_frames,
    frame_launch,
    frame_row,
    frame_tile,
    norm_gradient,
    normalised,
    store_part,
)


def reference(x_BFSD: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor) -> Tensor:
    """In plain torch."""
    return torch.addcmul(x_BFSD, y_BFSD, gate_BF1D)


def reference_norm(
    x_BFSD: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Both steps in plain torch."""
    x_BFSD = reference(x_BFSD, y_BFSD, gate_BF1D)
    return x_BFSD, norm_modulate.reference(x_BFSD, shift_BF1D, scale_BF1D, eps)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, out_ptr, normed_ptr,
    gate_b, gate_f, shift_b, shift_f, scale_b, scale_f, frames, S, eps,
    NORM: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    offsets, keep = frame_tile(S, D, D2, R)
    x = tl.load(x_ptr + offsets, keep, 0.0).to(tl.float32)
    y = tl.load(y_ptr + offsets, keep, 0.0).to(tl.float32)
    x = x + y * frame_row(gate_ptr, gate_b, gate_f, frames, D, D2)[None, :]
    x = x.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, x, keep)
    if NORM:  # of what was stored, as the two kernels one after the other have it
        normed, _ = normalised(x.to(tl.float32), keep, eps, D)
        shift = frame_row(shift_ptr, shift_b, shift_f, frames, D, D2)
        scale = frame_row(scale_ptr, scale_b, scale_f, frames, D, D2)
        tl.store(normed_ptr + offsets, normed * (1.0 + scale)[None, :] + shift[None, :], keep)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_ptr, grad_normed_ptr, x_ptr, y_ptr, gate_ptr, scale_ptr, dx_ptr, dy_ptr, dgate_ptr, dshift_ptr, dscale_ptr,
    gate_b, gate_f, scale_b, scale_f, frames, S, eps,
    NORM: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    offsets, keep = frame_tile(S, D, D2, R)
    grad = tl.load(grad_ptr + offsets, keep, 0.0).to(tl.float32)
    if NORM:  # x_ptr: the sum that was normed
        x = tl.load(x_ptr + offsets, keep, 0.0).to(tl.float32)
        d_out = tl.load(grad_normed_ptr + offsets, keep, 0.0).to(tl.float32)
        normed, inverse = normalised(x, keep, eps, D)
        scale = frame_row(scale_ptr, scale_b, scale_f, frames, D, D2)
        grad += norm_gradient(d_out * (1.0 + scale)[None, :], normed, inverse, D)
        store_part(dshift_ptr, d_out, D, D2)
        store_part(dscale_ptr, d_out * normed, D, D2)
        tl.store(dx_ptr + offsets, grad, keep)
    y = tl.load(y_ptr + offsets, keep, 0.0).to(tl.float32)
    gate = frame_row(gate_ptr, gate_b, gate_f, frames, D, D2)
    tl.store(dy_ptr + offsets, grad * gate[None, :], keep)
    store_part(dgate_ptr, tl.where(keep, grad * y, 0.0), D, D2)


@torch.library.custom_op("streamgen::gate_residual", mutates_args=())
def _op(x_BFSD: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor) -> Tensor:
    x, y, gate = x_BFSD.contiguous(), y_BFSD.contiguous(), dense_rows(gate_BF1D)
    out = torch.empty_like(x)
    grid, sizes = frame_launch(x)
    strides = (*gate.stride()[:2], 0, 0, 0, 0)
    _forward[grid](x, y, gate, gate, gate, out, out, *strides, x.shape[1], x.shape[2], 0.0, NORM=False, **sizes)
    return out


@_op.register_fake
def _(x_BFSD: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor) -> Tensor:
    return torch.empty_like(x_BFSD, memory_format=torch.contiguous_format)


@torch.library.custom_op("streamgen::gate_residual_backward", mutates_args=())
def _backward_op(grad: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor) -> tuple[Tensor, Tensor]:
    grad, y, gate = grad.contiguous(), y_BFSD.contiguous(), dense_rows(gate_BF1D)
    (programs, tiles), sizes = frame_launch(y)
    dy = torch.empty_like(y)
    parts = y.new_empty(programs, tiles, y.shape[3], dtype=torch.float32)
    strides = (*gate.stride()[:2], 0, 0)
    _backward[programs, tiles](
        grad, grad, y, y, gate, gate, dy, dy, parts, parts, parts, *strides, y.shape[1], y.shape[2], 0.0,
        NORM=False, **sizes,
    )  # fmt: skip
    return dy, parts.sum(1).view(gate.shape).to(gate.dtype)


@_backward_op.register_fake
def _(grad: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor) -> tuple[Tensor, Tensor]:
    row = gate_BF1D.new_empty(gate_BF1D.shape)
    return torch.empty_like(y_BFSD, memory_format=torch.contiguous_format), row


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, *_backward_op(grad, *ctx.saved_tensors)


_op.register_autograd(_gradient, setup_context=_save)


@torch.library.custom_op("streamgen::gate_residual_norm", mutates_args=())
def _norm_op(
    x_BFSD: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x, y = x_BFSD.contiguous(), y_BFSD.contiguous()
    rows = [dense_rows(row) for row in (gate_BF1D, shift_BF1D, scale_BF1D)]
    out, normed = torch.empty_like(x), torch.empty_like(x)
    grid, sizes = frame_launch(x)
    strides = [stride for row in rows for stride in row.stride()[:2]]
    _forward[grid](x, y, *rows, out, normed, *strides, x.shape[1], x.shape[2], eps, NORM=True, **sizes)
    return out, normed


@_norm_op.register_fake
def _(
    x_BFSD: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x_BFSD, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out)


@torch.library.custom_op("streamgen::gate_residual_norm_backward", mutates_args=())
def _norm_backward_op(
    grad: Tensor, grad_normed: Tensor, sum_BFSD: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor, scale_BF1D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad, grad_normed, y = grad.contiguous(), grad_normed.contiguous(), y_BFSD.contiguous()
    gate, scale = dense_rows(gate_BF1D), dense_rows(scale_BF1D)
    (programs, tiles), sizes = frame_launch(y)
    dx, dy = torch.empty_like(y), torch.empty_like(y)
    parts = y.new_empty(3, programs, tiles, y.shape[3], dtype=torch.float32)
    strides = (*gate.stride()[:2], *scale.stride()[:2])
    _backward[programs, tiles](
        grad, grad_normed, sum_BFSD, y, gate, scale, dx, dy, *parts.unbind(), *strides, y.shape[1], y.shape[2], eps,
        NORM=True, **sizes,
    )  # fmt: skip
    dgate, dshift, dscale = (part.clone() for part in parts.sum(2).view(3, *gate.shape).to(gate.dtype).unbind())
    return dx, dy, dgate, dshift, dscale


@_norm_backward_op.register_fake
def _(
    grad: Tensor, grad_normed: Tensor, sum_BFSD: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor, scale_BF1D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    whole = torch.empty_like(y_BFSD, memory_format=torch.contiguous_format)
    row = gate_BF1D.new_empty(gate_BF1D.shape)
    return whole, torch.empty_like(whole), row, torch.empty_like(row), torch.empty_like(row)


def _norm_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, gate, _, scale, ctx.eps = inputs
    ctx.save_for_backward(output[0], y, gate, scale)


def _norm_gradient(ctx: Any, grad: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
    return *_norm_backward_op(grad, grad_normed, *ctx.saved_tensors, ctx.eps), None


_norm_op.register_autograd(_norm_gradient, setup_context=_norm_save)


def gate_residual(x_BFSD: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor) -> Tensor:
    """x + gate y -> x's shape and dtype; the gate broadcasts to [B, F, 1, D]. ValueError for other shapes."""
    gate_BF1D = _row(gate_BF1D, x_BFSD)
    _check(x_BFSD, y_BFSD, gate=gate_BF1D)
    out: Tensor = _op(x_BFSD, y_BFSD, gate_BF1D)
    return out


def gate_residual_norm(
    x_BFSD: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x' = x + gate y -> (x', LN(x') (1 + scale) + shift); rows as in `gate_residual`."""
    gate, shift, scale = (_row(row, x_BFSD) for row in (gate_BF1D, shift_BF1D, scale_BF1D))
    _check(x_BFSD, y_BFSD, gate=gate, shift=shift, scale=scale)
    out: tuple[Tensor, Tensor] = _norm_op(x_BFSD, y_BFSD, gate, shift, scale, eps)
    return out


def residual_norm(
    x_BFSD: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor, norm: nn.LayerNorm | nn.Identity
) -> tuple[Tensor, Tensor]:
    """x' = x + gate y -> (x', norm(x')): an affine norm is a modulation by weight - 1, in float32 to lose nothing."""
    if not isinstance(norm, nn.LayerNorm):
        x_BFSD = gate_residual(x_BFSD, y_BFSD, gate_BF1D)
        return x_BFSD, norm(x_BFSD)
    return gate_residual_norm(x_BFSD, y_BFSD, gate_BF1D, norm.bias, norm.weight.float() - 1, norm.eps)


def residual_modulate(
    x_BFSD: Tensor, y_BFSD: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x' = x + y -> (x', LN(x') (1 + scale) + shift)."""
    one = x_BFSD.new_ones(1, 1, 1, x_BFSD.shape[-1])
    return gate_residual_norm(x_BFSD, y_BFSD, one, shift_BF1D, scale_BF1D, eps)


def _row(row: Tensor, x_BFSD: Tensor) -> Tensor:
    return row.expand(*x_BFSD.shape[:2], 1, x_BFSD.shape[-1])


def _check(x_BFSD: Tensor, y_BFSD: Tensor, **rows: Tensor) -> None:
    check_frames(x_BFSD, **rows)
    if y_BFSD.shape != x_BFSD.shape or y_BFSD.device != x_BFSD.device:
        raise ValueError(
            f"y is {list(y_BFSD.shape)} on {y_BFSD.device}: must be as x, {list(x_BFSD.shape)} on {x_BFSD.device}"
        )
