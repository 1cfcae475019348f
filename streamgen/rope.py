"""Three-dimensional rotary position embedding, Wan's form (RoFormer, arXiv 2104.09864).

A head of width K is K/2 complex numbers, ADJACENT pairs (2i, 2i+1): the first K/2 - 2 (K//6) turn with time, the next
K//6 with the row, the last K//6 with the column; each axis has its own frequencies theta^(-i/n). Angles come from
positions, not from a table of rows, so that time is unbounded and need not be a whole number.
Letters: F frames, T tokens (frame, row, column; column fastest), N heads, K head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_table(
    positions_F: Tensor | Sequence[float],
    grid_height: int,
    grid_width: int,
    head_dim: int,
    theta: float = 10000.0,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for frames at the given times, each float32 [F * grid_height * grid_width, head_dim // 2].

    Angles are formed in float64: in float32 they are off by 5e-3 rad at frame 100 000.
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"head_dim={head_dim}: must be even and at least 6")
    times = torch.as_tensor(positions_F, dtype=torch.float64)
    num_space = head_dim // 6
    num_time = head_dim // 2 - 2 * num_space
    sizes = (len(times), grid_height, grid_width)
    angles = []
    for axis, (count, num) in enumerate(zip(sizes, (num_time, num_space, num_space), strict=True)):
        frequencies = theta ** (-torch.arange(num, dtype=torch.float64, device=times.device) / num)
        places = times if axis == 0 else torch.arange(count, dtype=torch.float64, device=times.device)
        view = [1, 1, 1, num]
        view[axis] = count
        angles.append(torch.outer(places, frequencies).view(view).expand(*sizes, num))
    angles_TK = torch.cat(angles, dim=-1).flatten(0, 2)
    return angles_TK.cos().float(), angles_TK.sin().float()


def apply_rope(x_BNTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotates pair i of token t by its angle, in float32; the result has x's dtype and is contiguous [B, N, T, K]."""
    pairs = x_BNTK.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor fuses this and has no complex numbers
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos_TK - odd * sin_TK, even * sin_TK + odd * cos_TK), dim=-1)
    else:  # one pass where the line above takes seven: 10x faster on a CPU
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos_TK, sin_TK))
    return turned.flatten(-2).to(x_BNTK.dtype).contiguous()
