"""How far a measured share can be trusted: 95 % intervals, always the same for the same numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DRAWS = 2000
_Z = 1.959964  # 95 % of a normal distribution lie within so many deviations


def wilson(share: float, n: int) -> tuple[float, float]:
    """The score interval of a share of n independent trials (Wilson, 1927); nan for a share that is nan.

    It stays in [0, 1] and has a width at 0 and 1 too. For the mean of n values in [0, 1] that are no yes or no (a
    clip that is right in one of two windows) it is wider than need be.
    """
    if math.isnan(share) or n < 1:
        return math.nan, math.nan
    spread = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    middle = share + _Z**2 / (2 * n)
    scale = 1 + _Z**2 / n
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return max(min(low, share), 0.0), min(max(high, share), 1.0)  # at 0 and 1 rounding would leave the share outside


def bootstrap(statistic: Callable[[Array], Array], n: int) -> tuple[float, float]:
    """Percentile interval of a statistic of n streams, drawn anew with replacement DRAWS times.

    statistic: indices of the streams drawn, int [draws, n] -> [draws]; inf counts as any value does, nan is a draw that
    says nothing and is left out.
    """
    values = statistic(np.random.default_rng(0).integers(n, size=(DRAWS, n)))
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return math.nan, math.nan
    return tuple(float(known[round(part * (len(known) - 1))]) for part in (0.025, 0.975))  # type: ignore[return-value]


def drift(first: Sequence[float], last: Sequence[float]) -> dict[str, float]:
    """What is left at the end of streams: mean of `last` over mean of `first`, with an interval over the streams.

    One value per stream in each, in the same order -> 'ratio' (1: no drift; nan if nothing was right at first),
    'low' and 'high' (inf if too few are right at first to tell).
    """
    if len(first) != len(last) or not first:
        raise ValueError(f"{len(first)} first and {len(last)} last values; give one of each for at least one stream")
    a, b = np.asarray(first, dtype=float), np.asarray(last, dtype=float)

    def ratio(drawn: Array) -> Array:
        before, after = a[drawn].mean(1), b[drawn].mean(1)
        nothing = np.where(after > 0, math.inf, math.nan)
        return np.divide(after, before, out=nothing, where=before > 0)

    if a.mean() == 0:
        return {"ratio": math.nan, "low": math.nan, "high": math.nan}
    low, high = bootstrap(ratio, len(a))
    return {"ratio": float(b.mean() / a.mean()), "low": low, "high": high}


def median_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, low and high; the lower of the two middle values, so that inf (never) may be among them. nan if empty."""
    if not values:
        return math.nan, math.nan, math.nan
    ordered = np.asarray(values, dtype=float)
    middle = (len(ordered) - 1) // 2
    low, high = bootstrap(lambda drawn: np.sort(ordered[drawn], axis=1)[:, middle], len(ordered))
    return float(np.sort(ordered)[middle]), low, high


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean (nan with one value)."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
