"""How much memory there is, and how much of it is free."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def host_bytes() -> tuple[int, int] | None:
    """(total, available without swapping) of this machine (Linux; None elsewhere)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.split()[1:]}
    return kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024


def free_bytes(device: torch.device) -> int | None:
    """What tensors on a device may still take, with what torch holds there and does not use; None: not known."""
    if device.type == "cuda":
        import torch  # not above: those who ask for the host's memory may not have torch loaded

        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    known = host_bytes() if device.type == "cpu" else None
    return None if known is None else known[1]
