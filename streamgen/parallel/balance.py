"""Which rank of a layer ring runs which layers, from measured times: always watched, seldom changed.

A rank's time for a cell is what it does besides (embedding, sampling, decoding) plus its layers at its own speed, both
taken over the last WINDOW cells. The slowest rank sets the pace, so layers move when the slowest would become faster by
GAIN, for PATIENCE cells on end, and the window is measured anew after a move: a pause of one rank moves nothing, and
two ranks never pass a layer to and fro. (StreamDiffusion 2, arXiv 2511.07399, moves layers once, after warming up.)
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

WINDOW = 32
GAIN = 0.1
PATIENCE = 8


def best_counts(layers: int, per_layer_s: Sequence[float], other_s: Sequence[float]) -> list[int]:
    """Layers for each rank, at least one, so that the slowest rank is as fast as can be."""
    counts = [1] * len(other_s)
    for _ in range(layers - len(counts)):
        ends = [other_s[rank] + per_layer_s[rank] * (counts[rank] + 1) for rank in range(len(counts))]
        counts[ends.index(min(ends))] += 1
    return counts


def slowest_s(counts: Sequence[int], per_layer_s: Sequence[float], other_s: Sequence[float]) -> float:
    """Seconds of the rank that sets the pace."""
    return max(other + each * count for count, each, other in zip(counts, per_layer_s, other_s, strict=True))


def bounds_of(counts: Sequence[int]) -> tuple[int, ...]:
    """First layer of each rank, then the number of layers."""
    return (0, *itertools.accumulate(counts))


@dataclass(slots=True)
class Balancer:
    """Watches one ring."""

    bounds: tuple[int, ...]
    _seen: deque[tuple[Sequence[float], Sequence[float]]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """(seconds of the layers, of all else), by rank, of the last cells."""
    _in_favour: int = 0

    def saw(self, layers_s: Sequence[float], other_s: Sequence[float]) -> tuple[int, ...] | None:
        """The ranks' times of one cell -> new bounds, when it is time to change them."""
        self._seen.append((layers_s, other_s))
        if len(self._seen) < WINDOW:
            return None
        counts = [stop - first for first, stop in itertools.pairwise(self.bounds)]
        ranks = range(len(counts))
        per_layer_s = [median(layers[rank] for layers, _ in self._seen) / counts[rank] for rank in ranks]
        # Not the median: decoding is done for one cell in so many, and counts.
        typical_s = [fmean(sorted(other[rank] for _, other in self._seen)[:-1]) for rank in ranks]
        best = best_counts(self.bounds[-1], per_layer_s, typical_s)
        gains = slowest_s(best, per_layer_s, typical_s) <= (1 - GAIN) * slowest_s(counts, per_layer_s, typical_s)
        self._in_favour = self._in_favour + 1 if gains else 0
        return bounds_of(best) if self._in_favour >= PATIENCE else None

    def moved(self, bounds: tuple[int, ...]) -> None:
        """The ring runs by these bounds now."""
        self.bounds, self._in_favour = bounds, 0
        self._seen.clear()
