"""Normal noise that belongs to a cell (seed, block, step), made where it is used: `streamgen.noise` on the device.

Philox4x32-10 (Salmon et al. 2011) with the seed as key and (element // 4, block, step, 0) as counter, then Box-Muller,
in float64 as there. The words are equal; the normals too, but for the last bit where a device's float64 logarithm or
cosine is rounded otherwise and that meets a tie of float32 (about one element in 10^8).
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamgen_kernels.common import check_place, check_shape, rows_for

_WORD = 0xFFFFFFFF


def reference(cells_B4: Tensor, shape: tuple[int, ...]) -> Tensor:
    """In plain torch, with words in int64."""
    count = math.prod(shape)
    index = torch.arange(-(-count // 4), device=cells_B4.device)
    out = []
    for low, high, block, step in cells_B4.tolist():
        c = [index, *(torch.full_like(index, word) for word in (block, step, 0))]
        for _ in range(10):
            first, second = _times(c[0], 0xD2511F53), _times(c[2], 0xCD9E8D57)
            c = [second[0] ^ c[1] ^ low, second[1], first[0] ^ c[3] ^ high, first[1]]
            low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
        u = [torch.where(word >= 2**31, _WORD - word, word).double() * 4.6566127342e-10 for word in c]
        normals = []
        for a, b in (u[:2], u[2:]):
            radius = torch.sqrt(-2 * torch.log(a.clamp(min=1e-7)))
            normals += [radius * torch.cos(2 * math.pi * b), radius * torch.sin(2 * math.pi * b)]
        out.append(torch.stack(normals, 1).flatten()[:count].reshape(shape).float())
    return torch.stack(out)


def _times(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a product, by halves: int64 has no room for all of it."""
    low, high = word * (factor & 0xFFFF), word * (factor >> 16)
    total_low = (low + ((high & 0xFFFF) << 16)) & _WORD
    carry = ((low >> 16) + (high & 0xFFFF)) >> 16
    return (high >> 16) + carry, total_low


@triton.jit
def _uniform(word):  # type: ignore[no-untyped-def]
    """A word (in uint64) -> float64 in [0, 1): as a signed number, negative ones folded."""
    return tl.where(word >= 0x80000000, 0xFFFFFFFF - word, word).to(tl.int64).to(tl.float64) * 4.6566127342e-10


@triton.jit
def _pair(a, b):  # type: ignore[no-untyped-def]
    least = tl.full(a.shape, 1e-7, tl.float64)
    radius = tl.sqrt(-2.0 * tl.log(tl.where(a < least, least, a)))
    angle = b * 6.283185307179586
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


@triton.jit
def cell_normals(index, cell_ptr):  # type: ignore[no-untyped-def]
    """Four normals, float32 [n, 4], of each group of four elements; cell_ptr: (seed low, seed high, block, step)."""
    low = tl.load(cell_ptr).to(tl.uint64)
    high = tl.load(cell_ptr + 1).to(tl.uint64)
    c0 = index.to(tl.uint64)
    zero = c0 * 0
    c1 = zero + tl.load(cell_ptr + 2).to(tl.uint64)
    c2 = zero + tl.load(cell_ptr + 3).to(tl.uint64)
    c3 = zero
    for _ in tl.static_range(10):
        first = c0 * 0xD2511F53
        second = c2 * 0xCD9E8D57
        c0 = (second >> 32) ^ c1 ^ low
        c2 = (first >> 32) ^ c3 ^ high
        c1 = second & 0xFFFFFFFF
        c3 = first & 0xFFFFFFFF
        low = (low + 0x9E3779B9) & 0xFFFFFFFF
        high = (high + 0xBB67AE85) & 0xFFFFFFFF
    n0, n1 = _pair(_uniform(c0), _uniform(c1))
    n2, n3 = _pair(_uniform(c2), _uniform(c3))
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (index.shape[0], 4))


@triton.jit
def _kernel(cells_ptr, out_ptr, count, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    element = index[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(out_ptr + row * count + element, cell_normals(index, cells_ptr + row * 4), element < count)


@torch.library.custom_op("streamgen::cell_noise", mutates_args=())
def _op(cells_B4: Tensor, count: int) -> Tensor:
    out = torch.empty(len(cells_B4), count, dtype=torch.float32, device=cells_B4.device)
    groups = -(-count // 4)
    size = rows_for(16, groups)
    _kernel[triton.cdiv(groups, size), len(cells_B4)](cells_B4.contiguous(), out, count, SIZE=size)
    return out


@_op.register_fake
def _(cells_B4: Tensor, count: int) -> Tensor:
    return torch.empty(len(cells_B4), count, dtype=torch.float32, device=cells_B4.device)


def check_cells(cells_B4: Tensor, rows: int) -> None:
    """ValueError unless it is int64 [rows, 4]."""
    check_shape("cells", cells_B4, (rows, 4))
    if cells_B4.dtype != torch.int64:
        raise ValueError(f"cells is {cells_B4.dtype}: must be int64")


def cell_noise(cells_B4: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [B, *shape], a row for each cell.

    cells_B4: int64 (seed mod 2^32, seed // 2^32, block, step), each 0 to 2^32 - 1; on the device, so that a captured
    graph makes other noise when they change.
    """
    check_place(cells_B4)
    check_cells(cells_B4, len(cells_B4))
    out: Tensor = _op(cells_B4, math.prod(shape))
    return out.view(-1, *shape)


def cells_of(seeds: Sequence[int], block: int, step: int, device: torch.device) -> Tensor:
    """int64 [B, 4]: one cell of each stream; seeds are 0 to 2^64 - 1. Through pinned memory, so that nobody waits."""
    cells_B4 = torch.tensor([[seed & _WORD, seed >> 32, block, step] for seed in seeds], dtype=torch.int64)
    return cells_B4.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else cells_B4.to(device)


def noise_of_streams(
    seeds: Sequence[int], block: int, step: int, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """`cell_noise` of one cell of each stream."""
    return cell_noise(cells_of(seeds, block, step, device), shape)
