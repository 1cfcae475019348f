"""Noise made in a kernel is that of `streamgen.noise`, and a sampler step with it that of `streamgen.flow`."""

import pytest
import torch

from streamgen import noise, ops
from streamgen_kernels.noise import cell_noise
from streamgen_kernels.noise import reference as noise_reference
from streamgen_kernels.renoise import renoise, renoise_streams

CELLS = [(0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1), (2**63 + 5, 10**6, 3), (7, 2**31, 0)]


def cells_on(device: torch.device) -> torch.Tensor:
    return torch.tensor([[seed % 2**32, seed >> 32, block, step] for seed, block, step in CELLS], device=device)


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 3, 4, 6)], ids=str)
def test_noise_is_equal(device, shape):
    """To the bit by the interpreter; a GPU may round one float64 logarithm in 10^8 to the other side."""
    got = cell_noise(cells_on(device), shape).cpu()
    wanted = torch.stack([noise.cell_noise(*cell, shape) for cell in CELLS])
    if device.type == "cpu":
        assert torch.equal(got, wanted)
    torch.testing.assert_close(got, wanted, atol=0, rtol=2.0**-23)
    assert torch.equal(noise_reference(cells_on(torch.device("cpu")), shape), wanted)


@pytest.mark.parametrize("prediction", ["flow", "x0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_step_of_the_sampler(device, prediction, dtype):
    """As the reference table makes it, with the noise of each row's cell."""
    torch.manual_seed(0)
    out, latents = torch.randn(4, 2, 3, 5, 7).to(dtype), torch.randn(4, 2, 3, 5, 7)
    seeds, sigma, following = [0, 2**64 - 1, 2**63 + 5, 7], 0.9375, 5 / 6
    levels = sigma, following, prediction
    wanted = ops.renoise_step(out.float(), latents, *levels, seeds, 10**6, 3)
    moved = out.to(device), latents.to(device), *levels
    got = renoise_streams(*moved, seeds, 10**6, 3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), wanted, atol=2e-6, rtol=1e-6)
    others = renoise_streams(*moved, seeds, 10**6, 2)
    assert float((others - got).abs().min(1).values.max()) > 1e-3  # another step's noise is another


def test_steps_that_are_none(device):
    latents, cells = torch.zeros(1, 2, 3, 4, 4, device=device), torch.zeros(1, 4, dtype=torch.int64, device=device)
    for given, message in (
        ((latents[:, :1], latents, 0.9, 0.5, cells), r"out is \[1, 1, 3, 4, 4\]: must be \[1, 2, 3, 4, 4\]"),
        ((latents, latents.half(), 0.9, 0.5, cells), "latents are torch.float16: must be float32"),
        ((latents, latents, 0.9, 0.5, cells.int()), "cells is torch.int32: must be int64"),
    ):
        with pytest.raises(ValueError, match=message):
            renoise(*given, flow=True)
