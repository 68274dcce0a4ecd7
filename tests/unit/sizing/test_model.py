"""Percentiles, intervals and the scalability law: what the measurements say in numbers."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numpy", reason="needs the extra sizing")

from dbop_raw.sizing.model import PERCENTS, Spread, fit, percentiles, relative_interval, student, usl


@given(st.lists(st.floats(1e-6, 500), min_size=1, max_size=200))
def test_percentiles_are_values_that_were_measured(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread.max == max(values)
    assert spread.p50 <= spread.p95 <= spread.p99 <= spread.p999 <= spread.max
    assert spread.p50 == sorted(values)[max(0, math.ceil(len(values) * 0.5) - 1)]
    assert spread.mean == pytest.approx(sum(values) / len(values))
    assert len(spread.curve) == len(PERCENTS)
    assert list(spread.curve) == sorted(spread.curve)
    assert (spread.curve[0], spread.curve[-1]) == (min(values), max(values))


def test_percentiles_of_nothing_are_zero() -> None:
    spread = Spread.of([])
    assert (spread.p99, spread.max, spread.mean) == (0.0, 0.0, 0.0)
    assert percentiles([], (50, 99)) == [0.0, 0.0]


# From the table of the NIST handbook: t of 0.95 on one side is 90 % on both.
@pytest.mark.parametrize(
    ("confidence", "freedom", "t"),
    [
        (0.9, 1, 6.314),
        (0.9, 2, 2.920),
        (0.9, 4, 2.132),
        (0.9, 9, 1.833),
        (0.95, 4, 2.776),
        (0.95, 29, 2.045),
        (0.95, 100, 1.984),
        (0.99, 3, 5.841),
    ],
)
def test_students_t_is_that_of_the_tables(confidence: float, freedom: int, t: float) -> None:
    assert student(confidence, freedom) == pytest.approx(t, abs=0.0005)


SIZES = (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize(
    ("rate", "sigma", "kappa"), [(1000.0, 0.05, 0.001), (250.0, 0.3, 0.0005), (5000.0, 0.0, 0.01)]
)
def test_the_law_gives_back_what_made_the_data(rate: float, sigma: float, kappa: float) -> None:
    found = fit(SIZES, [usl(size, rate, sigma, kappa) for size in SIZES])
    assert found is not None
    assert found.rate.value == pytest.approx(rate, rel=0.01)
    assert found.sigma.value == pytest.approx(sigma, abs=0.002)
    assert found.kappa.value == pytest.approx(kappa, rel=0.05)
    assert found.explained > 0.999
    assert found.peak is not None
    assert found.peak.value == pytest.approx(math.sqrt((1 - sigma) / kappa), rel=0.05)


def test_the_laws_intervals_hold_the_truth_where_the_data_are_noisy() -> None:
    rng = Random(5)
    sizes = SIZES * 4
    found = fit(sizes, [usl(size, 1000, 0.05, 0.001) * rng.gauss(1, 0.03) for size in sizes])
    assert found is not None
    for estimate, truth in ((found.rate, 1000), (found.sigma, 0.05), (found.kappa, 0.001)):
        assert estimate.low <= truth <= estimate.high
        assert estimate.low <= estimate.value <= estimate.high
    middle = found.throughput(8)
    assert middle.low < usl(8, 1000, 0.05, 0.001) < middle.high


def test_a_line_has_no_peak() -> None:
    found = fit(SIZES, [100.0 * size for size in SIZES])
    assert found is not None
    assert found.peak is None


def test_too_few_sizes_or_a_size_that_did_nothing_are_no_data() -> None:
    assert fit((1, 2, 4), (1.0, 2.0, 3.0)) is None
    assert fit((1, 1, 2, 2), (1.0, 1.0, 2.0, 2.0)) is None
    assert fit(SIZES, (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)) is None


def test_the_interval_of_one_ratio_is_everything_and_of_equal_ones_nothing() -> None:
    assert relative_interval([0.9]).high == math.inf
    narrow = relative_interval([0.9, 0.9, 0.9])
    assert narrow.low == pytest.approx(0.9) == narrow.high
