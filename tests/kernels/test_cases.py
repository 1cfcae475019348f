"""Every kernel equals its reference, forward and backward, at sizes that are no powers of two."""

import pytest
import torch

from streamgen_kernels.cases import Case, cases

NAMES = (
    "norm_modulate",
    "norm_modulate, gradients",
    "gate_residual",
    "gate_residual, gradients",
    "gate_residual_norm",
    "gate_residual_norm, gradients",
    "norm_rope",
    "norm_rope, gradients",
    "gelu_tanh",
    "gelu_tanh, gradients",
    "norm_rope_store",
    "norm_rope_store, int8",
    "norm_rope_store, float8_e4m3fn",
    "ring_rope",
    "ring_attention",
    "ring_attention, int8",
    "ring_attention, float8_e4m3fn",
    "quantise_rows, int8",
    "scaled_product, int8",
    "quantise_rows, float8_e4m3fn",
    "scaled_product, float8_e4m3fn",
    "cell_noise",
    "renoise",
)


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=str)
def made(request: pytest.FixtureRequest, device: torch.device) -> dict[str, Case]:
    return {case.name: case for case in cases(device, request.param)}


@pytest.mark.parametrize("name", NAMES)
def test_equals_its_reference(made: dict[str, Case], name: str) -> None:
    assert tuple(made) == NAMES
    assert made[name].error() <= made[name].tolerance


def test_a_case_sees_what_is_wrong() -> None:
    right = torch.tensor([1.0, -4.0])

    def case(*wrong: torch.Tensor) -> Case:
        return Case(name="x", kernel=lambda: wrong, reference=lambda: (right,), tolerance=0.1, roof="bytes")

    assert case(right).check() == (True, "differs by 0.0e+00, within 1.0e-01")
    assert case(torch.tensor([1.6, -4.0])).error() == pytest.approx(0.15)
    assert not case(torch.tensor([1.6, -4.0])).check()[0]
    assert not case(torch.tensor([torch.nan, -4.0])).check()[0]
    assert case(right[:1]).check() == (False, "ValueError: x made [1] where [2] is right")
