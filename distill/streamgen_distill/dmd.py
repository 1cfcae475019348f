"""Distribution matching distillation (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867).

The gradient of KL(student || teacher) at a sample x, noised to x_t, is the difference of the two scores; written with
denoised estimates and the paper's normaliser, one number per clip:

    g = (x0_fake(x_t) - x0_real(x_t)) / mean |x - x0_real(x_t)|
    loss = 1/2 |x - sg(x - g)|^2,   so that d loss / d x = g / number of elements

Letters: B clips, F latent frames, C H W latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLIP = (1, 2, 3, 4)


def normaliser(x0_BFCHW: Tensor, real_BFCHW: Tensor) -> Tensor:
    """mean |x - x0_real| of each clip, [B, 1, 1, 1, 1], float64."""
    return (x0_BFCHW.detach().double() - real_BFCHW.detach().double()).abs().mean(CLIP, keepdim=True)


def dmd_gradient(x0_BFCHW: Tensor, real_BFCHW: Tensor, fake_BFCHW: Tensor) -> Tensor:
    """g of the module's docstring, float64; where the teacher agrees with the sample to the bit, it is zero."""
    difference = fake_BFCHW.detach().double() - real_BFCHW.detach().double()
    return torch.nan_to_num(difference / normaliser(x0_BFCHW, real_BFCHW), nan=0.0, posinf=0.0, neginf=0.0)


def dmd_loss(
    x0_BFCHW: Tensor, real_BFCHW: Tensor, fake_BFCHW: Tensor, *, weight_B: Tensor | None = None, scored_BF: Tensor
) -> Tensor:
    """1/2 weighted mean |x - sg(x - g)|^2 over the scored frames, in float64 (scalar).

    weight_B: a number per clip, such as the reward's of Reward Forcing. scored_BF: 1 for frames that count, else 0.
    """
    x0 = x0_BFCHW.double()
    target = (x0 - dmd_gradient(x0_BFCHW, real_BFCHW, fake_BFCHW)).detach()
    error_BF = (x0 - target).square().mean((2, 3, 4)) * scored_BF
    if weight_B is not None:
        error_BF = error_BF * weight_B[:, None]
    return 0.5 * error_BF.sum() / scored_BF.sum().clamp(min=1)
