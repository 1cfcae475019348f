"""One step of a few-step sampler in one pass over the latents: clean latent, new noise, next level.

x0 = x - sigma flow, x' = (1 - sigma') x0 + sigma' eps with fresh noise eps of the cell (seed, block, step), which is
never in memory (Self-Forcing, arXiv 2506.08009). All in float32: a sampler must not round.
Letters besides the package's: C channels, H W latent grid.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamgen_kernels import noise
from streamgen_kernels.common import check_place, check_shape, rows_for
from streamgen_kernels.noise import cell_normals, cells_of, check_cells


def reference(
    out_BFCHW: Tensor, latents_BFCHW: Tensor, sigma: float, sigma_next: float, cells_B4: Tensor, flow: bool
) -> Tensor:
    """In plain torch."""
    x0 = latents_BFCHW - sigma * out_BFCHW.float() if flow else out_BFCHW.float()
    return (1 - sigma_next) * x0 + sigma_next * noise.reference(cells_B4, tuple(latents_BFCHW.shape[1:]))


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    out_ptr, x_ptr, cells_ptr, step_ptr, sigma, keep_x0, sigma_next, count, FLOW: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    element = index[:, None] * 4 + tl.arange(0, 4)[None, :]
    keep = element < count
    places = b * count + element
    x0 = tl.load(out_ptr + places, keep, 0.0).to(tl.float32)
    if FLOW:
        x0 = tl.load(x_ptr + places, keep, 0.0) - sigma * x0
    tl.store(step_ptr + places, keep_x0 * x0 + sigma_next * cell_normals(index, cells_ptr + b * 4), keep)


@torch.library.custom_op("streamgen::renoise", mutates_args=())
def _op(
    out_BFCHW: Tensor, latents_BFCHW: Tensor, cells_B4: Tensor, sigma: float, sigma_next: float, flow: bool
) -> Tensor:
    out, x = out_BFCHW.contiguous(), latents_BFCHW.contiguous()
    step, count = torch.empty_like(x), x[0].numel()
    groups = -(-count // 4)
    size = rows_for(16, groups)
    _kernel[triton.cdiv(groups, size), len(x)](
        out, x, cells_B4.contiguous(), step, sigma, 1.0 - sigma_next, sigma_next, count, FLOW=flow, SIZE=size
    )
    return step


@_op.register_fake
def _(
    out_BFCHW: Tensor, latents_BFCHW: Tensor, cells_B4: Tensor, sigma: float, sigma_next: float, flow: bool
) -> Tensor:
    return torch.empty_like(latents_BFCHW, memory_format=torch.contiguous_format)


def renoise(
    out_BFCHW: Tensor, latents_BFCHW: Tensor, sigma: float, sigma_next: float, cells_B4: Tensor, *, flow: bool
) -> Tensor:
    """The model's output for noisy latents at level `sigma` -> latents at `sigma_next`, float32 [B, F, C, H, W].

    flow: what the output stands for is the flow (x0 = x - sigma flow), else x0 itself. cells_B4: of `noise.cell_noise`.
    Forward only. ValueError for shapes, dtypes and devices that do not go together.
    """
    check_shape("out", out_BFCHW, tuple(latents_BFCHW.shape))
    check_place(out_BFCHW, latents_BFCHW, cells_B4)
    if latents_BFCHW.dtype != torch.float32:
        raise ValueError(f"latents are {latents_BFCHW.dtype}: must be float32")
    check_cells(cells_B4, len(latents_BFCHW))
    step: Tensor = _op(out_BFCHW, latents_BFCHW, cells_B4, sigma, sigma_next, flow)
    return step


def renoise_streams(
    out_BFCHW: Tensor,
    latents_BFCHW: Tensor,
    sigma: float,
    sigma_next: float,
    prediction: str,
    seeds: Sequence[int],
    block: int,
    step: int,
) -> Tensor:
    """`renoise` with one cell of each stream; seeds are 0 to 2^64 - 1."""
    cells_B4 = cells_of(seeds, block, step, latents_BFCHW.device)
    return renoise(out_BFCHW, latents_BFCHW, sigma, sigma_next, cells_B4, flow=prediction == "flow")
