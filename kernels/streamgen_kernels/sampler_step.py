"""From the head's tokens to the next noise level: unpatchify, clean latent, new noise, in one pass over the latents.

A few-step sampler (Self-Forcing, arXiv 2506.08009) goes x0 = x - sigma flow, x' = (1 - sigma') x0 + sigma' eps with
fresh noise eps of the cell (seed, block, step), which is never in memory. All in float32: a sampler must not round.
Letters besides the package's: C channels, H W latent grid.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamgen_kernels import noise
from streamgen_kernels.common import check_place, check_shape, rows_for
from streamgen_kernels.noise import cell_normals, check_cells


def reference(
    out_BFSD: Tensor,
    latents_BFCHW: Tensor,
    sigma_BF: Tensor,
    next_sigma_BF: Tensor | None,
    cells_B4: Tensor | None,
    patch: tuple[int, int],
    flow: bool,
) -> tuple[Tensor, Tensor]:
    """In plain torch."""
    H, W = latents_BFCHW.shape[-2:]
    x = out_BFSD.unflatten(3, (*patch, -1)).unflatten(2, (H // patch[0], W // patch[1]))
    x0 = x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4).float()
    if flow:
        x0 = latents_BFCHW - sigma_BF[:, :, None, None, None] * x0
    if next_sigma_BF is None or cells_B4 is None:
        return x0, x0
    s = next_sigma_BF[:, :, None, None, None]
    return x0, (1 - s) * x0 + s * noise.reference(cells_B4, tuple(latents_BFCHW.shape[1:]))


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    out_ptr, x_ptr, sigma_ptr, next_ptr, cells_ptr, x0_ptr, step_ptr, frames, count, H, W,
    FLOW: tl.constexpr, RENOISE: tl.constexpr, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    element = index[:, None] * 4 + tl.arange(0, 4)[None, :]
    keep = element < count
    column = element % W
    row = element // W % H
    channel = element // (W * H) % C
    frame = b * frames + element // (W * H * C)
    token = (frame * (H // PH) + row // PH) * (W // PW) + column // PW
    lane = ((row % PH) * PW + column % PW) * C + channel
    x0 = tl.load(out_ptr + token * (PH * PW * C) + lane, keep, 0.0).to(tl.float32)
    places = b * count + element
    if FLOW:
        sigma = tl.load(sigma_ptr + frame, keep, 0.0)
        x0 = tl.load(x_ptr + places, keep, 0.0) - sigma * x0
    tl.store(x0_ptr + places, x0, keep)
    if RENOISE:
        sigma = tl.load(next_ptr + frame, keep, 0.0)
        tl.store(step_ptr + places, (1.0 - sigma) * x0 + sigma * cell_normals(index, cells_ptr + b * 4), keep)


@torch.library.custom_op("streamgen::sampler_step", mutates_args=())
def _op(
    out_BFSD: Tensor,
    latents_BFCHW: Tensor,
    sigma_BF: Tensor,
    next_sigma_BF: Tensor | None,
    cells_B4: Tensor | None,
    rows: int,
    columns: int,
    flow: bool,
) -> tuple[Tensor, Tensor]:
    out, x, sigma = out_BFSD.contiguous(), latents_BFCHW.contiguous(), sigma_BF.contiguous()
    B, F, C, H, W = x.shape
    x0 = torch.empty_like(x)
    renoise = next_sigma_BF is not None and cells_B4 is not None
    step = torch.empty_like(x) if renoise else x.new_empty(0)
    groups = -(-x[0].numel() // 4)
    size = rows_for(16, groups)
    _kernel[triton.cdiv(groups, size), B](
        out, x, sigma, sigma if next_sigma_BF is None else next_sigma_BF.contiguous(),
        sigma if cells_B4 is None else cells_B4.contiguous(), x0, step, F, x[0].numel(), H, W,
        FLOW=flow, RENOISE=renoise, C=C, PH=rows, PW=columns, SIZE=size,
    )  # fmt: skip
    return x0, step


@_op.register_fake
def _(
    out_BFSD: Tensor,
    latents_BFCHW: Tensor,
    sigma_BF: Tensor,
    next_sigma_BF: Tensor | None,
    cells_B4: Tensor | None,
    rows: int,
    columns: int,
    flow: bool,
) -> tuple[Tensor, Tensor]:
    x0 = torch.empty_like(latents_BFCHW, memory_format=torch.contiguous_format)
    return x0, x0.new_empty(0) if next_sigma_BF is None else torch.empty_like(x0)


def sampler_step(
    out_BFSD: Tensor,
    latents_BFCHW: Tensor,
    sigma_BF: Tensor,
    next_sigma_BF: Tensor | None,
    cells_B4: Tensor | None,
    *,
    patch: tuple[int, int],
    flow: bool,
) -> tuple[Tensor, Tensor]:
    """The head's output of noisy float32 latents -> (clean latents x0, those of the next level), each [B, F, C, H, W].

    out_BFSD: tokens (row, column), each (patch row, patch column, channel), channel fastest. flow: what it stands for
    is the flow (x0 = x - sigma flow), else x0 itself. sigma: float32 [B, F] in [0, 1]. next_sigma_BF and `cells_B4` (of
    `noise.cell_noise`): None, both, after the last level; then x0 is returned twice. Forward only.
    ValueError for shapes, dtypes and devices that do not go together.
    """
    B, F, C, H, W = latents_BFCHW.shape
    rows, columns = patch
    if H % rows or W % columns:
        raise ValueError(f"a grid of {H} x {W} is not made of patches of {rows} x {columns}")
    check_shape("out", out_BFSD, (B, F, H // rows * (W // columns), rows * columns * C))
    check_place(out_BFSD, latents_BFCHW, sigma_BF)
    if (next_sigma_BF is None) != (cells_B4 is None):
        raise ValueError("next_sigma and cells go together: give both or neither")
    for name, sigma in (("sigma", sigma_BF), ("next_sigma", next_sigma_BF)):
        if sigma is not None:
            check_place(out_BFSD, sigma)
            check_shape(name, sigma, (B, F))
            if sigma.dtype != torch.float32 or latents_BFCHW.dtype != torch.float32:
                raise ValueError(f"{name} is {sigma.dtype}, latents {latents_BFCHW.dtype}: both must be float32")
    if cells_B4 is not None:
        check_place(out_BFSD, cells_B4)
        check_cells(cells_B4, B)
    x0, step = _op(out_BFSD, latents_BFCHW, sigma_BF, next_sigma_BF, cells_B4, rows, columns, flow)
    return x0, x0 if next_sigma_BF is None else step
