"""What an observer is told of an engine's work, and that nothing told or raised holds a secret."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import fields
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    AcquireTimeout,
    Engine,
    EngineOverloaded,
    Event,
    Repair,
    RetriesExhausted,
    Rule,
    batch,
    each,
    events,
    operation,
    pipe,
    retry,
    timeout,
)
from dbop_raw.testing import FaultProxy, Server
from tests.support.bodies import add, insert, rows, sleep
from tests.support.dsn import PASSWORD, with_password
from tests.support.failures import raising
from tests.support.observing import Seen
from tests.support.policies import QUICK
from tests.support.pools import Holding
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


async def test_a_run_tells_of_connection_and_commit(single: asyncpg.Pool) -> None:
    seen = Seen()
    await Engine(single, observer=seen).run(add(1))
    acquired, committed = seen.events
    assert isinstance(acquired, events.Acquired)
    assert acquired.waited >= 0
    assert isinstance(committed, events.Committed)
    assert (committed.operation, committed.attempts) == ("insert", 1)
    assert committed.seconds > 0


async def test_a_failure_tells_of_the_rollback(single: asyncpg.Pool) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen)
    await engine.run(insert)
    seen.events.clear()
    with pytest.raises(asyncpg.UniqueViolationError):
        await engine.run(insert)
    (rolled_back,) = seen.of(events.RolledBack)
    assert (rolled_back.operation, rolled_back.sqlstate, rolled_back.condition) == (
        "insert", "23505", "unique_violation",
    )  # fmt: skip
    assert seen.of(events.Committed) == []


async def test_a_retry_tells_of_each_new_start_and_of_giving_up(single: asyncpg.Pool) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen)
    with pytest.raises(RetriesExhausted):
        await engine.run(raising("40001"), retry=QUICK)
    assert [(e.level, e.attempts, e.sqlstate, e.condition) for e in seen.of(events.Retried)] == [
        ("transaction", 1, "40001", "serialization_failure"),
        ("transaction", 2, "40001", "serialization_failure"),
    ]
    assert all(0 <= e.delay <= 0.01 for e in seen.of(events.Retried))
    (refused,) = seen.of(events.RetryRefused)
    assert (refused.reason, refused.attempts, refused.sqlstate) == ("attempts", 3, "40001")
    assert len(seen.of(events.RolledBack)) == 3


async def test_waiting_in_vain_and_being_shed_are_told(single: asyncpg.Pool) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen, acquire_timeout=0.05, max_waiting=1)
    async with Holding(single, 1), anyio.create_task_group() as group:

        async def waits() -> None:
            with pytest.raises(AcquireTimeout):
                await engine.run(insert)

        group.start_soon(waits)
        await until(lambda: engine.stats().waiting == 1)
        with pytest.raises(EngineOverloaded):
            await engine.run(insert)
    (shed,) = seen.of(events.Shed)
    assert shed.waiting == 1
    (timed_out,) = seen.of(events.AcquireTimedOut)
    assert timed_out.waited >= 0.04
    assert timed_out.waiting == 0


async def test_an_eviction_is_told_with_its_cause(single: asyncpg.Pool) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen, verdicts={"XT003": Rule(Repair.CONNECTION, evict=True)})
    with pytest.raises(asyncpg.PostgresError):
        await engine.run(raising("XT003"))
    (evicted,) = seen.of(events.Evicted)
    assert evicted.sqlstate == "XT003"


async def test_a_batch_tells_of_its_items(single: asyncpg.Pool) -> None:
    seen = Seen()
    await Engine(single, observer=seen).run(batch(each(add))([1, 1, 2]))
    (failed,) = seen.of(events.ItemFailed)
    assert (failed.index, failed.sqlstate, failed.condition) == (1, "23505", "unique_violation")
    (finished,) = seen.of(events.BatchFinished)
    assert (finished.total, finished.written, finished.failed) == (3, 2, 1)


async def test_an_observer_that_fails_does_not_break_the_work(single: asyncpg.Pool) -> None:
    told: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: told.append(context))
    try:

        def breaks(event: Event) -> None:
            raise LookupError(event.name)

        assert await Engine(single, observer=breaks).run(insert) == 1
    finally:
        loop.set_exception_handler(before)
    assert await rows(single) == [1]
    assert [str(context["exception"]) for context in told] == ["pool.acquired", "transaction.committed"]


async def test_no_event_holds_sql_a_parameter_or_a_dsn(dsn: str, postgres_server: Server) -> None:
    seen = Seen()
    secret = "a-value-that-is-secret"
    async with FaultProxy(postgres_server.host, postgres_server.port) as proxy:
        options: dict[str, Any] = {"min_size": 0, "max_size": 2, "leak_after": 0.05, "acquire_timeout": 0.2}
        async with Engine.open(proxy.dsn(with_password(dsn)), observer=seen, **options) as engine:

            async def op(conn: Any, value: str) -> None:
                await conn.execute("CREATE TEMP TABLE IF NOT EXISTS s (a text PRIMARY KEY)")
                await conn.execute("INSERT INTO s VALUES ($1), ($1)", value)

            with pytest.raises(asyncpg.UniqueViolationError):
                await engine.run(pipe(operation(op)(secret), timeout(5), retry(QUICK)))
            with pytest.raises(RetriesExhausted):
                await engine.run(raising("40001"), retry=QUICK)
            await engine.run(lambda _: anyio.sleep(0.1))
            proxy.drop_all()
            await engine.run(batch(each(operation(op)))([secret]), retry=QUICK)
    assert len({type(event) for event in seen.events}) >= 6
    for event in seen.events:
        told = " ".join(str(getattr(event, field.name)) for field in fields(event) if field.name != "stack")
        for hidden in (secret, PASSWORD, "INSERT", "CREATE", "postgresql://", str(proxy.port)):
            assert hidden not in told, event


async def test_no_repr_shows_a_dsn(dsn: str) -> None:
    async with Engine.open(with_password(dsn), min_size=1, max_size=2) as engine:
        text = repr(engine)
        assert "size=1/2" in text
        assert repr(engine.stats()).count(PASSWORD) == 0
        assert PASSWORD not in text
        assert "postgresql" not in text


async def test_no_error_holds_the_password(dsn: str, postgres_server: Server) -> None:
    errors: list[BaseException] = []

    async def fails(work: Awaitable[Any]) -> None:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is
            await work
        error: BaseException | None = caught.value
        while error is not None:
            errors.append(error)
            error = error.__cause__ or error.__context__

    secret = with_password(dsn)
    async with FaultProxy(postgres_server.host, postgres_server.port) as proxy:
        async with Engine.open(proxy.dsn(secret), min_size=0, max_size=1, acquire_timeout=0.1) as engine:
            await fails(engine.run(raising("40001"), retry=QUICK))
            await fails(engine.run(sleep, deadline=0.05))
            proxy.server_port = 1
            proxy.drop_all()
            await fails(engine.run(insert, retry=QUICK))
        await fails(asyncpg.create_pool(proxy.dsn(secret), min_size=1))
    assert len(errors) >= 5
    for error in errors:
        assert PASSWORD not in f"{error!s} {error!r}"
