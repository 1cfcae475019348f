"""What a stream cost: figures gathered while it runs, in constant memory, and the report file of the contract."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamgen.errors import UserError
from streamgen_infer import machine
from streamgen_infer.errors import Failure

KEPT_SAMPLES = 4096
COMPARED = (20, 2000)  # blocks whose neighbourhood's medians tell whether a long stream slows down
NEIGHBOURS = 20


@dataclass(slots=True)
class Thinned:
    """A sample of an endless series: every value at first, then every second, fourth ... so that it stays small."""

    most: int = KEPT_SAMPLES
    values: list[tuple[int, float]] = field(default_factory=list)
    """(index in the series, value)"""
    _count: int = 0
    _stride: int = 1

    def add(self, value: float) -> None:
        if self._count % self._stride == 0:
            self.values.append((self._count, value))
            if len(self.values) > self.most:
                self.values = self.values[::2]
                self._stride *= 2
        self._count += 1


@dataclass(slots=True)
class StreamFigures:
    """Figures of one stream. Times are seconds of one monotonic clock; a block is ready when its frames are there.

    Block b misses its deadline when it is ready later than the first block was, plus the media time before block b.
    """

    fps: float
    accepted_s: float
    """When the request was accepted: model loaded, warmed up."""
    frames_made: int = 0
    blocks: int = 0
    generation_s: float = 0.0
    write_s: float = 0.0
    deadline_misses: int = 0
    max_block_ms: float = 0.0
    first_ready_s: float | None = None
    block_ms: Thinned = field(default_factory=Thinned)
    rss: Thinned = field(default_factory=lambda: Thinned(128))
    _near: dict[int, list[float]] = field(default_factory=lambda: {block: [] for block in COMPARED})

    def block(self, frames: int, started_s: float, ready_s: float) -> None:
        """The next block was made between these two times."""
        if self.first_ready_s is None:
            self.first_ready_s = ready_s
        if ready_s > self.deadline_s():
            self.deadline_misses += 1
        elapsed_ms = 1000 * (ready_s - started_s)
        for block, near in self._near.items():
            if block - NEIGHBOURS // 2 <= self.blocks < block + NEIGHBOURS // 2:
                near.append(elapsed_ms)
        self.block_ms.add(elapsed_ms)
        self.max_block_ms = max(self.max_block_ms, elapsed_ms)
        if (now_mb := machine.rss_mb()) is not None:
            self.rss.add(now_mb)
        self.generation_s += ready_s - started_s
        self.frames_made += frames
        self.blocks += 1

    def deadline_s(self) -> float:
        """When the next block is due; needs a first block."""
        assert self.first_ready_s is not None
        return self.first_ready_s + self.frames_made / self.fps

    def slack_s(self, now_s: float) -> float:
        """Media time made less wall time passed, both since the first block."""
        return self.deadline_s() - now_s if self.first_ready_s is not None else 0.0

    @property
    def frames_per_second(self) -> float | None:
        return self.frames_made / self.generation_s if self.generation_s else None

    def report(self) -> dict[str, Any]:
        """The measured fields of the contract, and some more."""
        times = [value for _, value in self.block_ms.values]
        near = {str(block): statistics.median(ms) for block, ms in self._near.items() if len(ms) == NEIGHBOURS}
        return {
            "fps": _rounded(self.frames_per_second),
            "ttff_s": None if self.first_ready_s is None else _rounded(self.first_ready_s - self.accepted_s),
            "blocks": self.blocks,
            "block_ms": {**percentiles(times, (50, 95, 99)), "max": _rounded(self.max_block_ms) if times else None},
            "block_ms_near": {block: _rounded(ms) for block, ms in near.items()},
            "deadline_misses": self.deadline_misses,
            "generation_s": _rounded(self.generation_s),
            "write_s": _rounded(self.write_s),
            "peak_rss_mb": _rounded(machine.peak_rss_mb()),
            "rss_by_block": [[index, _rounded(mb)] for index, mb in self.rss.values],
        }


def percentiles(values: Sequence[float], of: Sequence[int]) -> dict[str, float | None]:
    """{"p50": ...}: the smallest value that at least so many percent do not exceed."""
    ordered = sorted(values)
    return {f"p{p}": _rounded(ordered[max(0, -(-p * len(ordered) // 100) - 1)]) if ordered else None for p in of}


def _rounded(value: float | None, digits: int = 6) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


# Files.


def check_report(path: Path, option: str, *, overwrite: bool) -> None:
    """UserError unless `path` can be written; what is there is replaced if it is a report, or with --overwrite."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give a file")
    if path.exists() and path.stat().st_size and not overwrite and not _is_report(path):
        raise UserError(f"{option} {path} exists and is no report of streamgen; choose another name or add --overwrite")


def _is_report(path: Path) -> bool:
    try:
        found = json.loads(path.read_text())
    except ValueError:  # not text, or not JSON
        return False
    return isinstance(found, dict) and {"command", "version"} <= found.keys()


def write_report(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(values, indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror} (errno {error.errno})") from error
    finally:
        temporary.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """What a figure depends on, for the report that it stands in."""
    import torch

    return {
        "cpu": machine.cpu_name(),
        "cpu_flags": machine.cpu_flags(),
        "cores": machine.usable_cores(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
