"""The cost model: what it was told stays in bounds, and what it estimates follows from it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dbop_raw.batching.costs import CostModel

prices = st.none() | st.floats(1e-7, 1.0)
shares = st.floats(0.0, 1.0)


@given(st.lists(st.tuples(st.integers(1, 1000), shares), max_size=20))
def test_the_failure_rate_is_a_share_of_what_was_met(met: list[tuple[int, float]]) -> None:
    costs = CostModel()
    shares_met = []
    for total, share in met:
        bad = int(total * share)
        costs.learn_batch(total, bad)
        shares_met.append(bad / total)
    low, high = min(shares_met, default=0.0), max(shares_met, default=0.0)
    assert low - 1e-9 <= costs.failure_rate <= high + 1e-9


@given(prices, st.integers(0, 1000), st.floats(-1.0, 100.0))
def test_a_measured_price_is_never_negative(before: float | None, length: int, seconds: float) -> None:
    costs = CostModel(attempt=before, row=before, row_alone=before)
    costs.learn_write(length, seconds)
    costs.learn_rows(length, seconds)
    for price in (costs.attempt, costs.row, costs.row_alone):
        assert price is None or price > 0


def test_an_old_batch_counts_less_than_a_new_one() -> None:
    costs = CostModel()
    costs.learn_batch(100, 100)
    costs.learn_batch(100, 0)
    assert costs.failure_rate < 0.5


def test_a_short_span_tells_the_price_of_an_attempt() -> None:
    costs = CostModel()
    costs.learn_write(1, 0.25)
    assert (costs.attempt, costs.row) == (0.25, None)


def test_a_long_span_tells_the_price_of_a_row() -> None:
    costs = CostModel()
    costs.learn_write(1000, 0.5)
    assert (costs.attempt, costs.row) == (None, 0.0005)


@given(st.integers(2, 10_000), st.floats(1e-6, 1e-2), st.floats(1e-7, 1e-3))
def test_a_search_that_is_told_the_item_is_no_dearer_than_one_that_is_not(
    length: int, attempt: float, row: float
) -> None:
    costs = CostModel(attempt=attempt, row=row)
    assert costs.search_cost(length, 1, located=1.0) <= costs.search_cost(length, 1, located=0.0) * (1 + 1e-9)


@given(prices, prices, prices, st.integers(1, 10_000))
def test_a_longer_span_costs_more(
    attempt: float | None, row: float | None, row_alone: float | None, length: int
) -> None:
    costs = CostModel(attempt=attempt, row=row, row_alone=row_alone)
    assert costs.span_cost(length) < costs.span_cost(length + 1)
    assert costs.rows_cost(length) < costs.rows_cost(length + 1)
