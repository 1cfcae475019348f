"""RMSNorm of q or k over the full width, the split into heads and the 3-D rotary embedding, in one pass.

All heads are normed jointly, adjacent pairs (2i, 2i+1) are turned (Wan's form; RoFormer, arXiv 2104.09864), and the
result is head-major [B, N, T, K]: the transposition costs nothing where the row is in registers anyway. A program has
whole rows, so statistics are exact; everything between load and store is float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from streamgen_kernels.common import check_place, check_shape, power_of_2, rows_for, warps_for


def reference(
    x_BTD: Tensor, weight_D: Tensor | None, eps: float, num_heads: int, cos_TK: Tensor | None, sin_TK: Tensor | None
) -> Tensor:
    """In plain torch."""
    if weight_D is not None:
        x_BTD = F.rms_norm(x_BTD, x_BTD.shape[-1:], weight_D, eps)
    x_BNTK = x_BTD.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    if cos_TK is None or sin_TK is None:
        return x_BNTK
    even, odd = x_BNTK.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos_TK - odd * sin_TK, even * sin_TK + odd * cos_TK), dim=-1)
    return turned.flatten(-2).to(x_BNTK.dtype)


@triton.jit
def head_tile(rows, total, N: tl.constexpr, K: tl.constexpr, N2: tl.constexpr, K2: tl.constexpr):  # type: ignore[no-untyped-def]
    """Places within the rows [1, N2, K2], and what exists of [rows, N2, K2]."""
    heads = tl.arange(0, N2)[None, :, None]
    inner = tl.arange(0, K2)[None, None, :]
    return heads, inner, (rows < total)[:, None, None] & (heads < N) & (inner < K)


@triton.jit
def rms_inverse(x, eps, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / rms of each row of [R, N2, K2], zero where nothing is."""
    return (1.0 / tl.sqrt(tl.sum(tl.sum(x * x, 2), 1) / D + eps))[:, None, None]


@triton.jit
def turned(  # type: ignore[no-untyped-def]
    x, cos_ptr, sin_ptr, tokens, keep, SIGN: tl.constexpr,
    K: tl.constexpr, R: tl.constexpr, N2: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    """Pairs of [R, N2, K2] turned by SIGN times the angle of their token."""
    pair = tl.arange(0, K2 // 2)[None, :]
    table = tokens[:, None] * (K // 2) + pair
    there = keep[:, None] & (pair < K // 2)
    cos = tl.load(cos_ptr + table, there, 1.0)[:, None, :]
    sin = tl.load(sin_ptr + table, there, 0.0)[:, None, :] * SIGN
    even, odd = tl.split(tl.reshape(x, (R, N2, K2 // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (R, N2, K2))


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, T, total, eps,
    NORM: tl.constexpr, ROPE: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, N2: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    heads, inner, keep = head_tile(rows, total, N, K, N2, K2)
    wide = rows[:, None, None].to(tl.int64)
    x = tl.load(x_ptr + wide * (N * K) + heads * K + inner, keep, 0.0).to(tl.float32)
    if NORM:
        weight = tl.load(weight_ptr + heads * K + inner, (heads < N) & (inner < K), 0.0).to(tl.float32)
        x = x * rms_inverse(x, eps, N * K) * weight
    if ROPE:
        x = turned(x, cos_ptr, sin_ptr, rows % T, rows < total, 1, K, R, N2, K2)
    tl.store(out_ptr + ((wide // T * N + heads) * T + wide % T) * K + inner, x, keep)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, dx_ptr, dweight_ptr, T, total, eps,
    NORM: tl.constexpr, ROPE: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, N2: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    heads, inner, keep = head_tile(rows, total, N, K, N2, K2)
    wide = rows[:, None, None].to(tl.int64)
    grad = tl.load(grad_ptr + ((wide // T * N + heads) * T + wide % T) * K + inner, keep, 0.0).to(tl.float32)
    if ROPE:
        grad = turned(grad, cos_ptr, sin_ptr, rows % T, rows < total, -1, K, R, N2, K2)
    if NORM:
        x = tl.load(x_ptr + wide * (N * K) + heads * K + inner, keep, 0.0).to(tl.float32)
        inside = (heads < N) & (inner < K)
        weight = tl.load(weight_ptr + heads * K + inner, inside, 0.0).to(tl.float32)
        inverse = rms_inverse(x, eps, N * K)
        normed = x * inverse
        part = tl.program_id(0).to(tl.int64) * (N * K) + heads * K + inner
        tl.store(dweight_ptr + part, tl.sum(grad * normed, 0)[None, :, :], inside)
        grad = grad * weight
        along = tl.sum(tl.sum(grad * normed, 2), 1)[:, None, None] / (N * K)
        grad = (grad - normed * along) * inverse
    tl.store(dx_ptr + wide * (N * K) + heads * K + inner, grad, keep)


def head_launch(tokens: int, num_heads: int, width: int) -> tuple[int, dict[str, int]]:
    """Programs, and sizes of the kernels over rows of [N, K]."""
    N2, K2 = power_of_2(num_heads), power_of_2(width // num_heads)
    rows = rows_for(N2 * K2, tokens)
    sizes = {"N": num_heads, "K": width // num_heads, "R": rows, "N2": N2, "K2": K2}
    return triton.cdiv(tokens, rows), sizes | {"num_warps": warps_for(rows * N2 * K2)}


@torch.library.custom_op("streamgen::norm_rope", mutates_args=())
def _op(
    x_BTD: Tensor, weight_D: Tensor | None, eps: float, num_heads: int, cos_TK: Tensor | None, sin_TK: Tensor | None
) -> Tensor:
    x = x_BTD.contiguous()
    B, T, D = x.shape
    out = x.new_empty(B, num_heads, T, D // num_heads)
    programs, sizes = head_launch(B * T, num_heads, D)
    tables = [x if table is None else table.contiguous() for table in (weight_D, cos_TK, sin_TK)]
    flags = {"NORM": weight_D is not None, "ROPE": cos_TK is not None}
    _forward[(programs,)](x, *tables, out, T, B * T, eps, **flags, **sizes)
    return out


@_op.register_fake
def _(
    x_BTD: Tensor, weight_D: Tensor | None, eps: float, num_heads: int, cos_TK: Tensor | None, sin_TK: Tensor | None
) -> Tensor:
    B, T, D = x_BTD.shape
    return x_BTD.new_empty(B, num_heads, T, D // num_heads)


@torch.library.custom_op("streamgen::norm_rope_backward", mutates_args=())
def _backward_op(
    grad: Tensor, x_BTD: Tensor, weight_D: Tensor | None, eps: float, cos_TK: Tensor | None, sin_TK: Tensor | None
) -> tuple[Tensor, Tensor]:
    grad, x = grad.contiguous(), x_BTD.contiguous()
    B, T, D = x.shape
    dx = torch.empty_like(x)
    programs, sizes = head_launch(B * T, grad.shape[1], D)
    parts = x.new_empty(programs if weight_D is not None else 0, D, dtype=torch.float32)
    tables = [x if table is None else table.contiguous() for table in (weight_D, cos_TK, sin_TK)]
    flags = {"NORM": weight_D is not None, "ROPE": cos_TK is not None}
    _backward[(programs,)](grad, x, *tables, dx, parts, T, B * T, eps, **flags, **sizes)
    return dx, parts.sum(0).to(x.dtype if weight_D is None else weight_D.dtype)


@_backward_op.register_fake
def _(
    grad: Tensor, x_BTD: Tensor, weight_D: Tensor | None, eps: float, cos_TK: Tensor | None, sin_TK: Tensor | None
) -> tuple[Tensor, Tensor]:
    like = x_BTD if weight_D is None else weight_D
    return torch.empty_like(x_BTD, memory_format=torch.contiguous_format), like.new_empty(x_BTD.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, _, cos, sin = inputs
    ctx.save_for_backward(x, weight, cos, sin)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, cos, sin = ctx.saved_tensors
    dx, dweight = _backward_op(grad, x, weight, ctx.eps, cos, sin)
    return dx, None if weight is None else dweight, None, None, None, None


_op.register_autograd(_gradient, setup_context=_save)


def norm_rope(
    x_BTD: Tensor,
    weight_D: Tensor | None,
    eps: float,
    num_heads: int,
    cos_TK: Tensor | None = None,
    sin_TK: Tensor | None = None,
) -> Tensor:
    """RMSNorm (none if the weight is None), heads, rotation (none without the tables) -> contiguous [B, N, T, K].

    cos_TK, sin_TK: float32 [T, K/2] of `streamgen.rope.rope_table`; they get no gradient. ValueError for other shapes.
    """
    check_heads(x_BTD, num_heads)
    check_tables(x_BTD, num_heads, cos_TK, sin_TK)
    check_weight("weight", weight_D, x_BTD)
    out: Tensor = _op(x_BTD, weight_D, eps, num_heads, cos_TK, sin_TK)
    return out


def check_heads(x_BTD: Tensor, num_heads: int) -> None:
    """ValueError unless x is [B, T, D] and D is that many heads of even width."""
    if x_BTD.ndim != 3 or x_BTD.shape[2] % (2 * num_heads):
        raise ValueError(f"x is {list(x_BTD.shape)}: must be [batch, tokens, width], of {num_heads} even heads")
    check_place(x_BTD)


def check_weight(name: str, weight_D: Tensor | None, x_BTD: Tensor) -> None:
    """ValueError unless it is None or [D] beside x."""
    if weight_D is not None:
        check_place(x_BTD, weight_D)
        check_shape(name, weight_D, (x_BTD.shape[2],))


def check_tables(x_BTD: Tensor, num_heads: int, cos_TK: Tensor | None, sin_TK: Tensor | None) -> None:
    """ValueError unless both are None or float32 [T, K/2]."""
    if (cos_TK is None) != (sin_TK is None):
        raise ValueError("cos and sin go together: give both or neither")
    for name, table in (("cos", cos_TK), ("sin", sin_TK)):
        if table is None:
            continue
        check_place(x_BTD, table)
        check_shape(name, table, (x_BTD.shape[1], x_BTD.shape[2] // num_heads // 2))
        if table.dtype != torch.float32:
            raise ValueError(f"{name} is {table.dtype}: must be float32, angles do not survive rounding")
