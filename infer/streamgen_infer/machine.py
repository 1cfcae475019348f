"""What this machine and this process are: read from the system, no torch."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path

from streamgen.memory import host_bytes

try:
    import resource
except ModuleNotFoundError:  # Windows: peak memory is then reported as unknown
    resource = None  # type: ignore[assignment]

INTERESTING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")


def peak_rss_mb() -> float | None:
    """The most memory this process ever held, MB."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def rss_mb() -> float | None:
    """Memory held now, MB (Linux; None elsewhere)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def process_age_s() -> float | None:
    """Seconds since this process was started, interpreter included (Linux; None elsewhere)."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, AttributeError):
        return None


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Those instruction sets that decide how fast fp32 and bf16 are here."""
    found = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return [flag for flag in INTERESTING_FLAGS if flag in found]


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_mb() -> tuple[float, float] | None:
    """(total, available) MB (Linux; None elsewhere)."""
    known = host_bytes()
    return None if known is None else (known[0] / 1e6, known[1] / 1e6)


def _cpuinfo(field: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), None)
