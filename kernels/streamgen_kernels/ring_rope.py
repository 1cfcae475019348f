"""Keys that are stored un-rotated, turned to the places that a block gives them: from one ring into another.

Policies that re-index positions (`streamgen.cache.relative`) do this once a block for all of its passes. Read once,
written once; in plain torch the pairs go through float32 in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamgen_kernels import norm_rope
from streamgen_kernels.common import check_place, check_shape, power_of_2, rows_for, warps_for
from streamgen_kernels.norm_rope import turned


def reference(k_BNSK: Tensor, cos_SK: Tensor, sin_SK: Tensor, out_BNSK: Tensor) -> None:
    """In plain torch."""
    B, N, S, K = k_BNSK.shape
    rows = k_BNSK.transpose(1, 2).reshape(B, S, N * K)
    out_BNSK.copy_(norm_rope.reference(rows, None, 0.0, N, cos_SK, sin_SK))


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_b, x_n, x_s, out_b, out_n, out_s, S,
    N: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // N).to(tl.int64)
    n = (tl.program_id(1) % N).to(tl.int64)
    tokens = tl.program_id(0) * R + tl.arange(0, R)
    inner = tl.arange(0, K2)[None, None, :]
    far = tokens[:, None, None].to(tl.int64)
    keep = (tokens < S)[:, None, None] & (inner < K)
    x = tl.load(x_ptr + b * x_b + n * x_n + far * x_s + inner, keep, 0.0).to(tl.float32)
    x = turned(x, cos_ptr, sin_ptr, tokens, tokens < S, 1, K, R, 1, K2)
    tl.store(out_ptr + b * out_b + n * out_n + far * out_s + inner, x.to(out_ptr.dtype.element_ty), keep)


@torch.library.custom_op("streamgen::ring_rope", mutates_args=("out_BNSK",))
def _op(k_BNSK: Tensor, cos_SK: Tensor, sin_SK: Tensor, out_BNSK: Tensor) -> None:
    B, N, S, K = k_BNSK.shape
    width = power_of_2(K)
    rows = rows_for(width, S)
    _kernel[triton.cdiv(S, rows), B * N](
        k_BNSK, cos_SK.contiguous(), sin_SK.contiguous(), out_BNSK, *k_BNSK.stride()[:3], *out_BNSK.stride()[:3], S,
        N=N, K=K, K2=width, R=rows, num_warps=warps_for(rows * width),
    )  # fmt: skip


@_op.register_fake
def _(k_BNSK: Tensor, cos_SK: Tensor, sin_SK: Tensor, out_BNSK: Tensor) -> None:
    return None


def ring_rope(k_BNSK: Tensor, cos_SK: Tensor, sin_SK: Tensor, out_BNSK: Tensor) -> None:
    """Writes the keys, pair i of token s turned by its angle, into `out_BNSK`; both may be views of rings.

    cos, sin: float32 [S, K/2]. Forward only. ValueError for shapes, strides and devices that do not go together.
    """
    B, N, S, K = k_BNSK.shape
    check_place(k_BNSK, cos_SK, sin_SK, out_BNSK)
    check_shape("out", out_BNSK, (B, N, S, K))
    for name, table in (("cos", cos_SK), ("sin", sin_SK)):
        check_shape(name, table, (S, K // 2))
    if k_BNSK.stride(-1) != 1 or out_BNSK.stride(-1) != 1:
        raise ValueError(f"strides {k_BNSK.stride()} and {out_BNSK.stride()}: the last of each must be 1")
    _op(k_BNSK, cos_SK, sin_SK, out_BNSK)
