"""UniPC against diffusers' scheduler, and by its order on an equation whose solution is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from streamgen.flow import step_sigmas
from streamgen.unipc import FIRST_TIME, Visited, unipc_sigmas, unipc_step


def ours(x: Tensor, flows: list[Tensor], sigmas: tuple[float, ...]) -> list[Tensor]:
    """The sample at each level, then x0; flows: the model's answers, whatever it is asked."""
    past: tuple[Visited, ...] = ()
    seen = [x]
    for step, (flow, sigma) in enumerate(zip(flows, sigmas, strict=True)):
        x0 = x - sigma * flow
        if step + 1 < len(sigmas):
            x, visited = unipc_step(x, x0, sigma, sigmas[step + 1], past)
            past = (*past[-1:], visited)
        seen.append(x if step + 1 < len(sigmas) else x0)
    return seen


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 5.0), (4, 5.0), (7, 3.0), (20, 8.0), (50, 5.0)])
@pytest.mark.parametrize("levels", [step_sigmas, unipc_sigmas])
def test_equals_diffusers(levels: Callable[[int, float], tuple[float, ...]], steps: int, shift: float) -> None:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2, solver_type="bh2"
    )
    top = 1 if levels is step_sigmas else FIRST_TIME
    scheduler.set_timesteps(sigmas=np.linspace(top, 0, steps + 1)[:-1])
    sigmas = levels(steps, shift)
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(list(sigmas), abs=2e-6)
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(1, 3, 4, 5, 6, generator=generator)
    flows = [torch.randn(x.shape, generator=generator) for _ in range(steps)]
    theirs = [x]
    for timestep, flow in zip(scheduler.timesteps, flows, strict=True):
        theirs.append(scheduler.step(flow, timestep, theirs[-1]).prev_sample)
    for mine, other in zip(ours(x, flows, sigmas), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_levels_are_those_of_wans_own_code() -> None:
    """Published for LongLive 2, which takes them as they are: 4 steps and 2 at shift 5."""
    assert [1000 * sigma for sigma in unipc_sigmas(4, 5.0)] == pytest.approx([999.8, 937.3, 833.1, 624.7], abs=0.05)
    assert [1000 * sigma for sigma in unipc_sigmas(2, 5.0)] == pytest.approx([999.8, 833.1], abs=0.05)
    grid = np.linspace(0, 0.999, 1000)  # of training, before the shift
    for steps, shift in ((1, 3.0), (7, 5.0), (50, 8.0)):
        even = np.linspace(grid[-1], grid[0], steps + 1)[:-1]
        assert unipc_sigmas(steps, shift) == pytest.approx(shift * even / (1 + (shift - 1) * even), abs=1e-12)


def test_error_falls_with_the_cube_of_the_step() -> None:
    """The flow of Gaussian data of deviation 0.5 has a known path: x(sigma) is proportional to its deviation there."""

    def deviation(sigma: float) -> float:
        return math.sqrt((1 - sigma) ** 2 * 0.25 + sigma**2)

    def error(steps: int) -> float:
        x = torch.ones(1, dtype=torch.float64)
        past: tuple[Visited, ...] = ()
        sigmas = [0.9 - 0.8 * i / steps for i in range(steps + 1)]
        x = x * deviation(sigmas[0])
        for sigma, sigma_next in itertools.pairwise(sigmas):
            x0 = x * (1 - sigma) * 0.25 / deviation(sigma) ** 2
            x, visited = unipc_step(x, x0, sigma, sigma_next, past)
            past = (*past[-1:], visited)
        return abs(float(x) - deviation(sigmas[-1]))

    assert error(80) < 1e-4
    assert error(40) / error(80) > 7
