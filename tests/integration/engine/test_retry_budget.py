"""The budget of retries that all calls of an engine share: it is spent, and it fills again."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from dbop_raw import Engine, RetriesExhausted, RetryBudget, RetryPolicy, operation, pipe, retry
from tests.support.bodies import insert
from tests.support.failures import raising
from tests.support.policies import QUICK

pytestmark = pytest.mark.anyio

TWICE = RetryPolicy(attempts=2, first_delay=0.001)


async def tries(engine: Engine, policy: RetryPolicy = TWICE, **options: Any) -> tuple[int, str]:
    """How often a run that always fails was started, and what ended it."""
    with pytest.raises(RetriesExhausted) as caught:
        await engine.run(raising("40001"), retry=policy, **options)
    return caught.value.attempts, caught.value.reason


async def test_each_call_gives_the_budget_its_share(single: asyncpg.Pool) -> None:
    budget = RetryBudget(capacity=2, per_call=0.5)
    engine = Engine(single, budget=budget)
    assert await tries(engine, RetryPolicy(attempts=9, first_delay=0.001)) == (3, "budget")
    assert await tries(engine) == (1, "budget")
    assert await tries(engine) == (2, "attempts")
    assert await tries(engine) == (1, "budget")
    for n in range(2):
        await engine.run(operation(insert)(n))
    assert await tries(engine) == (2, "attempts")
    assert budget.refused == 3


@pytest.mark.parametrize("options", [{}, {"autocommit": True}, {"readonly": True}, {"deadline": 5}], ids=str)
async def test_a_call_of_every_kind_gives_the_budget_its_share(
    options: dict[str, Any], single: asyncpg.Pool
) -> None:
    engine = Engine(single, budget=RetryBudget(capacity=1, per_call=1))
    for _ in range(3):
        assert await tries(engine, **options) == (2, "attempts")


async def test_a_budget_fills_with_the_seconds_that_pass(single: asyncpg.Pool) -> None:
    now = [100.0]
    engine = Engine(single, budget=RetryBudget(capacity=2, per_call=0, per_second=0.5, clock=lambda: now[0]))
    assert await tries(engine, RetryPolicy(attempts=9, first_delay=0.001)) == (3, "budget")
    now[0] += 1
    assert await tries(engine) == (1, "budget")
    now[0] += 1
    assert await tries(engine) == (2, "attempts")
    assert await tries(engine) == (1, "budget")


@pytest.mark.parametrize("by", ["calls", "seconds"])
async def test_a_budget_never_holds_more_than_its_capacity(by: str, single: asyncpg.Pool) -> None:
    now = [100.0]
    budget = RetryBudget(capacity=2, per_call=1 if by == "calls" else 0, per_second=1, clock=lambda: now[0])
    engine = Engine(single, budget=budget)
    if by == "calls":
        for _ in range(10):
            await engine.run(lambda conn: conn.fetchval("SELECT 1"))
    else:
        now[0] += 3600
    assert await tries(engine, RetryPolicy(attempts=9, first_delay=0.001)) == (3, "budget")


async def test_a_retry_from_a_savepoint_finds_the_budget_filled_again(single: asyncpg.Pool) -> None:
    engine = Engine(single, budget=RetryBudget(capacity=1, per_call=1))
    for _ in range(3):
        with pytest.raises(RetriesExhausted) as caught:
            await engine.run(pipe(raising("55P03"), retry(QUICK)))
        assert (caught.value.attempts, caught.value.reason) == (2, "budget")
