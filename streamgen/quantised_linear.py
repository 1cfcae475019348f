"""Weights in one byte: the products of a block's layers by codes, W8A8 (LLM.int8(), arXiv 2208.07339, without its
outlier columns; a scale for each row of x and of the weight, as ZeroQuant's token-wise scheme, arXiv 2206.01861).

wq = w / sw, sw = max |w| / the largest code of its row; x likewise while it passes; y = (xq wq^T) sx sw + b. Codes are
int8, rounded to whole numbers, or float8 e4m3 (FP8 formats for deep learning, arXiv 2209.05433). Sums of int8 are whole
numbers, so a row of y depends on no other row and streams that share a forward are as they were alone.
Embeddings and the modulation of time see a row or a few: there the weights alone are bytes, int8 in either case.
Letters: M rows, K inputs, N outputs.

In int8 two thirds of a percent of each operand's size are lost, in float8 two to three percent; and half of the
weights' memory against bf16, and so of the bytes that a product of few rows moves. On a CPU that multiplies bytes
(AVX-512 VNNI, AMX) int8 is also the fastest way: one thread of a Zen 5, 192 x 320 x 1280, ms: fp32 0.65, bf16 0.35,
int8 0.31 of which the product 0.18. Weights alone in bytes, brought back to bf16 for each product, take 0.44; torch's
`_weight_int8pack_mm` 1.31; oneDNN's quantised linear with packed weights 0.29 and twice the memory. float8 is for GPUs
that multiply it; elsewhere the same codes are multiplied in float32, 1.0 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamgen.cache.quantised import STORAGES, Storage
from streamgen.linear import CPUINFO, Linear, linear

if TYPE_CHECKING:
    from streamgen.transformer import Block, CausalWanModel
    from streamgen.transformer_config import TransformerConfig

PART_NUMBERS = 1 << 22
WEIGHTS_DTYPES = tuple(STORAGES)
"""Names of what the weights can be kept in."""
LAYOUT = 2
"""Which layers become bytes, and how; it grows with every change of that, since the same stream is then another video.
1: of the blocks alone. 2: embeddings and modulation too."""
TINY = 1e-12
"""The smallest scale: a row of zeros has codes of zero."""
FEWEST_ROWS_CUDA, MULTIPLE_CUDA = 17, 8
"""What cuBLASLt asks of a product of bytes."""
Float8Product = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(x, codes [N, K], scales [N], bias) -> x's quantised product in x's dtype: the second of `ops.kernel_linear`."""


def quantise_rows(x_MK: Tensor, storage: Storage = STORAGES["int8"]) -> tuple[Tensor, Tensor]:
    """[M, K] -> codes [M, K] and float32 scales [M, 1]: x = codes * scale, to half a code."""
    scale_M1 = (x_MK.abs().amax(-1, keepdim=True).float() / storage.largest).clamp_min_(TINY)
    codes_MK = x_MK / scale_M1
    return (codes_MK.round_() if storage.dtype == torch.int8 else codes_MK).to(storage.dtype), scale_M1


class QuantisedLinear(nn.Module):
    """A Linear made of one that is loaded. No gradients; `weight` are codes [N, K], `scale` float32 [N].

    float8_product multiplies float8 on this device; None: `product_of_codes`.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, name: str = "int8", float8_product: Float8Product | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.storage = STORAGES[name]
        self.float8_product = float8_product if self.storage.dtype.is_floating_point else None
        codes_NK, scale_N1 = quantise_rows(layer.weight.detach().float(), self.storage)
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
        """[M, N], float32; of `float8_product` in x's dtype."""
        x_MK = x.reshape(-1, self.in_features)
        if self.float8_product is not None:
            return self.float8_product(x_MK, self.weight, self.scale, self.bias)
        codes_MK, scale_M1 = quantise_rows(x_MK, self.storage)
        return self._scaled(product_of_codes(codes_MK, self.weight) * scale_M1)

    def _scaled(self, y_MN: Tensor) -> Tensor:
        """By the weight's scales, with the bias; `y_MN` (float32) is written over."""
        return y_MN.mul_(self.scale) if self.bias is None else torch.addcmul(self.bias.float(), y_MN, self.scale)

    def dequantised(self) -> Tensor:
        """The weight that the codes stand for, float32 [N, K]."""
        return self.weight.float() * self.scale[:, None]


class WholeInputLinear(QuantisedLinear):
    """One whose inputs stay as they are, multiplied in float32: for few rows, which gain nothing from bytes, and where
    an error reaches every layer. 0.07 ms for one row by 320 x 1920, where bf16 takes 0.05.
    """

    def _product(self, x: Tensor) -> Tensor:
        x_MK = x.reshape(-1, self.in_features).float()
        parts = [linear(x_MK, part_NK.float(), None) for part_NK in self.weight.split(self.part_rows)]
        return self._scaled(parts[0] if len(parts) == 1 else torch.cat(parts, 1))

    @property
    def part_rows(self) -> int:
        """Of the weight, brought to float32 at a time: of Wan 14B's modulation all of it would be 600 MB."""
        return max(1, PART_NUMBERS // self.in_features)


def product_of_codes(x_MK: Tensor, w_NK: Tensor) -> Tensor:
    """x w^T [M, N] of two that are int8 or two that are float8: int32 where the device multiplies bytes, else float32.
    That is exact for int8 up to K = 1040, and to rounding beyond and in float8.
    """
    if x_MK.dtype != torch.int8:
        return linear(widened(x_MK), widened(w_NK), None) * 2.0**16
    if multiplies_bytes(x_MK, w_NK):
        return torch._int_mm(x_MK, w_NK.t())
    return linear(x_MK.float(), w_NK.float(), None)


def widened(codes: Tensor) -> Tensor:
    """float8_e4m3fn, finite -> float32, 2^-8 of its value: as float16 the same bits stand for that. torch's own cast
    takes ten times as long on a CPU (1280 x 320: 1.1 ms), longer than the product.
    """
    sign_and_rest = codes.view(torch.int8).to(torch.int16) << 7
    return (sign_and_rest & ~0x4000).view(torch.float16).float()  # the sign was extended into the exponent


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
def quantise_weights(model: CausalWanModel, name: str, float8_product: Float8Product | None = None) -> int:
    """Replace Linears of the model -> bytes saved. ValueError for a name that is not in WEIGHTS_DTYPES.

    Those are q, k, v and o of both attentions and both of the feed-forward, and, with inputs left whole, those of the
    embeddings of text and time and of the modulation. Patches and head stay: they are small, and the head's error goes
    into the picture with nothing after it. Once per model: there is no way back.
    """
    if name not in WEIGHTS_DTYPES:
        raise ValueError(f"weights dtype {name!r} does not exist; there are: {', '.join(WEIGHTS_DTYPES)}")
    before = weight_bytes(model)
    for block in cast("list[Block]", model.blocks):
        for parent, key, layer in _linears(block.self_attn, block.cross_attn, block.ffn):
            setattr(parent, key, QuantisedLinear(layer, name, float8_product))
    embeddings = (model.text_embedding, model.time_embedding, model.time_projection, model.pooled_embedding)
    for parent, key, layer in _linears(*embeddings):
        setattr(parent, key, WholeInputLinear(layer))
    return before - weight_bytes(model)


def _linears(*parents: nn.Module | None) -> Iterator[tuple[nn.Module, str, Linear]]:
    for parent in parents:
        if parent is not None:
            yield from ((parent, key, layer) for key, layer in list(parent.named_children()) if type(layer) is Linear)


def bytes_saved(config: TransformerConfig, itemsize: int) -> int:
    """What `quantise_weights` saves of a model of this config with so many bytes a weight; nothing is built."""
    dim, pooled = config.dim, config.pooled_text
    weights = config.num_layers * (8 * dim**2 + 2 * dim * config.ffn_dim)
    outputs = config.num_layers * (9 * dim + config.ffn_dim)
    # time: its embedding's two and the modulation's; text and its mean: two each
    weights += dim * (config.freq_dim + dim + 6 * dim) + (1 + pooled) * dim * (config.text_dim + dim)
    outputs += 8 * dim + (1 + pooled) * 2 * dim
    return weights * (itemsize - 1) - 4 * outputs


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
