"""W8A8: a linear layer whose weights (per output channel) and inputs (per token, on the fly) have eight bits.

Letters besides the package's: M rows, C inputs, O outputs. y = (xq wq^T) sx sw + b; int8 products are summed exactly in
int32, float8 ones in float32.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamgen_kernels.common import check_place, check_shape, power_of_2
from streamgen_kernels.quantise import LARGEST, quantise_rows


def reference(xq_MC: Tensor, x_scale_M: Tensor, wq_OC: Tensor, w_scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """Of quantised inputs, in float64 and plain torch: integer sums pass 2^24."""
    y_MO = (xq_MC.double() @ wq_OC.double().T) * x_scale_M.double()[:, None] * w_scale_O.double()
    return (y_MO if bias_O is None else y_MO + bias_O.double()).float()


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, M, total_outputs,
    C: tl.constexpr, BIAS: tl.constexpr, INTEGER: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    outputs = tl.program_id(1) * BO + tl.arange(0, BO)
    far_rows, far_outputs = rows.to(tl.int64)[:, None] * C, outputs.to(tl.int64)[None, :] * C
    acc = tl.zeros((BM, BO), tl.int32 if INTEGER else tl.float32)
    for start in range(0, C, BC):
        inner = start + tl.arange(0, BC)
        x = tl.load(x_ptr + far_rows + inner[None, :], (rows < M)[:, None] & (inner < C)[None, :], 0.0)
        w = tl.load(
            w_ptr + far_outputs + inner[:, None], (outputs < total_outputs)[None, :] & (inner < C)[:, None], 0.0
        )
        acc = tl.dot(x, w, acc, out_dtype=tl.int32 if INTEGER else tl.float32)
    y = acc.to(tl.float32) * tl.load(x_scale_ptr + rows, rows < M, 0.0)[:, None]
    y = y * tl.load(w_scale_ptr + outputs, outputs < total_outputs, 0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + outputs, outputs < total_outputs, 0.0).to(tl.float32)[None, :]
    places = rows.to(tl.int64)[:, None] * total_outputs + outputs[None, :]
    tl.store(out_ptr + places, y, (rows < M)[:, None] & (outputs < total_outputs)[None, :])


@torch.library.custom_op("streamgen::scaled_product", mutates_args=())
def _op(
    xq_MC: Tensor, x_scale_M: Tensor, wq_OC: Tensor, w_scale_O: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    M, C = xq_MC.shape
    count = wq_OC.shape[0]
    out = xq_MC.new_empty(M, count, dtype=dtype)
    rows, outputs = (max(16, min(128, power_of_2(n))) for n in (M, count))
    inner = max(32, min(128, power_of_2(C)))  # 32: the least depth of an eight-bit product on tensor cores
    _kernel[triton.cdiv(M, rows), triton.cdiv(count, outputs)](
        xq_MC, wq_OC, x_scale_M, w_scale_O, w_scale_O if bias_O is None else bias_O, out, M, count,
        C=C, BIAS=bias_O is not None, INTEGER=xq_MC.dtype == torch.int8, BM=rows, BO=outputs, BC=inner, num_warps=8,
    )  # fmt: skip
    return out


@_op.register_fake
def _(
    xq_MC: Tensor, x_scale_M: Tensor, wq_OC: Tensor, w_scale_O: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return xq_MC.new_empty(xq_MC.shape[0], wq_OC.shape[0], dtype=dtype)


def scaled_product(
    xq_MC: Tensor,
    x_scale_M: Tensor,
    wq_OC: Tensor,
    w_scale_O: Tensor,
    bias_O: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(xq wq^T) sx sw + b -> [M, O] of `dtype`; inputs of `quantise_rows`, both int8 or both float8_e4m3fn."""
    tensors = [xq_MC, x_scale_M, wq_OC, w_scale_O] + ([] if bias_O is None else [bias_O])
    check_place(*tensors)
    if xq_MC.dtype not in LARGEST or xq_MC.dtype != wq_OC.dtype:
        raise ValueError(f"{xq_MC.dtype} by {wq_OC.dtype}: must be both torch.int8 or both torch.float8_e4m3fn")
    M, C = xq_MC.shape
    outputs = wq_OC.shape[0]
    check_shape("weight", wq_OC, (outputs, C))
    check_shape("scale of the inputs", x_scale_M, (M,))
    check_shape("scale of the weight", w_scale_O, (outputs,))
    if bias_O is not None:
        check_shape("bias", bias_O, (outputs,))
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("inputs, weight, scales and bias must be contiguous")
    out: Tensor = _op(xq_MC, x_scale_M, wq_OC, w_scale_O, bias_O, dtype)
    return out


@cache
def rows_scaled_by_library(device: torch.device) -> bool:
    """Does cuBLAS or CUTLASS, through torch, scale rows of float8 products on this device, and rightly? Tried once."""
    if device.type != "cuda":
        return False
    random = torch.Generator(device).manual_seed(0)
    x, w = (torch.randn(rows, 64, generator=random, device=device) for rows in (48, 32))
    bias = torch.randn(32, generator=random, device=device).to(torch.bfloat16)
    operands = *quantise_rows(x, torch.float8_e4m3fn), *quantise_rows(w, torch.float8_e4m3fn), bias
    try:
        found = _by_library(*operands).float()
    except RuntimeError:  # this torch or this GPU has none
        return False
    wanted = reference(*operands)
    return float((found - wanted).abs().max()) <= 0.02 * float(wanted.abs().max())


def _by_library(xq_MC: Tensor, x_scale_M: Tensor, wq_OC: Tensor, w_scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """As `scaled_product`, in bfloat16."""
    out: Tensor = torch._scaled_mm(
        xq_MC, wq_OC.t(), x_scale_M[:, None], w_scale_O[None], bias_O, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return out


def linear(x: Tensor, wq_OC: Tensor, w_scale_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """[..., C] -> [..., O] in x's dtype, by a weight of `quantise_rows`; x is quantised first. No backward.

    float8 with bfloat16 around it goes through the library's product where that is right, the rest through the kernel.
    """
    xq, x_scale = quantise_rows(x, wq_OC.dtype)
    operands = xq.flatten(0, -2), x_scale.flatten(), wq_OC, w_scale_O, bias_O
    sixteens = not (wq_OC.shape[0] % 16 or wq_OC.shape[1] % 16)
    small = wq_OC.dtype == torch.float8_e4m3fn and x.dtype == torch.bfloat16
    if small and sixteens and rows_scaled_by_library(x.device):
        out = _by_library(*operands)
    else:
        out = scaled_product(*operands, x.dtype)
    return out.unflatten(0, x.shape[:-1])
