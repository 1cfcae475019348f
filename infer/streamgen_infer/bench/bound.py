"""The machine's limit for one pass of the transformer: its matrix products and attentions, and nothing between them.

`streamgen.costs.pass_shapes` counts from the config what a streaming pass computes; `Bound` runs exactly that on
operands of its own, as many as the model has weights and cached keys, so that the CPU's caches are as cold for it as
for the model. Products and attention go through the model's own choice of libraries (`streamgen.linear`, backend
`auto`): a slower one would flatter the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamgen.attention import attend
from streamgen.costs import Attention, Product
from streamgen.linear import linear


@dataclass(frozen=True, slots=True)
class Convolution:
    """A 2-D convolution over [images, channels, height, width]."""

    images: int
    channels: int
    height: int
    width: int
    weight: tuple[int, ...]
    padding: tuple[int, int]

    @property
    def outputs(self) -> int:
        """Values that it writes."""
        rows, columns = (
            size + 2 * pad - kernel + 1
            for size, pad, kernel in zip((self.height, self.width), self.padding, self.weight[2:], strict=True)
        )
        return self.images * self.weight[0] * rows * columns

    @property
    def flops(self) -> int:
        return 2 * self.outputs * math.prod(self.weight[1:])


Shape = Product | Attention | Convolution


def moved_values(shape: Shape) -> int:
    """Operands that are read once and results that are written once: the least that any way of doing it moves."""
    match shape:
        case Product():
            return shape.m * shape.k + shape.k * shape.n + shape.m * shape.n
        case Attention():
            return 2 * shape.heads * shape.width * (shape.queries + shape.keys)
        case Convolution():
            inputs = shape.images * shape.channels * shape.height * shape.width
            return inputs + math.prod(shape.weight) + shape.outputs


def decode_shapes(codec: Any, latents_BFCHW: Tensor) -> list[Shape]:
    """The products and convolutions that the codec runs to decode a block of this shape."""
    return shapes_of(codec, lambda: codec.decode_stream(latents_BFCHW, None))


def shapes_of(owner: nn.Module, call: Callable[[], object]) -> list[Shape]:
    """The products and convolutions that modules of `owner` run in a call."""
    found: list[Shape] = []

    def seen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        if isinstance(module, nn.Linear):
            found.append(Product(x.numel() // x.shape[-1], x.shape[-1], module.out_features))
        elif isinstance(module, nn.Conv2d):
            assert module.stride == (1, 1) and module.groups == 1 and not isinstance(module.padding, str), module
            height, width = module.padding
            images, channels, rows, columns = x.shape
            found.append(Convolution(images, channels, rows, columns, tuple(module.weight.shape), (height, width)))

    hooks = [module.register_forward_pre_hook(seen) for module in owner.modules()]
    try:
        with torch.no_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return found


class Bound:
    """Runs shapes on operands made beforehand: a weight for each product, keys and values for each attention."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype) -> None:
        self._inputs: dict[tuple[int, ...], Tensor] = {}
        self._dtype = dtype
        self._work = [self._operands(shape) for shape in shapes]

    @torch.no_grad()
    def run(self) -> None:
        for shape, operands in self._work:
            match shape:
                case Product():
                    linear(operands[0], operands[1], None)
                case Attention():
                    attend(operands[0], operands[1], operands[2], backend="auto")
                case Convolution():
                    F.conv2d(operands[0], operands[1], padding=shape.padding)

    def _operands(self, shape: Shape) -> tuple[Shape, tuple[Tensor, ...]]:
        match shape:
            case Product():
                return shape, (self._input(shape.m, shape.k), self._new(shape.n, shape.k))
            case Attention():
                keys = (1, shape.heads, shape.keys, shape.width)
                queries = self._input(1, shape.heads, shape.queries, shape.width)
                return shape, (queries, self._new(*keys), self._new(*keys))
            case Convolution():
                image = self._input(shape.images, shape.channels, shape.height, shape.width)
                return shape, (image, self._new(*shape.weight))

    def _input(self, *size: int) -> Tensor:
        """Activations of one size share memory, as they do in a model."""
        if size not in self._inputs:
            self._inputs[size] = self._new(*size)
        return self._inputs[size]

    def _new(self, *size: int) -> Tensor:
        return torch.randn(size).to(self._dtype)
