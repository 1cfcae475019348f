"""How much memory there is, and how much of it is free."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


CGROUP = Path("/sys/fs/cgroup")


def host_bytes() -> tuple[int, int] | None:
    """(total, available without swapping) of this machine or container (Linux; None elsewhere)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.split()[1:]}
    total, available = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    if limit is None or used is None:  # "max", no container, or an older kind of group
        return total, available
    return min(total, limit), min(available, max(limit - used + _reclaimable(CGROUP / "memory.stat"), 0))


def _reclaimable(file: Path) -> int:
    """Of files, held as long as nobody needs the room."""
    rows = (line.split() for line in file.read_text().splitlines())
    return next((int(row[1]) for row in rows if row[0] == "inactive_file"), 0)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def free_bytes(device: torch.device) -> int | None:
    """What tensors on a device may still take, with what torch holds there and does not use; None: not known."""
    if device.type == "cuda":
        import torch  # not above: those who ask for the host's memory may not have torch loaded

        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    known = host_bytes() if device.type == "cpu" else None
    return None if known is None else known[1]
