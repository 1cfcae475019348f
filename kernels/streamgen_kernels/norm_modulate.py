"""LayerNorm without affine weights, then adaLN's modulation: LN(x) (1 + scale) + shift, one pass over x.

Wan's block does this before attention, before the feed-forward part and in the head (arXiv 2503.20314). Statistics and
arithmetic are float32 whatever the dtype: in bf16 the result is rounded once where plain torch rounds it three times.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from streamgen_kernels.common import check_place, check_shape, dense_rows, power_of_2, rows_for, warps_for


def reference(x_BFSD: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor, eps: float) -> Tensor:
    """In plain torch."""
    return torch.addcmul(shift_BF1D, F.layer_norm(x_BFSD, x_BFSD.shape[-1:], eps=eps), 1 + scale_BF1D)


@triton.jit
def frame_tile(S, D: tl.constexpr, D2: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of program (frame, tile): the offsets [R, D2] of its rows in a contiguous [frames, S, D], and which exist."""
    rows = tl.program_id(1) * R + tl.arange(0, R)
    columns = tl.arange(0, D2)
    first = tl.program_id(0).to(tl.int64) * S * D
    keep = (rows < S)[:, None] & (columns < D)[None, :]
    return first + rows[:, None] * D + columns[None, :], keep


@triton.jit
def normalised(x, keep, eps, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """(x - mean) / std of each row, and 1 / std."""
    centred = tl.where(keep, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * inverse[:, None], inverse


@triton.jit
def norm_gradient(d_normed, normed, inverse, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gradient of x from that of (x - mean) / std."""
    mean = (tl.sum(d_normed, 1) / D)[:, None]
    along = (tl.sum(d_normed * normed, 1) / D)[:, None]
    return (d_normed - mean - normed * along) * inverse[:, None]


@triton.jit
def frame_row(ptr, stride_b, stride_f, frames, D: tl.constexpr, D2: tl.constexpr):  # type: ignore[no-untyped-def]
    """The frame's vector of a [B, F, 1, D] (strides of 0 allowed), as float32 [D2]."""
    frame = tl.program_id(0)
    columns = tl.arange(0, D2)
    start = (frame // frames) * stride_b + (frame % frames) * stride_f
    return tl.load(ptr + start + columns, columns < D, 0.0).to(tl.float32)


@triton.jit
def store_part(ptr, value, D: tl.constexpr, D2: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's sum over its rows into [frames, tiles, D]: added up later, in a fixed order."""
    columns = tl.arange(0, D2)
    place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * D
    tl.store(ptr + place + columns, tl.sum(value, 0), columns < D)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, shift_ptr, scale_ptr, out_ptr, shift_b, shift_f, scale_b, scale_f, frames, S, eps,
    D: tl.constexpr, D2: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    offsets, keep = frame_tile(S, D, D2, R)
    x = tl.load(x_ptr + offsets, keep, 0.0).to(tl.float32)
    normed, _ = normalised(x, keep, eps, D)
    shift = frame_row(shift_ptr, shift_b, shift_f, frames, D, D2)
    scale = frame_row(scale_ptr, scale_b, scale_f, frames, D, D2)
    tl.store(out_ptr + offsets, normed * (1.0 + scale)[None, :] + shift[None, :], keep)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, scale_ptr, dx_ptr, dshift_ptr, dscale_ptr, scale_b, scale_f, frames, S, eps,
    D: tl.constexpr, D2: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    offsets, keep = frame_tile(S, D, D2, R)
    x = tl.load(x_ptr + offsets, keep, 0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, keep, 0.0).to(tl.float32)
    normed, inverse = normalised(x, keep, eps, D)
    scale = frame_row(scale_ptr, scale_b, scale_f, frames, D, D2)
    tl.store(dx_ptr + offsets, norm_gradient(grad * (1.0 + scale)[None, :], normed, inverse, D), keep)
    store_part(dshift_ptr, grad, D, D2)
    store_part(dscale_ptr, grad * normed, D, D2)


def frame_launch(x_BFSD: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid (frames, tiles of rows) and sizes of the kernels that go over [B, F, S, D]."""
    B, frames, S, D = x_BFSD.shape
    width = power_of_2(D)
    rows = rows_for(width, S)
    return (B * frames, triton.cdiv(S, rows)), {"D": D, "D2": width, "R": rows, "num_warps": warps_for(rows * width)}


def check_frames(x_BFSD: Tensor, **rows: Tensor) -> None:
    """ValueError unless x is [B, F, S, D] and each of `rows` one [B, F, 1, D]."""
    if x_BFSD.ndim != 4:
        raise ValueError(f"x is {list(x_BFSD.shape)}: must be [batch, frames, tokens of a frame, width]")
    B, frames, _, D = x_BFSD.shape
    check_place(x_BFSD, *rows.values())
    for name, row in rows.items():
        check_shape(name, row, (B, frames, 1, D))


@torch.library.custom_op("streamgen::norm_modulate", mutates_args=())
def _op(x_BFSD: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor, eps: float) -> Tensor:
    x, shift, scale = x_BFSD.contiguous(), dense_rows(shift_BF1D), dense_rows(scale_BF1D)
    out = torch.empty_like(x)
    grid, sizes = frame_launch(x)
    strides = (*shift.stride()[:2], *scale.stride()[:2])
    _forward[grid](x, shift, scale, out, *strides, x.shape[1], x.shape[2], eps, **sizes)
    return out


@_op.register_fake
def _(x_BFSD: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x_BFSD, memory_format=torch.contiguous_format)


@torch.library.custom_op("streamgen::norm_modulate_backward", mutates_args=())
def _backward_op(grad: Tensor, x_BFSD: Tensor, scale_BF1D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, scale = grad.contiguous(), x_BFSD.contiguous(), dense_rows(scale_BF1D)
    (programs, tiles), sizes = frame_launch(x)
    dx = torch.empty_like(x)
    parts = x.new_empty(2, programs, tiles, x.shape[3], dtype=torch.float32)
    _backward[programs, tiles](
        grad, x, scale, dx, parts[0], parts[1], *scale.stride()[:2], x.shape[1], x.shape[2], eps, **sizes
    )
    dshift, dscale = parts.sum(2).view(2, *scale.shape).to(scale.dtype)
    return dx, dshift.clone(), dscale.clone()


@_backward_op.register_fake
def _(grad: Tensor, x_BFSD: Tensor, scale_BF1D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    row = scale_BF1D.new_empty(scale_BF1D.shape)
    return torch.empty_like(x_BFSD, memory_format=torch.contiguous_format), row, torch.empty_like(row)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, scale, ctx.eps = inputs
    ctx.save_for_backward(x, scale)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(grad, *ctx.saved_tensors, ctx.eps), None


_op.register_autograd(_gradient, setup_context=_save)


def norm_modulate(x_BFSD: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor, eps: float) -> Tensor:
    """LN(x) (1 + scale) + shift -> x's shape and dtype.

    shift and scale broadcast to [B, F, 1, D]: one row per frame, or one for all. ValueError for other shapes.
    """
    row = (*x_BFSD.shape[:2], 1, x_BFSD.shape[-1])
    shift_BF1D, scale_BF1D = shift_BF1D.expand(row), scale_BF1D.expand(row)
    check_frames(x_BFSD, shift=shift_BF1D, scale=scale_BF1D)
    out: Tensor = _op(x_BFSD, shift_BF1D, scale_BF1D, eps)
    return out
