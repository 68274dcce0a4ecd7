"""`pool_advice`: what two snapshots of an engine's numbers say about the size of its pool."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbop_raw import EngineStats, PolicyError, PoolAdvice, pool_advice
from dbop_raw.engine.stats import Counters
from dbop_raw.sizing.advice import _smallest

NOTHING = Counters()


def stats(counters: Counters, *, max_size: int = 8, in_use: int = 0) -> EngineStats:
    return counters.snapshot(size=max_size, max_size=max_size, idle=max_size - in_use, in_use=in_use)


def advice(
    *,
    size: int = 8,
    calls: int = 10_000,
    hold: float,
    waited: float = 0.0,
    wait: float = 0.01,
    refused: int = 0,
) -> PoolAdvice:
    """What is said of 10 s in which `calls` held a connection for `hold` seconds each, and a share waited."""
    after = Counters(held_seconds=calls * hold, shed=refused)
    slow = round(calls * waited)
    for number in range(calls):
        after.acquired(wait if number < slow else 1e-5)
    return pool_advice(stats(NOTHING, max_size=size), stats(after, max_size=size), 10.0)


def test_a_full_pool_that_calls_wait_for_is_too_small() -> None:
    found = advice(hold=0.0078, waited=0.6)
    assert found.verdict == "too small"
    assert found.mean_in_use == pytest.approx(7.8)
    assert found.utilisation == pytest.approx(0.975)
    assert found.wait_share == pytest.approx(0.6)
    assert found.mean_wait == pytest.approx(0.006, rel=0.01)
    assert found.suggested_size is not None
    assert 10 <= found.suggested_size <= 16
    assert f"try {found.suggested_size}" in found.reason
    assert "7.8 of 8" in found.reason


def test_a_pool_that_is_hardly_used_is_too_large() -> None:
    found = advice(size=20, hold=0.001)
    assert found.verdict == "too large"
    assert found.mean_in_use == pytest.approx(1.0)
    assert found.suggested_size == 4
    assert "4 would do" in found.reason


def test_between_the_two_it_keeps_its_size() -> None:
    found = advice(hold=0.004, waited=0.02)
    assert found.verdict == "about right"
    assert found.suggested_size == 8
    assert "2 % of 10,000 calls" in found.reason


def test_a_pool_of_two_is_never_too_large() -> None:
    assert advice(size=2, hold=0.00001).verdict == "about right"


def test_waits_in_a_pool_that_is_mostly_idle_are_bursts_and_no_size_is_named() -> None:
    found = advice(hold=0.0005, waited=0.2)
    assert found.verdict == "can't tell"
    assert found.suggested_size is None
    assert "bursts" in found.reason


def test_calls_that_got_no_connection_count_as_waited_and_as_load() -> None:
    found = advice(calls=1000, hold=0.075, refused=500)
    assert found.verdict == "too small"
    assert found.wait_share == pytest.approx(1 / 3)
    assert found.suggested_size is not None
    assert found.suggested_size > 1500 / 10 * 0.075
    assert "500 got none" in found.reason


def test_few_calls_say_nothing() -> None:
    found = advice(calls=99, hold=0.001)
    assert found.verdict == "can't tell"
    assert "99 calls" in found.reason


def test_connections_that_are_never_given_back_are_named() -> None:
    before = stats(NOTHING, in_use=8)
    found = pool_advice(before, dataclasses.replace(before, waiting=30), 10.0)
    assert found.verdict == "can't tell"
    assert "leak_after" in found.reason


def test_a_window_shorter_than_four_holds_says_nothing() -> None:
    found = advice(calls=200, size=200, hold=3.0)
    assert found.verdict == "can't tell"
    assert "12 s" in found.reason


@pytest.mark.parametrize("seconds", [0, -1.0, math.inf, math.nan, True])
def test_seconds_have_to_be_above_nought(seconds: float) -> None:
    with pytest.raises(PolicyError, match="seconds"):
        pool_advice(stats(NOTHING), stats(NOTHING), seconds)


def test_snapshots_in_the_wrong_order_or_of_two_pools_are_refused() -> None:
    later = Counters(acquires=5)
    with pytest.raises(PolicyError, match="older one first"):
        pool_advice(stats(later), stats(NOTHING), 1.0)
    with pytest.raises(PolicyError, match="one engine"):
        pool_advice(stats(NOTHING), stats(later, max_size=9), 1.0)


@pytest.mark.parametrize(
    ("load", "size", "waiting"),
    # Erlang C, from published tables: the probability of waiting with `size` servers and one fewer.
    [(1.0, 2, 0.3333), (2.0, 3, 0.4444), (5.0, 7, 0.3241), (10.0, 14, 0.1741)],
)
def test_the_formula_is_erlangs(load: float, size: int, waiting: float) -> None:
    assert _smallest(load, waiting + 1e-4, 100) == size
    assert _smallest(load, waiting - 1e-4, 100) == size + 1


windows = st.fixed_dictionaries(
    {
        "size": st.integers(1, 200),
        "calls": st.integers(0, 400),
        "hold": st.floats(0, 20),
        "waited": st.floats(0, 1),
        "wait": st.floats(0, 30),
        "refused": st.integers(0, 10_000),
    }
)


@given(windows)
def test_whatever_the_numbers_the_answer_fits_them(window: dict[str, float]) -> None:
    found = advice(**window)  # type: ignore[arg-type]
    size = int(window["size"])
    assert 0 <= found.utilisation <= 1
    assert 0 <= found.wait_share <= 1
    assert found.reason
    assert "\n" not in found.reason
    wanted = found.suggested_size
    match found.verdict:
        case "too small":
            assert wanted is not None
            assert size < wanted <= 4 * size
        case "too large":
            assert wanted is not None
            assert 1 <= wanted <= size / 2
        case "about right":
            assert wanted == size
        case "can't tell":
            assert wanted is None


@given(st.floats(0, 60), st.floats(0, 60), st.integers(1, 200))
def test_more_load_never_asks_for_fewer_connections(one: float, other: float, limit: int) -> None:
    low, high = sorted((one, other))
    assert _smallest(low, 0.05, limit) <= _smallest(high, 0.05, limit)
    assert 1 <= _smallest(low, 0.05, limit) <= limit


@given(st.floats(0.001, 0.0075), st.floats(0, 1), st.integers(2, 100))
def test_only_rates_and_shares_count_not_the_length_of_the_window(
    hold: float, waited: float, times: int
) -> None:
    after = Counters()
    for number in range(1000):
        after.acquired(0.01 if number < waited * 1000 else 1e-5)
    after.held_seconds = hold * 1000
    longer = dataclasses.replace(
        after,
        acquires=after.acquires * times,
        wait_seconds=after.wait_seconds * times,
        held_seconds=after.held_seconds * times,
        waits=[count * times for count in after.waits],
    )
    short = pool_advice(stats(NOTHING), stats(after), 1.0)
    long = pool_advice(stats(NOTHING), stats(longer), float(times))
    assert (short.verdict, short.suggested_size) == (long.verdict, long.suggested_size)
