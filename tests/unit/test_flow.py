"""Flow matching: published step lists, round trips, the order of the sampler on a Gaussian."""

import math
from itertools import pairwise

import pytest
import torch

from streamgen import flow

torch.manual_seed(0)
X0, EPS = torch.randn(2, 2, 3, 3, 4, 4, dtype=torch.float64)
SIGMAS = [0.3, torch.tensor([[0.1, 0.5, 1.0], [0.9, 0.4, 0.02]], dtype=torch.float64)]
BOTH = pytest.mark.parametrize("sigma", SIGMAS, ids=["float", "per-frame"])


def test_published_steps():
    def timesteps(n, shift):
        return [flow.timestep_of(sigma) for sigma in flow.step_sigmas(n, shift)]

    assert timesteps(4, 5) == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-4)
    assert timesteps(4, 8) == pytest.approx([1000, 960, 888.8889, 727.2727], abs=1e-4)
    assert timesteps(5, 5) == pytest.approx([1000, 952.381, 882.3529, 769.2308, 555.5556], abs=1e-4)
    grid = flow.sigma_grid(1000, 5.0)
    u = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    torch.testing.assert_close(grid, flow.sample_sigma(u, 5.0).float())
    torch.testing.assert_close(flow.unshift_sigma(flow.shift_sigma(u, 8.0), 8.0), u)


@BOTH
def test_conversions_round_trip(sigma):
    x_t, v = flow.add_noise(X0, EPS, sigma), EPS - X0
    torch.testing.assert_close(flow.x0_from_flow(x_t, v, sigma), X0)
    torch.testing.assert_close(flow.eps_from_flow(x_t, v, sigma), EPS)
    torch.testing.assert_close(flow.flow_from_x0(x_t, X0, sigma), v)
    for kind, output in (("flow", v), ("x0", X0)):
        torch.testing.assert_close(flow.to_x0(output, x_t, sigma, kind), X0)
        torch.testing.assert_close(flow.to_flow(output, x_t, sigma, kind), v)
    torch.testing.assert_close(flow.euler_step(x_t, v, sigma, 0.0), X0)
    torch.testing.assert_close(flow.renoise(X0, EPS, sigma), x_t)


def test_sigma_zero():
    assert flow.flow_from_x0(X0, X0, torch.zeros(2, 3)).abs().max() == 0
    with pytest.raises(ValueError, match="sigma=0"):
        flow.flow_from_x0(X0, X0, 0.0)


def test_guidance_one_is_off():
    torch.testing.assert_close(flow.guided(X0, EPS, 1.0), EPS)
    torch.testing.assert_close(flow.guided(X0, EPS, 3.0), X0 + 3 * (EPS - X0))


def test_euler_is_of_first_order_on_a_gaussian():
    """x0 ~ N(0, s^2): the exact flow is linear in x, and x at sigma is x(1) std(sigma) / std(1)."""
    s = 0.5

    def end(num_steps):
        x = torch.ones(1, 1, dtype=torch.float64)
        sigmas = (*flow.step_sigmas(num_steps, 1.0), 0.0)
        for now, after in pairwise(sigmas):
            variance = (1 - now) ** 2 * s**2 + now**2
            x = flow.euler_step(x, x * (now - (1 - now) * s**2) / variance, now, after)
        return x.item()

    errors = [abs(end(n) - s) for n in (50, 100, 200)]
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([2, 2], rel=0.1)


def test_weights():
    grid = flow.sigma_grid(1000, 5.0).double()
    weight = flow.wan_weight(grid, 5.0)
    assert weight.min() == pytest.approx(0, abs=1e-6) and weight.mean() == pytest.approx(1, abs=1e-6)
    assert flow.wan_weight(torch.tensor(0.5)) > flow.wan_weight(torch.tensor(0.9))
    bounded = flow.bounded_flow_weight(torch.tensor([0.0, 0.3, 0.5, 1.0]))
    torch.testing.assert_close(bounded, torch.tensor([1 / 0.09, 1 / 0.09, 4.0, 1.0]))


@pytest.mark.parametrize("arguments", [(0, 5.0), (4, 0.0), (4, math.nan)])
def test_bad_step_lists(arguments):
    with pytest.raises(ValueError, match=r"num_steps|shift"):
        flow.step_sigmas(*arguments)
