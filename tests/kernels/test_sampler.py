"""Noise made in a kernel is that of `streamgen.noise`, and a sampler step with it that of `streamgen.flow`."""

import pytest
import torch

from streamgen import flow, noise
from streamgen.transformer import CausalWanModel, TransformerConfig
from streamgen_kernels.noise import cell_noise
from streamgen_kernels.noise import reference as noise_reference
from streamgen_kernels.sampler_step import sampler_step

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
    """With the transformer's own unpatchify, a level of its own for every frame, and the noise of each row's cell."""
    torch.manual_seed(0)
    config = TransformerConfig(
        dim=24, ffn_dim=8, num_heads=2, num_layers=1, in_channels=3, out_channels=3, text_dim=4, text_len=2,
        patch=(1, 2, 3),
    )  # fmt: skip
    out, latents = torch.randn(4, 2, 6, 18).to(dtype), torch.randn(4, 2, 3, 4, 9)
    sigma, following = torch.rand(4, 2), torch.rand(4, 2)
    x0 = flow.to_x0(CausalWanModel(config)._unpatchify(out, latents), latents, sigma, prediction)
    eps = torch.stack([noise.cell_noise(*cell, (2, 3, 4, 9)) for cell in CELLS])
    given = [x.to(device) for x in (out, latents, sigma, following, cells_on(device))]
    got_x0, got = sampler_step(*given, patch=(2, 3), flow=prediction == "flow")
    torch.testing.assert_close(got_x0.cpu(), x0, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.cpu(), flow.add_noise(x0, eps, following), atol=2e-6, rtol=1e-6)
    last_x0, last = sampler_step(*given[:3], None, None, patch=(2, 3), flow=prediction == "flow")
    assert torch.equal(last_x0, got_x0) and last is last_x0


def test_steps_that_are_none(device):
    out, latents = torch.zeros(1, 2, 4, 12, device=device), torch.zeros(1, 2, 3, 4, 4, device=device)
    sigma, cells = torch.zeros(1, 2, device=device), torch.zeros(1, 4, dtype=torch.int64, device=device)
    for given, message in (
        ((out, latents, sigma, sigma, None), "give both or neither"),
        ((out[:, :, :3], latents, sigma, sigma, cells), r"out is \[1, 2, 3, 12\]: must be \[1, 2, 4, 12\]"),
        ((out, latents, sigma.half(), sigma, cells), "both must be float32"),
        ((out, latents, sigma, sigma, cells.int()), "cells is torch.int32: must be int64"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler_step(*given, patch=(2, 2), flow=True)
    with pytest.raises(ValueError, match="4 x 4 is not made of patches of 3 x 2"):
        sampler_step(out, latents, sigma, sigma, cells, patch=(3, 2), flow=True)
