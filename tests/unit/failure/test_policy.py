"""Retry policies and budgets: what is allowed, how long the waits are, and how many retries there can be."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbop_raw import PolicyError, RetryBudget, RetryPolicy
from dbop_raw.failure.policy import positive_seconds

ODD = [0, -1, -0.5, math.inf, -math.inf, math.nan]
NO_NUMBERS: list[Any] = ["1", None, True, False, [1], 1j]


@st.composite
def policies(draw: st.DrawFn) -> RetryPolicy:
    first = draw(st.floats(1e-6, 1e3))
    return RetryPolicy(
        attempts=draw(st.integers(1, 10**9)),
        first_delay=first,
        max_delay=draw(st.floats(first, 1e6)),
        factor=draw(st.floats(1.0, 1e6)),
    )


class TestRetryPolicy:
    @pytest.mark.parametrize("attempts", [0, -3, 1.5, True, "4", None])
    def test_attempts_is_a_whole_number_of_at_least_1(self, attempts: Any) -> None:
        with pytest.raises(PolicyError, match=r"attempts=.* whole number of at least 1") as raised:
            RetryPolicy(attempts=attempts)
        assert repr(attempts) in str(raised.value)
        assert isinstance(raised.value, ValueError)

    @pytest.mark.parametrize("option", ["first_delay", "max_delay"])
    @pytest.mark.parametrize("value", [*ODD, *NO_NUMBERS])
    def test_delays_are_finite_seconds_above_0(self, option: str, value: Any) -> None:
        with pytest.raises(PolicyError, match=f"{option}=") as raised:
            RetryPolicy(attempts=2, **{option: value})
        assert repr(value) in str(raised.value)

    def test_the_longest_delay_is_not_below_the_first(self) -> None:
        with pytest.raises(PolicyError, match=r"max_delay=0\.1 is below first_delay=0\.5"):
            RetryPolicy(attempts=2, first_delay=0.5, max_delay=0.1)

    @pytest.mark.parametrize("factor", [0.99, 0, -2, math.inf, math.nan])
    def test_the_factor_is_finite_and_at_least_1(self, factor: float) -> None:
        with pytest.raises(PolicyError, match=r"factor=.* at least 1"):
            RetryPolicy(attempts=2, factor=factor)

    @pytest.mark.parametrize("factor", NO_NUMBERS)
    def test_a_factor_that_is_no_number_is_refused_like_the_other_options(self, factor: Any) -> None:
        with pytest.raises(PolicyError, match="factor="):
            RetryPolicy(attempts=2, factor=factor)

    def test_a_policy_can_not_be_changed(self) -> None:
        policy = RetryPolicy(attempts=2)
        with pytest.raises(FrozenInstanceError):
            policy.attempts = 3  # type: ignore[misc]

    @given(policies(), st.integers(1, 10**12), st.floats(0.0, 1.0, exclude_max=True))
    def test_a_delay_is_between_0_and_the_longest(
        self, policy: RetryPolicy, started: int, luck: float
    ) -> None:
        delay = policy.delay(started, lambda: luck)
        assert 0 <= delay <= policy.longest_delay(started) <= policy.max_delay

    @given(policies(), st.integers(1, 5000))
    def test_the_longest_delay_never_shrinks_from_one_start_to_the_next(
        self, policy: RetryPolicy, started: int
    ) -> None:
        assert policy.longest_delay(started) <= policy.longest_delay(started + 1)

    @given(policies())
    def test_the_first_wait_is_bounded_by_the_first_delay(self, policy: RetryPolicy) -> None:
        assert policy.longest_delay(1) == policy.first_delay

    def test_delays_double_up_to_the_longest(self) -> None:
        policy = RetryPolicy(attempts=9, first_delay=0.5, max_delay=3.0)
        assert [policy.longest_delay(n) for n in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]
        assert [policy.delay(n, lambda: 0.5) for n in range(1, 4)] == [0.25, 0.5, 1.0]

    def test_a_delay_too_large_for_a_float_is_the_longest(self) -> None:
        policy = RetryPolicy(attempts=2, first_delay=1.0, max_delay=2.0, factor=1e6)
        assert policy.longest_delay(5000) == 2.0

    def test_waits_are_spread_over_the_whole_range(self) -> None:
        """Full jitter: callers that one event made fail together come back one by one."""
        policy = RetryPolicy(attempts=2, first_delay=1.0)
        delays = [policy.delay(1) for _ in range(500)]
        assert min(delays) < 0.1
        assert max(delays) > 0.9


class TestSeconds:
    @given(st.floats(min_value=0, exclude_min=True, allow_infinity=False) | st.integers(1, 10**6))
    def test_seconds_are_any_finite_number_above_0(self, value: float) -> None:
        seconds = positive_seconds("timeout", value)
        assert seconds == value
        assert type(seconds) is float

    @pytest.mark.parametrize("value", [*ODD, *NO_NUMBERS])
    def test_seconds_that_are_no_finite_number_above_0_are_refused_by_name(self, value: Any) -> None:
        with pytest.raises(PolicyError, match=r"^timeout="):
            positive_seconds("timeout", value)


class Clock:
    """Time that only moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# What may happen to a budget: a call, a retry of some cost, or some seconds that pass.
happenings = st.lists(
    st.just(("call", 0.0))
    | st.tuples(st.just("retry"), st.sampled_from([1.0, 2.0]))
    | st.tuples(st.just("pass"), st.floats(0.0, 1e4)),
    max_size=200,
)


class TestRetryBudget:
    @pytest.mark.parametrize("capacity", [*ODD, *NO_NUMBERS])
    def test_the_capacity_is_a_finite_number_above_0(self, capacity: Any) -> None:
        with pytest.raises(PolicyError, match="capacity="):
            RetryBudget(capacity=capacity)

    @pytest.mark.parametrize("option", ["per_call", "per_second"])
    @pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
    def test_income_is_finite_and_not_negative(self, option: str, value: Any) -> None:
        with pytest.raises(PolicyError, match=f"{option}=.* at least 0"):
            RetryBudget(capacity=1, **{option: value})

    @pytest.mark.parametrize("option", ["per_call", "per_second"])
    @pytest.mark.parametrize("value", NO_NUMBERS)
    def test_income_that_is_no_number_is_refused_like_the_other_options(
        self, option: str, value: Any
    ) -> None:
        with pytest.raises(PolicyError, match=f"{option}="):
            RetryBudget(capacity=1, **{option: value})

    @given(st.floats(0.5, 100), st.floats(0, 5), st.floats(0, 5), happenings)
    def test_a_budget_is_never_above_its_capacity_and_never_below_0(
        self, capacity: float, per_call: float, per_second: float, happened: list[tuple[str, float]]
    ) -> None:
        clock = Clock()
        budget = RetryBudget(capacity=capacity, per_call=per_call, per_second=per_second, clock=clock)
        for what, amount in happened:
            if what == "call":
                budget.deposit()
            elif what == "pass":
                clock.now += amount
            else:
                before = budget.refused
                allowed = budget.withdraw(amount)
                assert budget.refused == before + (not allowed)
            assert 0 <= budget.tokens <= capacity

    @given(st.floats(0.5, 100), st.floats(0, 2), happenings)
    def test_in_the_long_run_retries_are_a_share_of_the_calls(
        self, capacity: float, per_call: float, happened: list[tuple[str, float]]
    ) -> None:
        """However long an outage lasts: at most per_call for each call, and the capacity once."""
        budget = RetryBudget(capacity=capacity, per_call=per_call)
        calls, spent = 0, 0.0
        for what, amount in happened:
            if what == "call":
                budget.deposit()
                calls += 1
            elif what == "retry" and budget.withdraw(amount):
                spent += amount
        assert spent <= per_call * calls + capacity + 1e-6

    def test_a_budget_starts_full_and_then_refuses(self) -> None:
        budget = RetryBudget(capacity=2)
        assert [budget.withdraw() for _ in range(4)] == [True, True, False, False]
        assert budget.refused == 2

    def test_a_retry_that_is_refused_takes_nothing(self) -> None:
        budget = RetryBudget(capacity=1.5)
        assert not budget.withdraw(2.0)
        assert budget.tokens == 1.5

    def test_seconds_fill_a_budget_again(self) -> None:
        clock = Clock()
        budget = RetryBudget(capacity=3, per_call=0, per_second=0.5, clock=clock)
        assert budget.withdraw(3)
        clock.now += 1.9
        assert not budget.withdraw()
        clock.now += 0.2
        assert budget.withdraw()

    def test_time_before_a_budget_was_emptied_does_not_count(self) -> None:
        """It was full all the while: an hour of quiet is no credit."""
        clock = Clock()
        budget = RetryBudget(capacity=1, per_call=0, per_second=1, clock=clock)
        clock.now += 3600
        assert [budget.withdraw(), budget.withdraw()] == [True, False]
