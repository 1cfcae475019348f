"""How one step of a block leads to the next: x_t at one noise level and the model's x0 of it -> the next level.

Latents are BFCHW, float32. eps makes the noise of the next step's cell, for those that want it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from streamgen.flow import euler_step, renoise, to_flow
from streamgen.unipc import unipc_step


def _renoise(x_t: Tensor, x0: Tensor, sigma: float, sigma_next: float, eps: Callable[[], Tensor]) -> Tensor:
    return renoise(x0, eps(), sigma_next)


def _euler(x_t: Tensor, x0: Tensor, sigma: float, sigma_next: float, eps: Callable[[], Tensor]) -> Tensor:
    return euler_step(x_t, to_flow(x0, x_t, sigma, "x0"), sigma, sigma_next)


SAMPLERS = {"renoise": _renoise, "euler": _euler}
MULTISTEP = {"unipc": unipc_step}
"""Samplers that look back at the block's earlier steps; they run block after block only."""
