"""Weights in one byte: the products of a block's layers by integers, W8A8 (LLM.int8(), arXiv 2208.07339, without its
outlier columns; a scale for each row of x and of the weight, as ZeroQuant's token-wise scheme, arXiv 2206.01861).

wq = round(w / sw), sw = max |w| / 127 of its row; x likewise while it passes; y = (xq wq^T) sx sw + b. The sums are
whole numbers, so a row of y depends on no other row and streams that share a forward are as they were alone.
Letters: M rows, K inputs, N outputs.

Two thirds of a percent of each operand's size are lost, and half of the weights' memory against bf16, and so of the
bytes that a product of few rows moves. On a CPU that multiplies bytes (AVX-512 VNNI, AMX) it is also the fastest way:
one thread of a Zen 5, 192 x 320 x 1280, ms: fp32 0.65, bf16 0.35, this 0.31 of which the product 0.18. Weights alone
in bytes, brought back to bf16 for each product, take 0.44; torch's `_weight_int8pack_mm` 1.31; oneDNN's quantised
linear with packed weights 0.29 and twice the memory.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamgen.linear import CPUINFO, Linear

if TYPE_CHECKING:
    from streamgen.transformer import Block, CausalWanModel, TransformerConfig

LARGEST = 127.0
TINY = 1e-12
"""The smallest scale: a row of zeros has codes of zero."""
FEWEST_ROWS_CUDA, MULTIPLE_CUDA = 17, 8
"""What cuBLASLt asks of a product of bytes."""
WEIGHTS_DTYPES = ("int8",)


def quantise_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] -> codes int8 [M, K] and float32 scales [M, 1]: x = codes * scale, to half a code."""
    scale_M1 = (x_MK.abs().amax(-1, keepdim=True).float() / LARGEST).clamp_min_(TINY)
    return (x_MK / scale_M1).round_().to(torch.int8), scale_M1


class QuantisedLinear(nn.Module):
    """A Linear made of one that is loaded. No gradients; `weight` is int8 [N, K], `scale` float32 [N]."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes_NK, scale_N1 = quantise_rows(layer.weight.detach().float())
        self.register_buffer("weight", codes_NK)
        self.register_buffer("scale", scale_N1[:, 0].contiguous())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        return self._product(x).to(x.dtype).view(*x.shape[:-1], self.out_features)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU (tanh form) of the layer's output, rounded once. On a CPU as `ops.gelu_tanh` compiled: x sigmoid(2u)
        takes 0.12 ms where tanh takes 0.28 (192 x 1280), and is equal to 5e-7.
        """
        y_MN = self._product(x)
        if x.device.type == "cpu":
            wide = torch.mul(y_MN, y_MN).mul_(0.07135481627159637).add_(1.5957691216057308)
            y_MN = wide.mul_(y_MN).sigmoid_().mul_(y_MN)
        else:
            y_MN = F.gelu(y_MN, approximate="tanh")
        return y_MN.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        """float32 [M, N]."""
        codes_MK, scale_M1 = quantise_rows(x.reshape(-1, self.in_features))
        y_MN = integer_product(codes_MK, self.weight) * scale_M1
        return y_MN.mul_(self.scale) if self.bias is None else torch.addcmul(self.bias.float(), y_MN, self.scale)

    def dequantised(self) -> Tensor:
        """The weight that the codes stand for, float32 [N, K]."""
        return self.weight.float() * self.scale[:, None]


def integer_product(x_MK: Tensor, w_NK: Tensor) -> Tensor:
    """int8 by int8, x w^T [M, N]: int32 where the device multiplies bytes, else in float32, exact up to K = 1040 and
    to rounding beyond.
    """
    if multiplies_bytes(x_MK, w_NK):
        return torch._int_mm(x_MK, w_NK.t())
    return F.linear(x_MK.float(), w_NK.float())


def multiplies_bytes(x_MK: Tensor, w_NK: Tensor) -> bool:
    """Does `torch._int_mm` run here at the speed of the machine, for these shapes?"""
    if x_MK.device.type == "cuda":
        whole = not (w_NK.shape[0] % MULTIPLE_CUDA or w_NK.shape[1] % MULTIPLE_CUDA)
        return whole and x_MK.shape[0] >= FEWEST_ROWS_CUDA
    return x_MK.device.type == "cpu" and cpu_multiplies_bytes()


@cache
def cpu_multiplies_bytes() -> bool:
    """By what the processor says of itself: without these instructions torch has a plain loop."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        flags = next((line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")), "").split()
    except OSError:  # no Linux
        return False
    return "avx512_vnni" in flags or "amx_int8" in flags


@torch.no_grad()
def quantise_weights(model: CausalWanModel, name: str) -> int:
    """Replace the Linears of the model's blocks -> bytes saved. ValueError for a name that is not in WEIGHTS_DTYPES.

    Those are q, k, v and o of both attentions and both of the feed-forward: nearly all of the weights. The others stay:
    embeddings of patches, text and time are small, and the error of the time's reaches every layer through the
    modulation; the head's goes into the picture with nothing after it. Once per model: there is no way back.
    """
    if name not in WEIGHTS_DTYPES:
        raise ValueError(f"weights dtype {name!r} does not exist; there are: {', '.join(WEIGHTS_DTYPES)}")
    before = weight_bytes(model)
    for block in cast("list[Block]", model.blocks):
        for parent in (block.self_attn, block.cross_attn, block.ffn):
            for key, layer in list(parent.named_children()):
                if type(layer) is Linear:
                    setattr(parent, key, QuantisedLinear(layer))
    return before - weight_bytes(model)


def bytes_saved(config: TransformerConfig, itemsize: int) -> int:
    """What `quantise_weights` saves of a model of this config with so many bytes a weight; nothing is built."""
    weights = 8 * config.dim**2 + 2 * config.dim * config.ffn_dim
    scales = 4 * (9 * config.dim + config.ffn_dim)
    return config.num_layers * (weights * (itemsize - 1) - scales)


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
