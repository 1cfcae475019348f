"""Weights and inputs of a block's products in float8 (e4m3), for GPUs that multiply it: twice the rate of bf16 there.

Each output channel of a weight and each token has a scale of its own, its largest magnitude over 448 (FP8 formats for
deep learning, arXiv 2209.05433). Tokens are quantised on the fly, sums are float32: `streamgen_kernels.linear`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from streamgen.linear import Linear
from streamgen.ops import kernel_linear
from streamgen.transformer import Block, CausalWanModel


class Float8Linear(nn.Module):
    """A Linear made of one that is loaded, on a device that runs kernels. No gradients."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        quantise_rows, self._product = kernel_linear()
        codes_OC, scale_O = quantise_rows(layer.weight.detach(), torch.float8_e4m3fn)
        self.register_buffer("weight", codes_OC)
        self.register_buffer("scale", scale_O)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        return self._product(x, self.weight, self.scale, self.bias)


@torch.no_grad()
def use_float8(model: CausalWanModel) -> int:
    """Replace the Linears of the model's blocks -> how many; embeddings, modulation and head stay as they are.

    There is no way back. UserError where kernels cannot run.
    """
    count = 0
    for block in cast("list[Block]", model.blocks):
        for parent in (block.self_attn, block.cross_attn, block.ffn):
            for name, layer in list(parent.named_children()):
                if type(layer) is Linear:
                    setattr(parent, name, Float8Linear(layer))
                    count += 1
    return count
