"""Noise that belongs to a cell: (seed, block, step) -> a normal tensor, without any generator.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the stream's seed as 64-bit key
and (element // 4, block, step, 0) as counter, then Box-Muller. The four words of a counter make four normals exactly as
Triton's `tl.randn4x` pairs them, so that a kernel can make the same noise. Nothing depends on the order of calls, on
the batch or on the device; arithmetic is float64, so that one machine's rounding is another's.
"""

import math

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_KEY_STEP = np.array([[0xBB67AE85], [0x9E3779B9]], dtype=np.uint64)  # of key words 1, 0: see `_philox`
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)


def philox(key: int, counters: np.ndarray) -> np.ndarray:
    """Philox4x32-10: uint64 array [4, n] of 32-bit counter words (word 0 first) -> uint32 [n, 4] of random words."""
    # Rows (c0, c2) are multiplied, rows (c3, c1) are mixed in: each round is six operations on [2, n].
    even = counters[[0, 2]]
    odd = counters[[3, 1]]
    words = np.array([[key >> 32], [key & 0xFFFFFFFF]], dtype=np.uint64)
    for _ in range(10):
        product = even * _MULTIPLIERS
        even = ((product >> _HIGH) ^ odd ^ words)[::-1]  # high(c0) meets c3 and key 1, and becomes c2
        odd = product & _LOW  # low(c0) becomes c3, low(c2) becomes c1
        words = (words + _KEY_STEP) & _LOW
    return np.stack((even[0], odd[1], even[1], odd[0]), axis=1).astype(np.uint32)


def _uniform(words: np.ndarray) -> np.ndarray:
    """uint32 -> float64 in [0, 1), Triton's rule: as a signed number, negative ones folded."""
    signed = words.view(np.int32)
    return np.where(signed < 0, ~signed, signed) * 4.6566127342e-10


def cell_noise(
    seed: int,
    block: int,
    step: int,
    shape: tuple[int, ...],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of one cell. Element i depends on (seed, block, step, i) and on nothing else."""
    for name, value, bits in (("seed", seed, 64), ("block", block, 32), ("step", step, 32)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name}={value}: must be 0 to 2^{bits} - 1")
    count = math.prod(shape)
    counters = np.zeros((4, -(-count // 4)), dtype=np.uint64)
    counters[0] = np.arange(counters.shape[1], dtype=np.uint64)
    counters[1] = block
    counters[2] = step
    uniform = _uniform(philox(seed, counters))
    radius = np.sqrt(-2 * np.log(np.maximum(uniform[:, 0::2], 1e-7)))
    angle = 2 * math.pi * uniform[:, 1::2]
    normal = np.empty(uniform.shape, dtype=np.float32)
    normal[:, 0::2] = radius * np.cos(angle)
    normal[:, 1::2] = radius * np.sin(angle)
    return torch.from_numpy(normal.ravel()[:count].reshape(shape)).to(device=device, dtype=dtype)
