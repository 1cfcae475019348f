"""Flow matching as pure functions (Lipman et al. 2023, arXiv 2210.02747; rectified flow, arXiv 2209.03003).

sigma in [0, 1] is the noise level, 0 is clean:

    x_t  = (1 - sigma) x0 + sigma eps        flow = d x_t / d sigma = eps - x0
    x0   = x_t - sigma flow                  eps  = x_t + (1 - sigma) flow

Latents are BFCHW. `sigma` is a float or a tensor of the leading dimensions ([B, F], or [B]) and is broadcast over the
rest. Results have the dtype of ordinary promotion: keep latents in float32, a sampler must not round in bfloat16.
`timestep` = 1000 sigma exists only at the model's door.
"""

import math
from functools import lru_cache
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

Prediction = Literal["flow", "x0"]
Number = TypeVar("Number", float, Tensor)

MIN_SIGMA = 1e-3
"""Tensors of sigma are clamped to this where they divide: the lowest level of a 1000-step grid."""


def _over(sigma: float | Tensor, like: Tensor) -> float | Tensor:
    """[B, F] -> [B, F, 1, 1, 1]."""
    if isinstance(sigma, Tensor):
        return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))
    return sigma


# Noise levels.


@overload
def shift_sigma(u: float, shift: float) -> float: ...


@overload
def shift_sigma(u: Tensor, shift: float | Tensor) -> Tensor: ...


def shift_sigma(u: Any, shift: Any) -> Any:
    """sigma = s u / (1 + (s - 1) u): moves uniform u in [0, 1] towards noise for s > 1 (SD3, arXiv 2403.03206)."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: Number, shift: float) -> Number:
    """u = sigma / (s - (s - 1) sigma), the inverse of `shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def step_sigmas(num_steps: int, shift: float) -> tuple[float, ...]:
    """Noise levels of a few-step sampler, u = 1, 1 - 1/n, ..., 1/n warped.

    4 steps at shift 5: 1, 0.9375, 0.83333, 0.625.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: must be at least 1")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift={shift}: must be a finite number above 0")
    return tuple(shift_sigma((num_steps - i) / num_steps, shift) for i in range(num_steps))


def sigma_grid(num_steps: int, shift: float) -> Tensor:
    """The levels of `step_sigmas` as a float32 tensor [num_steps], descending; Wan's training grid has 1000."""
    return torch.tensor(step_sigmas(num_steps, shift), dtype=torch.float32)


def sample_sigma(u: Tensor, shift: float | Tensor) -> Tensor:
    """Training levels from uniform u in (0, 1), any shape: the same warp as the sampler's."""
    return shift_sigma(u, shift)


def timestep_of(sigma: Number) -> Number:
    """The model's clock, 1000 sigma: fractional values stay fractional (937.5, 833.33)."""
    return 1000.0 * sigma


# Conversions.


def add_noise(x0: Tensor, eps: Tensor, sigma: float | Tensor) -> Tensor:
    """x_t = (1 - sigma) x0 + sigma eps."""
    s = _over(sigma, x0)
    return (1 - s) * x0 + s * eps


def x0_from_flow(x_t: Tensor, flow: Tensor, sigma: float | Tensor) -> Tensor:
    """x0 = x_t - sigma flow."""
    return x_t - _over(sigma, x_t) * flow


def eps_from_flow(x_t: Tensor, flow: Tensor, sigma: float | Tensor) -> Tensor:
    """eps = x_t + (1 - sigma) flow."""
    return x_t + (1 - _over(sigma, x_t)) * flow


def flow_from_x0(x_t: Tensor, x0: Tensor, sigma: float | Tensor) -> Tensor:
    """flow = (x_t - x0) / sigma. At sigma 0 it is unknown: a float is refused, a tensor clamped to MIN_SIGMA."""
    if isinstance(sigma, Tensor):
        return (x_t - x0) / _over(sigma.clamp(min=MIN_SIGMA), x_t)
    if sigma <= 0:
        raise ValueError(f"sigma={sigma}: the flow is defined for sigma above 0 only")
    return (x_t - x0) / sigma


def to_x0(model_output: Tensor, x_t: Tensor, sigma: float | Tensor, prediction: Prediction) -> Tensor:
    """The clean latent that a model's output stands for."""
    return model_output if prediction == "x0" else x0_from_flow(x_t, model_output, sigma)


def to_flow(model_output: Tensor, x_t: Tensor, sigma: float | Tensor, prediction: Prediction) -> Tensor:
    """The flow that a model's output stands for (sigma 0: see `flow_from_x0`)."""
    return model_output if prediction == "flow" else flow_from_x0(x_t, model_output, sigma)


def guided(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, uncond + scale (cond - uncond): 1 is off (arXiv 2207.12598)."""
    return uncond + scale * (cond - uncond)


# Steps.


def euler_step(x_t: Tensor, flow: Tensor, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
    """x at sigma_next along the flow: the deterministic sampler's step, x + (sigma_next - sigma) flow."""
    return x_t + (_over(sigma_next, x_t) - _over(sigma, x_t)) * flow


def renoise(x0: Tensor, eps: Tensor, sigma_next: float | Tensor) -> Tensor:
    """The few-step sampler's move: fresh noise at the level of the NEXT step (Self-Forcing, arXiv 2506.08009)."""
    return add_noise(x0, eps, sigma_next)


# Loss weights.


def bounded_flow_weight(sigma: Tensor, floor: float = 0.3) -> Tensor:
    """Weight of an x0 loss that equals the flow loss, 1 / sigma^2, bounded below sigma = `floor`."""
    return 1 / sigma.clamp(min=floor).square()


def wan_weight(sigma: Tensor, shift: float = 5.0) -> Tensor:
    """Wan's weight of a flow loss: exp(-2 ((t - 500) / 1000)^2), less its minimum on the shifted grid, mean 1 on it."""
    low, mean = _wan_normaliser(shift)
    return ((-2 * (sigma - 0.5).square()).exp() - low) / mean


@lru_cache(maxsize=8)
def _wan_normaliser(shift: float) -> tuple[float, float]:
    weights = [math.exp(-2 * (sigma - 0.5) ** 2) for sigma in step_sigmas(1000, shift)]
    low = min(weights)
    return low, sum(weights) / len(weights) - low
