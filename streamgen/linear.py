"""Matrix products with a weight, by the library that does them fastest; results differ by rounding alone.

In fp32 torch multiplies with MKL, which takes half of what an AMD processor has: 102 GFLOP/s where oneDNN reaches 215
(192 x 320 x 1280, one thread of a Zen 5). oneDNN also applies GELU to the sums before it writes them; in bf16 that
takes 0.42 ms where the two operations take 0.71.
The choice is a rule and not a measurement: the same stream must come out the same in the next process.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_ROWS = 16
"""Below, setting up oneDNN costs as much as the product."""
FEWEST_KEYS = 64
"""Below, so does an attention taken head by head."""
CPUINFO = Path("/proc/cpuinfo")


class Linear(nn.Linear):
    """nn.Linear through `linear`: same parameters, names and gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """x weight^T + bias, [..., K] -> [..., N]."""
    if x.dtype == torch.float32 and _one_dnn(x, weight_NK, bias_N) and mkl_is_slow():
        return _pointwise(x, weight_NK, bias_N, "none", "")
    return F.linear(x, weight_NK, bias_N)


def fuses_gelu(x: Tensor, layer: nn.Module) -> bool:
    """Is `linear_gelu` for this input and layer? Not for one that an adapter wraps or that is quantised."""
    if type(layer) is not Linear or not _one_dnn(x, layer.weight, layer.bias):
        return False
    return x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and mkl_is_slow())


def linear_gelu(x: Tensor, layer: Linear) -> Tensor:
    """GELU (tanh form) of `layer(x)`, where `fuses_gelu` says so."""
    return _pointwise(x, layer.weight, layer.bias, "gelu", "tanh")


def attends_by_heads(q_BNTK: Tensor, k_BNSK: Tensor) -> bool:
    """Is `attend_by_heads` the faster way to this attention, and a possible one?"""
    plain = q_BNTK.dtype == torch.float32 and k_BNSK.shape[2] >= FEWEST_KEYS
    return plain and _one_dnn(q_BNTK, k_BNSK, None) and mkl_is_slow()


def attend_by_heads(q_BNTK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, one head after the other by two of oneDNN's products: torch's fused kernel
    multiplies with MKL, and takes 1.92 ms where this takes 1.19 (1 x 5 heads, 192 queries, 768 keys, 64 wide).
    Holds the scores of one head.
    """
    out_BNTK = torch.empty_like(q_BNTK)
    scaled = q_BNTK * q_BNTK.shape[-1] ** -0.5
    for row in range(q_BNTK.shape[0]):
        for head in range(q_BNTK.shape[1]):
            weights_TS = _pointwise(scaled[row, head], k_BNSK[row, head], None, "none", "").softmax(-1)
            out_BNTK[row, head] = _pointwise(weights_TS, v_BNSK[row, head].t(), None, "none", "")
    return out_BNTK


@cache
def mkl_is_slow() -> bool:
    """MKL chooses its kernels by the processor's maker and not by what it can do: any but Intel's get lesser ones."""
    try:
        return not any("GenuineIntel" in line for line in CPUINFO.read_text().splitlines() if "vendor_id" in line)
    except OSError:  # no Linux: torch's own choice
        return False


def _one_dnn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Plain tensors of one dtype on a CPU, enough rows, nobody who differentiates or traces."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    plain = all(type(t) in (Tensor, nn.Parameter) and t.dtype == x.dtype for t in (weight, bias) if t is not None)
    return plain and x.numel() >= FEWEST_ROWS * x.shape[-1] and torch.backends.mkldnn.is_available()


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, operation: str, form: str) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, operation, [], form)
    return out
