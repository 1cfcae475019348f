"""An adversarial loss on the critic's features (relativistic pairing, arXiv 1807.00734; R3GAN, arXiv 2501.05441).

A discriminator reads noised clips through the layers of the critic network: a learned register looks at the tokens of
each chosen layer by cross-attention, and a small network turns what they saw into one number.

    student:        softplus(D(real) - D(fake))
    discriminator:  softplus(D(fake) - D(real)) + w (R1 + R2),   R = (D(x + s e) - D(x))^2 on real and on fake clips

R stands for s^2 |grad D|^2 without a second derivative (APT, arXiv 2501.08316). Real and fake clips of a
pair are at the same noise level.
Letters: B clips, F latent frames, S tokens of a frame, D width, N heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamgen.transformer import CausalWanModel


class Discriminator(nn.Module):
    """One register per chosen layer -> a number per clip."""

    def __init__(self, dim: int, heads: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.registers = nn.Parameter(torch.randn(len(self.layers), 1, dim) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in self.layers)
        self.attentions = nn.ModuleList(nn.MultiheadAttention(dim, heads, batch_first=True) for _ in self.layers)
        self.head = nn.Sequential(nn.Linear(len(self.layers) * dim, dim), nn.SiLU(), nn.Linear(dim, 1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features [B, F, S, D] of each layer -> logits [B]."""
        seen = []
        for register, norm, attention, tokens in zip(
            self.registers, self.norms, self.attentions, features, strict=True
        ):
            rows_BTD = norm(tokens.flatten(1, 2))
            out_B1D, _ = attention(register.expand(len(rows_BTD), -1, -1), rows_BTD, rows_BTD, need_weights=False)
            seen.append(out_B1D[:, 0])
        return self.head(torch.cat(seen, -1))[:, 0].float()


@contextmanager
def features_of(model: CausalWanModel, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Collects the outputs of these layers, in their order, while the model runs inside the block."""
    found: list[Tensor] = []
    blocks = list(model.blocks)

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        found.append(output)

    hooks = [blocks[layer].register_forward_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def generator_loss(real_B: Tensor, fake_B: Tensor) -> Tensor:
    """The student's: it wants its clips to look more real than the real ones."""
    return F.softplus(real_B - fake_B).mean()


def discriminator_loss(real_B: Tensor, fake_B: Tensor) -> Tensor:
    return F.softplus(fake_B - real_B).mean()


def finite_difference_penalty(
    discriminate: Callable[[Tensor], Tensor], clips: Tensor, logits_B: Tensor, sigma: float
) -> Tensor:
    """R of the module's docstring: mean (D(x + sigma e) - D(x))^2, about sigma^2 |grad D|^2."""
    return (discriminate(clips + sigma * torch.randn_like(clips)) - logits_B).square().mean()
