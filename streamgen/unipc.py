"""UniPC of order 2 on flow matching's noise levels (arXiv 2302.04867, B2 variant, data prediction): Wan's own sampler.

A step does two things with the model's new x0: it corrects the sample that it was computed from (UniC), then predicts
the next one (UniP). Both are exponential integrators in lambda = log((1 - sigma) / sigma). The first step has order 1.
A last step to sigma 0 gives x0 itself, whatever the order, so it is no step of this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from streamgen.flow import shift_sigma, step_sigmas, unshift_sigma

FIRST_TIME = 0.999
"""Where Wan's steps begin, before the shift: the top of its training grid of 1000 levels, not pure noise."""
TOP_SIGMA = 1 - 17 * 2.0**-24
"""Stands for sigma 1, where lambda is infinite: 1 - 1e-6 as float32 has it, so that results equal diffusers'."""


def unipc_sigmas(num_steps: int, shift: float) -> tuple[float, ...]:
    """Noise levels as Wan's code takes them: even in time from FIRST_TIME to 0, which is left out, then warped.

    4 steps at shift 5: 0.99980, 0.93727, 0.83306, 0.62469. diffusers' own grid begins at 1 and is even down to 0.001.
    """
    return tuple(
        shift_sigma(FIRST_TIME * unshift_sigma(sigma, shift), shift) for sigma in step_sigmas(num_steps, shift)
    )


class Visited(NamedTuple):
    """A noise level that the sampler has been at."""

    sigma: float
    x0: Tensor
    x_t: Tensor
    """The sample there, corrected."""


def unipc_step(
    x_t: Tensor, x0: Tensor, sigma: float, sigma_next: float, past: Sequence[Visited]
) -> tuple[Tensor, Visited]:
    """One step -> (x at sigma_next, what later steps need of this one). 0 < sigma_next < sigma <= 1.

    x0: the model's at (x_t, sigma). past: the block's steps so far, oldest first; the last two are used.
    """
    if past:
        x_t = _corrected(x0, sigma, past)
    here = Visited(sigma, x0, x_t)
    h = _lambda(sigma_next) - _lambda(sigma)
    slope = None if not past else 0.5 * _slope(past[-1], here, h)
    return _advance(here, sigma_next, slope), here


def _corrected(x0: Tensor, sigma: float, past: Sequence[Visited]) -> Tensor:
    """The sample at `sigma` made again from the one before, now that x0 is known here as well (UniC)."""
    before = past[-1]
    h = _lambda(sigma) - _lambda(before.sigma)
    difference = x0 - before.x0
    if len(past) == 1:
        return _advance(before, sigma, 0.5 * difference)
    # Order 2: the weights r that solve [1 1; ratio 1] r = (b1, b2).
    ratio = (_lambda(past[-2].sigma) - _lambda(before.sigma)) / h
    b1 = (math.expm1(-h) / -h - 1) / math.expm1(-h)
    b2 = 2 * ((math.expm1(-h) / -h - 1) / -h - 0.5) / math.expm1(-h)
    old = (b1 - b2) / (1 - ratio)
    return _advance(before, sigma, old * _slope(past[-2], before, h) + (b1 - old) * difference)


def _advance(start: Visited, sigma_next: float, slope: Tensor | None) -> Tensor:
    """x at sigma_next, were x0 constant from `start` on but for `slope`, its weighted change over the step."""
    alpha_next = 1 - _below_one(sigma_next)
    decay = math.expm1(_lambda(start.sigma) - _lambda(sigma_next))
    x0 = start.x0 if slope is None else start.x0 + slope
    return sigma_next / _below_one(start.sigma) * start.x_t - alpha_next * decay * x0


def _slope(before: Visited, here: Visited, h: float) -> Tensor:
    """The change of x0 from the step before to this one, scaled to a step of length h in lambda."""
    return (before.x0 - here.x0) * (h / (_lambda(before.sigma) - _lambda(here.sigma)))


def _lambda(sigma: float) -> float:
    below = _below_one(sigma)
    return math.log((1 - below) / below)


def _below_one(sigma: float) -> float:
    return min(sigma, TOP_SIGMA)
