"""Intervals: against published numbers, at their edges, and the same every time."""

import math

import numpy as np
import pytest

from streamgen.metrics.intervals import bootstrap, drift, median_with_interval, wilson


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    # Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    [
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_numbers(share: float, n: int, low: float, high: float) -> None:
    assert wilson(share, n) == pytest.approx((low, high), abs=1e-4)
    assert wilson(1 - share, n) == pytest.approx((1 - high, 1 - low), abs=1e-4)


@pytest.mark.parametrize("n", [1, 3, 24, 24000])
@pytest.mark.parametrize("share", [0.0, 1 / 3, 1.0])
def test_the_share_is_in_its_interval(share: float, n: int) -> None:
    low, high = wilson(share, n)
    assert 0 <= low <= share <= high <= 1 and high > low


def test_what_is_not_known_has_no_interval() -> None:
    assert all(math.isnan(value) for value in (*wilson(math.nan, 5), *wilson(0.5, 0)))


def test_wilson_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    truth = rng.uniform(0.02, 0.98, 4000)
    drawn = [(p, *wilson(k / 40, 40)) for p, k in zip(truth, rng.binomial(40, truth), strict=True)]
    assert np.mean([low <= p <= high for p, low, high in drawn]) == pytest.approx(0.95, abs=0.01)


def test_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3, 1, 400)
    low, high = bootstrap(lambda drawn: values[drawn].mean(1), 400)
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)
    assert (low, high) == bootstrap(lambda drawn: values[drawn].mean(1), 400)


def test_drift() -> None:
    steady = drift([1.0, 0.5, 1.0, 0.0] * 8, [1.0, 0.5, 1.0, 0.0] * 8)
    assert steady == {"ratio": 1.0, "low": 1.0, "high": 1.0}  # the same streams are drawn in both: nothing can differ
    lost = drift([1.0] * 20, [1.0] * 10 + [0.0] * 10)
    assert lost["ratio"] == 0.5 and 0.2 < lost["low"] < 0.4 and 0.6 < lost["high"] < 0.8


def test_drift_of_streams_that_never_obeyed() -> None:
    assert math.isnan(drift([0.0, 0.0], [1.0, 0.0])["ratio"])
    rare = drift([1.0] + [0.0] * 9, [1.0] * 10)
    assert rare["ratio"] == 10 and rare["high"] == math.inf  # many draws miss the one stream that did
    with pytest.raises(ValueError, match="2 first and 1 last"):
        drift([1.0, 1.0], [1.0])


def test_medians_bear_never() -> None:
    assert median_with_interval([0.0, math.inf, 0.5])[0] == 0.5
    middle, low, high = median_with_interval([0.5] * 3 + [math.inf] * 5)
    assert middle == math.inf and low == 0.5 and high == math.inf
    assert all(math.isnan(value) for value in median_with_interval([]))
    assert median_with_interval([1.0, 2.0])[0] == 1.0
