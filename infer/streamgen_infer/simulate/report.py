"""What a simulation measured: counters, histograms of 1 ms, and the values of its report.

Terms: a block is *late* (a miss) when it is ready after its first frame was due. *Jitter* is by how much the time
between two blocks coming on screen differs from a block's length. A stream's *continuous playout ratio* is the share of
its time, after the first frame, in which the picture did not stand still for a late block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from streamgen_infer.requests import FEWER_STEPS, PREVIEW_CODEC, REPEATED

BIN_S = 0.001
BINS = 60_000
SMOOTH = 0.99
"""A stream whose playout ratio is at least this is counted as smooth."""


class Histogram:
    """Times of 0 to 60 s, kept to the millisecond."""

    def __init__(self) -> None:
        self.counts = [0] * (BINS + 1)

    def add(self, seconds: float) -> None:
        """One more; below 0 counts as 0, above 60 s as 60."""
        self.counts[min(max(int(seconds / BIN_S + 0.5), 0), BINS)] += 1

    def merge(self, other: Histogram) -> None:
        """Count the other's times here, too."""
        self.counts = [ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)]

    def values(self) -> dict[str, float] | None:
        """P50, P95, P99 and the greatest, in seconds; None if there is nothing."""
        sums = np.cumsum(self.counts)
        if not sums[-1]:
            return None
        found = {f"p{p}_s": int(np.searchsorted(sums, sums[-1] * p / 100)) * BIN_S for p in (50, 95, 99)}
        return {**found, "max_s": int(np.flatnonzero(self.counts)[-1]) * BIN_S}

    def shares(self) -> tuple[np.ndarray, np.ndarray]:
        """(seconds, share of all that are at most so long), from the first to the last that occurs."""
        used = np.flatnonzero(self.counts)
        if not len(used):
            return np.zeros(0), np.zeros(0)
        sums = np.cumsum(self.counts)
        at = np.arange(max(used[0] - 1, 0), used[-1] + 1)
        return at * BIN_S, sums[at] / sums[-1]


@dataclass(slots=True, kw_only=True)
class Tally:
    """Everything counted during a simulation."""

    devices: int
    seconds: float
    offered: int = 0
    admitted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    blocks: int = 0
    late: int = 0
    fewer_steps: int = 0
    previews: int = 0
    repeated: int = 0
    steps: dict[int, int] = field(default_factory=dict)
    """Blocks begun, by their number of steps."""
    launches: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    deaths: int = 0
    busy_s: list[float] = field(default_factory=list)
    dead_s: list[float] = field(default_factory=list)
    most_bytes: list[int] = field(default_factory=list)
    first_frame: Histogram = field(default_factory=Histogram)
    slack: Histogram = field(default_factory=Histogram)
    lateness: Histogram = field(default_factory=Histogram)
    jitter: Histogram = field(default_factory=Histogram)
    watched_s: float = 0.0
    stalled_s: float = 0.0
    miss_rates: list[float] = field(default_factory=list)
    """Of each stream that was given a block."""
    playout: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.busy_s = [0.0] * self.devices
        self.dead_s = [0.0] * self.devices
        self.most_bytes = [0] * self.devices

    def launch(self, device: int, kind: str, rows: int, took_s: float, failed: bool) -> None:
        """A launch has ended."""
        self.launches[kind] = self.launches.get(kind, 0) + 1
        self.rows[kind] = self.rows.get(kind, 0) + rows
        self.busy_s[device] += took_s
        self.failed += failed

    def begun(self, steps: int, flags: int) -> None:
        """A block has begun with so many steps."""
        self.steps[steps] = self.steps.get(steps, 0) + 1
        self.fewer_steps += bool(flags & FEWER_STEPS)

    def block(self, slack_s: float, flags: int, block_s: float, apart_s: float | None, first_s: float | None) -> None:
        """A block is ready; `apart_s` after the one before came on screen, `first_s` after its viewer came."""
        self.blocks += 1
        self.late += slack_s < 0
        self.previews += bool(flags & PREVIEW_CODEC)
        self.repeated += bool(flags & REPEATED)
        self.slack.add(slack_s)
        self.lateness.add(-slack_s)
        if apart_s is not None:
            self.jitter.add(abs(apart_s - block_s))
        if first_s is not None:
            self.first_frame.add(first_s)

    def stream(self, *, watched_s: float, blocks: int, late: int, stalled_s: float) -> None:
        """A stream has ended."""
        self.watched_s += watched_s
        self.stalled_s += stalled_s
        if blocks:
            self.miss_rates.append(late / blocks)
            self.playout.append(1 - min(stalled_s / watched_s, 1.0) if watched_s else 1.0)

    def values(self) -> dict[str, Any]:
        """The report's fields, for JSON."""
        up_s = [self.seconds - dead_s for dead_s in self.dead_s]
        busy = [busy_s / one_s if one_s else 0.0 for busy_s, one_s in zip(self.busy_s, up_s, strict=True)]
        return {
            "devices": self.devices,
            "seconds": self.seconds,
            "streams": {
                "offered": self.offered,
                "admitted": self.admitted,
                "refused": dict(sorted(self.refused.items())),
            },
            "stream_minutes": self.watched_s / 60,
            "blocks": self.blocks,
            "late_blocks": self.late,
            "miss_rate": self.late / self.blocks if self.blocks else None,
            "miss_rate_per_stream": _spread(self.miss_rates),
            "streams_over_1_percent": _share([rate > 0.01 for rate in self.miss_rates]),
            "continuous_playout_ratio": _spread(self.playout),
            "smooth_streams": _share([ratio >= SMOOTH for ratio in self.playout]),
            "stalled_s": self.stalled_s,
            "first_frame": self.first_frame.values(),
            "slack": self.slack.values(),
            "lateness": self.lateness.values(),
            "jitter": self.jitter.values(),
            "degraded": {"fewer_steps": self.fewer_steps, "preview": self.previews, "repeated": self.repeated},
            "steps": {str(steps): count for steps, count in sorted(self.steps.items())},
            "launches": dict(sorted(self.launches.items())),
            "rows_per_launch": {kind: self.rows[kind] / count for kind, count in sorted(self.launches.items())},
            "failed_launches": self.failed,
            "deaths": self.deaths,
            "utilisation": busy,
            "most_bytes": self.most_bytes,
        }


def merged(tallies: Sequence[Tally]) -> Tally:
    """Runs of the same length counted as one, on all their devices. ValueError if the lengths differ, or for none."""
    if len({tally.seconds for tally in tallies}) != 1:
        raise ValueError(f"runs of {[tally.seconds for tally in tallies]} seconds: must be one or more of one length")
    found = Tally(devices=0, seconds=tallies[0].seconds)
    for tally in tallies:
        for one in fields(Tally):
            ours, theirs = getattr(found, one.name), getattr(tally, one.name)
            if isinstance(theirs, Histogram):
                ours.merge(theirs)
            elif isinstance(theirs, dict):
                ours.update({key: ours.get(key, 0) + count for key, count in theirs.items()})
            elif one.name != "seconds":
                setattr(found, one.name, ours + theirs)
    return found


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    p1, p50, p99 = np.percentile(values, (1, 50, 99)).tolist()
    return {"p1": p1, "p50": p50, "p99": p99, "min": min(values), "max": max(values), "mean": float(np.mean(values))}


def _share(truths: Sequence[bool]) -> float | None:
    return sum(truths) / len(truths) if truths else None
