"""Score identity distillation (SiD, arXiv 2404.04057), on denoised estimates.

    loss = mean[ (real - fake) ((real - x) - alpha (real - fake)) ] / mean |x - real|

With alpha = 1 this is (real - fake)(fake - x). Unlike DMD the gradient also flows through x_t into both score networks;
the normaliser (one number per clip) is a constant.
Letters: B clips, F latent frames, C H W latent.
"""

from __future__ import annotations

from torch import Tensor

from streamgen_distill.dmd import normaliser


def sid_loss(x0_BFCHW: Tensor, real_BFCHW: Tensor, fake_BFCHW: Tensor, *, alpha: float, scored_BF: Tensor) -> Tensor:
    """The loss over the scored frames (scalar, float64). real and fake keep their graphs to x0."""
    x0, real, fake = x0_BFCHW.double(), real_BFCHW.double(), fake_BFCHW.double()
    product = (real - fake) * ((real - x0) - alpha * (real - fake))
    loss_BF = (product / normaliser(x0, real).clamp(min=1e-8)).mean((2, 3, 4)) * scored_BF
    return loss_BF.sum() / scored_BF.sum().clamp(min=1)
