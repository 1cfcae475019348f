"""A thread's device, and small numbers of the host onto it without waiting for it.

A plain copy from ordinary memory to CUDA waits until all that is queued there has run: one such table a step, and the
host can no longer prepare the next pass while this one runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def use_device(device: torch.device) -> None:
    """For this thread: events, streams and Triton's launches mean a thread's own CUDA device, at first number 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `values`; to CUDA by way of pinned memory."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
