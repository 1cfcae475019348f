"""What a launch costs: learned from launches, for each kind and shape, as a curve over the rows that share it.

    log(seconds) = point(kind, shape, rows) + speed + noise

A point is an exponentially weighted mean with a variance; logarithms, so that one stall of a second does not ruin an
estimate of milliseconds. `speed` is common to all: when the machine slows down (heat, a neighbour) everything does, the
launches that are not being made meanwhile too; their points would otherwise keep the slow time for ever. Points seen
seldom lean on the straight line through the curve, and more rows never cost less. Beyond the last point P50 goes on as
before it, so that more rows are tried, while at P90, for promises, each further row costs its full share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

from streamgen.errors import UserError

Z90 = 1.2815515655446004
"""The normal distribution's 90 % quantile."""
MEMORY = 64
"""A point is the mean over about so many of its last launches."""
SPEED_MEMORY = 8
"""The common speed follows so many launches, whatever they are."""
SPEED_HOLD = 512
"""What lasts for about so many launches moves from the speed to the points."""
PRIOR_LAUNCHES = 16
"""A given cost weighs as much as so many launches: enough for the speed, and not one point, to take up the difference
between the machine that it is from and this one; then what is measured replaces it."""
LEANING = 4
"""A point of so many launches counts half, the line through the curve the other half."""
UNMEASURED = 0.9
"""Of its share, what a further row is thought to cost while nothing is known of more rows: reason to try them."""
REDRAWN_AT = 0.02
"""The curve is drawn again when a point has moved by more than this share."""
DRAWN_ROWS = 32
"""A curve is drawn for so many rows at least."""
FORMAT = 1


@dataclass(slots=True)
class Point:
    """Launches of one number of rows: mean and variance of log(seconds) at speed 0."""

    mean_log: float
    variance_log: float = 0.0
    launches: float = 1.0

    def add(self, value_log: float) -> None:
        """One more launch; the first ones weigh equally, later ones exponentially less with age."""
        self.launches += 1
        weight = max(1 / self.launches, 1 / MEMORY)
        step = value_log - self.mean_log
        self.mean_log += weight * step
        self.variance_log = (1 - weight) * (self.variance_log + weight * step * step)


@dataclass(slots=True)
class Curve:
    """Points by rows, and the curve through them at P50 and P90 for 1, 2, ... rows (empty: to be drawn)."""

    points: dict[int, Point] = field(default_factory=dict)
    drawn: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Rows -> (mean, spread) that the curve was drawn with."""
    p50_s: list[float] = field(default_factory=list)
    p90_s: list[float] = field(default_factory=list)

    def observe(self, rows: int, value_log: float) -> bool:
        """One more launch -> whether the curve must be drawn again."""
        point = self.points.get(rows)
        if point is None:
            point = self.points[rows] = Point(value_log)
        else:
            point.add(value_log)
        mean, spread = self.drawn.get(rows, (float("inf"), 0.0))
        moved = abs(point.mean_log - mean) + Z90 * abs(sqrt(point.variance_log) - spread) > REDRAWN_AT
        if moved:
            self.clear()
        return moved

    def clear(self) -> None:
        """The points have changed."""
        self.p50_s, self.p90_s = [], []

    def draw(self, most: int) -> None:
        """The curve for 1 to `most` rows."""
        rows = sorted(self.points)
        points = [self.points[m] for m in rows]
        self.drawn = {m: (point.mean_log, sqrt(point.variance_log)) for m, point in self.points.items()}
        weights = [point.launches for point in points]
        pooled = sum(w * point.variance_log for w, point in zip(weights, points, strict=True)) / sum(weights)
        leaning = [LEANING / (LEANING + weight) for weight in weights]
        spreads = [sqrt(p.variance_log + a * (pooled - p.variance_log)) for p, a in zip(points, leaning, strict=True)]
        middles = [exp(point.mean_log) for point in points]
        straight = _straight(rows, middles, weights)
        middles = _rising([s + a * (t - s) for s, t, a in zip(middles, straight, leaning, strict=True)], weights)
        tails = [s * exp(Z90 * spread) for s, spread in zip(middles, spreads, strict=True)]
        tails = _rising(tails, weights)
        self.p50_s = _line(rows, middles, most, _slope(rows, middles))
        self.p90_s = _line(rows, tails, most, tails[-1] / rows[-1])


def _straight(rows: list[int], seconds: list[float], weights: list[float]) -> list[float]:
    """Values at `rows` of the straight line of least relative error; for fewer than three, `seconds` themselves."""
    if len(rows) < 3:
        return seconds
    relative = [w / (s * s) for w, s in zip(weights, seconds, strict=True)]
    total = sum(relative)
    mean_rows = sum(w * m for w, m in zip(relative, rows, strict=True)) / total
    mean_s = sum(w * s for w, s in zip(relative, seconds, strict=True)) / total
    tilt = sum(w * (m - mean_rows) * (s - mean_s) for w, m, s in zip(relative, rows, seconds, strict=True))
    slope = tilt / sum(w * (m - mean_rows) ** 2 for w, m in zip(relative, rows, strict=True))
    # A negative slope or offset may put the line below zero at an end: what was measured is right there.
    return [max(mean_s + slope * (m - mean_rows), s / 2) for m, s in zip(rows, seconds, strict=True)]


def _rising(values: list[float], weights: list[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in weighted squares (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, weight_a, n_a), (b, weight_b, n_b) = pools[-2:]
            weight_ab = weight_a + weight_b
            pools[-2:] = [((a * weight_a + b * weight_b) / weight_ab, weight_ab, n_a + n_b)]
    return [value for value, _, count in pools for _ in range(count)]


def _slope(rows: list[int], seconds: list[float]) -> float:
    """Seconds of a row beyond the last point: as between the last two, at most the last one's share of a row."""
    share_s = seconds[-1] / rows[-1]
    if len(rows) == 1:
        return share_s * UNMEASURED
    return min((seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2]), share_s)


def _line(rows: list[int], seconds: list[float], most: int, slope_s: float) -> list[float]:
    """Seconds for 1 to `most` rows: flat before the first known, straight between, by the slope after the last."""
    curve, k = [], 0
    for m in range(1, most + 1):
        while k + 1 < len(rows) and rows[k + 1] <= m:
            k += 1
        if m <= rows[0]:
            curve.append(seconds[0])
        elif k + 1 < len(rows):
            share = (m - rows[k]) / (rows[k + 1] - rows[k])
            curve.append(seconds[k] + share * (seconds[k + 1] - seconds[k]))
        else:
            curve.append(seconds[-1] + slope_s * (m - rows[-1]))
    return curve


class CostModel:
    """Seconds of a launch by kind, shape and rows; `observe` teaches it, `predict` asks it."""

    def __init__(self) -> None:
        self._curves: dict[tuple[str, str], Curve] = {}
        self._speed_log = 0.0
        self.factor = 1.0
        """The common speed: what is drawn is multiplied by it."""
        self.derived: dict[tuple[Any, ...], float] = {}
        """What others have computed from curves, without the factor; empty again when a curve has moved."""

    def observe(self, kind: str, shape: str, rows: int, seconds: float) -> None:
        """A launch took `seconds`. ValueError unless rows >= 1 and 0 < seconds < inf."""
        _check(kind, shape, rows, seconds)
        curve = self._curves.get((kind, shape))
        if curve is None:
            curve = self._curves[kind, shape] = Curve()
        elif rows in curve.points:
            p50_s, _, factor = self.curve(kind, shape, rows)
            surprise = log(seconds / (p50_s[rows - 1] * factor))
            self._speed_log = self._speed_log * (1 - 1 / SPEED_HOLD) + surprise / SPEED_MEMORY
            self.factor = exp(self._speed_log)
        if curve.observe(rows, log(seconds) - self._speed_log):
            self.derived.clear()

    def give(self, kind: str, shape: str, rows: int, seconds: float, *, p90_s: float | None = None) -> None:
        """A cost from elsewhere (a bench, a data sheet), to be replaced by what is measured here."""
        _check(kind, shape, rows, seconds)
        spread = 0.0 if p90_s is None else log(max(p90_s, seconds) / seconds) / Z90
        curve = self._curves.setdefault((kind, shape), Curve())
        curve.points[rows] = Point(log(seconds) - self._speed_log, spread**2, PRIOR_LAUNCHES)
        curve.clear()
        self.derived.clear()

    def predict(self, kind: str, shape: str, rows: int, quantile: float = 0.5) -> float:
        """Seconds of a launch of so many rows; quantile: 0.5 or 0.9. LookupError if kind and shape are unknown."""
        p50_s, p90_s, factor = self.curve(kind, shape, rows)
        if quantile == 0.5:
            return p50_s[rows - 1] * factor
        if quantile != 0.9:
            raise ValueError(f"quantile {quantile}: 0.5 and 0.9 are kept")
        return p90_s[rows - 1] * factor

    def curve(self, kind: str, shape: str, rows: int) -> tuple[Sequence[float], Sequence[float], float]:
        """P50 and P90 of launches of 1, 2, ... at least `rows` rows, both to be multiplied by the third.

        It is what `predict` says, many rows at once; LookupError as there.
        """
        curve = self._curves.get((kind, shape))
        if curve is None:
            raise LookupError(f"no cost of {kind!r} for shape {shape!r}: launch it once, or give one")
        if rows > len(curve.p50_s):
            curve.draw(max(rows, DRAWN_ROWS))
            self.derived.clear()
        return curve.p50_s, curve.p90_s, self.factor

    def known(self, kind: str, shape: str) -> bool:
        """Whether `predict` has an answer."""
        return (kind, shape) in self._curves

    def names(self) -> list[str]:
        """What is known, for messages."""
        return [f"{kind} of {shape!r}" for kind, shape in sorted(self._curves)]

    def shapes(self) -> list[str]:
        """The shapes of which any cost is known."""
        return sorted({shape for _, shape in self._curves})

    def merge(self, prior: CostModel) -> None:
        """Take over what `prior` knows and this one does not.

        Where both know a curve, the prior's further points are scaled so that it fits the points that are known here:
        another machine's curve has the right form, not the right size.
        """
        for key, theirs in prior._curves.items():
            ours = self._curves.setdefault(key, Curve())
            own = dict(ours.points)
            offsets = [point.mean_log - log(prior.predict(*key, rows)) for rows, point in own.items()]
            offset = sum(offsets) / len(offsets) if offsets else prior._speed_log - self._speed_log
            for rows, point in theirs.points.items():
                if rows not in own:
                    weight = min(point.launches, PRIOR_LAUNCHES)
                    ours.points[rows] = Point(point.mean_log + offset, point.variance_log, weight)
            ours.clear()
        self.derived.clear()

    def values(self) -> dict[str, Any]:
        """Everything, for JSON."""
        curves = [
            {
                "kind": kind,
                "shape": shape,
                "points": [
                    {
                        "rows": rows,
                        "p50_s": exp(point.mean_log + self._speed_log),
                        "p90_s": exp(point.mean_log + self._speed_log + Z90 * sqrt(point.variance_log)),
                        "launches": point.launches,
                    }
                    for rows, point in sorted(curve.points.items())
                ],
            }
            for (kind, shape), curve in sorted(self._curves.items())
        ]
        return {"format": FORMAT, "curves": curves}

    def save(self, path: Path) -> None:
        """Write `values` as JSON: whole or not at all."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(self.values(), indent=1) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """A file of `save`. UserError if there is none or it is something else."""
        try:
            return cls.from_values(json.loads(path.read_text()))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a file of measured costs ({error})") from error

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> CostModel:
        """The inverse of `values`. ValueError, KeyError or TypeError if it is something else."""
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}, not {FORMAT}")
        model = cls()
        for curve in values["curves"]:
            for point in curve["points"]:
                model.give(curve["kind"], curve["shape"], point["rows"], point["p50_s"], p90_s=point["p90_s"])
                model._curves[curve["kind"], curve["shape"]].points[point["rows"]].launches = float(point["launches"])
        return model


def _check(kind: str, shape: str, rows: int, seconds: float) -> None:
    if rows < 1 or not 0 < seconds < float("inf"):
        raise ValueError(f"cost of {kind} {shape}: {rows} rows took {seconds} s; rows must be >= 1, seconds > 0")
