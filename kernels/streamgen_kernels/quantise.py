"""Rows in eight bits: int8 or float8_e4m3fn with one scale each, x = scale q, to half a step.

The scale is the row's largest magnitude over that of the format (127, 448). For activations and weights of `linear.py`
a row is a token or an output channel and the scale float32; for keys and values it is a token of a head, and the scale
may be float16, as in `streamgen.cache.quantised`: 130 bytes a row of 128 where bf16 has 256.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamgen_kernels.common import INTERPRETED, check_place, power_of_2, rows_for, warps_for

_INTERPRETED = tl.constexpr(INTERPRETED)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LEAST = {torch.float32: 1e-12, torch.float16: 2.0**-14}
"""Dtypes of a scale, and the smallest value of each: of float16 the last of full precision."""


def reference(x: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """In plain torch."""
    largest = LARGEST[dtype]
    scale = (x.float().abs().amax(-1) / largest).clamp(min=LEAST[scale_dtype]).to(scale_dtype)
    q = (x.float() / scale.float()[..., None]).clamp(-largest, largest)
    return (q.round() if dtype == torch.int8 else q).to(dtype), scale


@triton.jit
def eight_bits(x, axis: tl.constexpr, scale_ptr, LARGEST: tl.constexpr, INTEGER: tl.constexpr, LEAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """x over its scale along an axis, float32 but rounded and within the format; and the scale, in the pointer's dtype.

    The scale is rounded before it divides, so that codes fit what will be read; what then lies beyond the format
    (float16 rounds down as often as up) is clipped.
    """
    scale = tl.maximum(tl.max(tl.abs(x), axis) / LARGEST, LEAST).to(scale_ptr.dtype.element_ty)
    q = x / tl.expand_dims(scale.to(tl.float32), axis)
    q = tl.minimum(tl.maximum(q, -LARGEST), LARGEST)
    if INTEGER:
        q = (q + 12582912.0) - 12582912.0  # 1.5 x 2^23: to the nearest integer, halves to even, as torch rounds
    elif _INTERPRETED:  # its own cast loses the carry (125 becomes 64): round first, to 4 bits or to steps of 2^-9
        far = q * 1048577.0
        q = tl.where(tl.abs(q) < 0.015625, ((q * 512.0 + 12582912.0) - 12582912.0) / 512.0, far - (far - q))
    return q, scale


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x_ptr, q_ptr, scale_ptr, total,
    LARGEST: tl.constexpr, INTEGER: tl.constexpr, LEAST: tl.constexpr,
    K: tl.constexpr, K2: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inner = tl.arange(0, K2)
    keep = (rows < total)[:, None] & (inner < K)[None, :]
    places = rows[:, None].to(tl.int64) * K + inner[None, :]
    x = tl.load(x_ptr + places, keep, 0.0).to(tl.float32)
    q, scale = eight_bits(x, 1, scale_ptr, LARGEST, INTEGER, LEAST)
    tl.store(q_ptr + places, q.to(q_ptr.dtype.element_ty), keep)
    tl.store(scale_ptr + rows, scale, rows < total)


@torch.library.custom_op("streamgen::quantise_rows", mutates_args=())
def _op(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    K = x.shape[-1]
    total = x.numel() // K
    rows = rows_for(power_of_2(K), total)
    q = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    sizes = {"K": K, "K2": power_of_2(K), "R": rows, "num_warps": warps_for(rows * power_of_2(K))}
    code = {"LARGEST": LARGEST[dtype], "INTEGER": dtype == torch.int8, "LEAST": LEAST[torch.float32]}
    _kernel[(triton.cdiv(total, rows),)](x, q, scale, total, **code, **sizes)
    return q, scale


@_op.register_fake
def _(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return q, x.new_empty(x.shape[:-1], dtype=torch.float32)


def quantise_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[..., K] -> (int8 or float8_e4m3fn [..., K], float32 scale [...]). Forward only. ValueError for other dtypes."""
    check_place(x)
    if dtype not in LARGEST:
        raise ValueError(f"dtype={dtype}: must be torch.int8 or torch.float8_e4m3fn")
    out: tuple[Tensor, Tensor] = _op(x, dtype)
    return out
