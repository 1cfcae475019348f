"""Kernels compiled, on a CUDA device: what tests/kernels checks by the interpreter, at the sizes and dtypes of use.

There tests/kernels runs compiled too. Nothing here asserts a speed.
"""

import math
from collections.abc import Iterator

import pytest
import torch

from streamgen import ops
from streamgen.noise import cell_noise
from streamgen_infer.kernels_check import Row, Speed, check_kernels, measure_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def test_every_kernel_and_attention_backend() -> None:
    rows = list(check_kernels(CUDA))
    assert {row.dtype for row in rows} == {"bfloat16", "float32"}
    assert {row.name: row.found for row in rows if not row.ok} == {}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_at_the_sizes_of_wan(dtype: torch.dtype) -> None:
    """One layer of Wan 1.3B at 480 x 832, before a window of 21 latent frames."""
    found = {case.name: case.check() for case in ops.kernel_cases(CUDA, dtype, large=True)}
    assert {name: line for name, (ok, line) in found.items() if not ok} == {}


def test_noise_of_a_block_of_480p() -> None:
    from streamgen_kernels.noise import cell_noise as made_here

    seed, shape = 2**63 + 11, (3, 16, 60, 104)
    cells = torch.tensor([[seed % 2**32, seed >> 32, 12, 2]], device=CUDA)
    got, wanted = made_here(cells, shape)[0].cpu(), cell_noise(seed, 12, 2, shape)
    torch.testing.assert_close(got, wanted, atol=0, rtol=2.0**-23)
    assert (got != wanted).float().mean() < 1e-5


def test_a_captured_graph_follows_lengths_and_cells() -> None:
    """One capture serves a ring that fills: lengths, page tables and noise cells are read when it runs."""
    from streamgen_kernels.attention import reference, ring_attention
    from streamgen_kernels.noise import cell_noise as made_here

    q, k, v = (torch.randn(2, 3, n, 64, device=CUDA, dtype=torch.bfloat16) for n in (70, 320, 320))
    lengths = torch.tensor([64, 0], dtype=torch.int32, device=CUDA)
    pages = torch.tensor([[0, 1, 2, 3, 4]] * 2, dtype=torch.int32, device=CUDA)
    cells = torch.zeros(2, 4, dtype=torch.int64, device=CUDA)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        return ring_attention(q, k, v, lengths, pages, 64), made_here(cells, (100,))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, noise = step()
    lengths.copy_(torch.tensor([320, 128]))
    pages.copy_(torch.tensor([[4, 3, 2, 1, 0], [2, 4, 0, 0, 0]]))
    cells[1, 2] = 9
    graph.replay()
    torch.testing.assert_close(out, reference(q, k, v, lengths, pages, 64), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(noise[1].cpu(), cell_noise(0, 9, 0, (100,)), atol=0, rtol=2.0**-23)


@pytest.mark.slow
def test_measured_is_what_passed_its_check() -> None:
    found = list(measure_kernels(CUDA))
    assert [row for row in found if isinstance(row, Row)] == []
    for speed in found:
        assert isinstance(speed, Speed)
        assert math.isfinite(speed.rate) and speed.rate > 0 and speed.roof > 0
