"""Calls that must type-check: mypy infers the result through every pipeline. Never run."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any, Literal, assert_type

import asyncpg

from dbop_raw import (
    Batch,
    BatchResult,
    Engine,
    Event,
    Failed,
    GroupFailed,
    IngestReport,
    JsonlRejects,
    Ledger,
    Operation,
    Phase,
    Reject,
    Repair,
    RetryBudget,
    RetryPolicy,
    Rule,
    Verdict,
    batch,
    chain,
    classify,
    copy_into,
    copy_text,
    each,
    execute_many,
    ingest,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)

POLICY = RetryPolicy(attempts=4, first_delay=0.05, max_delay=1.0)


class Order:
    body: str


@operation
async def add_event(conn: asyncpg.Connection[Any], event: Order, *, source: str = "web") -> int:
    found: int = await conn.fetchval("INSERT …", event.body, source)
    return found


@operation
async def no_arguments(conn: Any) -> list[str]:
    return [str(conn)]


async def plain(conn: Any) -> bytes:
    return bytes(conn)


class Repository:
    async def load(self, conn: Any) -> float:
        return float(bool(conn))

    async def load_one(self, number: int, conn: Any) -> complex:
        return complex(number, bool(conn))


def operations(event: Order) -> None:
    assert_type(add_event(event), Operation[int])
    assert_type(add_event(event, source="cli"), Operation[int])
    assert_type(no_arguments(), Operation[list[str]])
    assert_type(pipe(add_event(event)), Operation[int])
    assert_type(pipe(add_event(event), timeout(1.5)), Operation[int])
    assert_type(pipe(add_event(event), timeout(1.5, lock=0.5), retry(POLICY), savepoint), Operation[int])
    assert_type(pipe(plain, retry(POLICY)), Operation[bytes])
    assert_type(pipe(Repository().load, savepoint), Operation[float])
    assert_type(savepoint(plain), Operation[bytes])
    assert_type(retry(POLICY)(timeout(1.5)(no_arguments())), Operation[list[str]])
    standard = chain(timeout(1.5), retry(POLICY), savepoint)
    assert_type(pipe(add_event(event), standard, timeout(5)), Operation[int])
    assert_type(standard(plain), Operation[bytes])
    assert_type(pipe(plain, chain(standard, savepoint)), Operation[bytes])


async def runs(engine: Engine, event: Order) -> None:
    assert_type(await engine.run(add_event(event)), int)
    assert_type(await engine.run(pipe(add_event(event), timeout(1.5), retry(POLICY))), int)
    assert_type(await engine.run(plain, retry=POLICY, isolation="serializable", readonly=True), bytes)
    assert_type(await engine.run(Repository().load), float)
    assert_type(await engine.run(functools.partial(Repository().load_one, 3)), complex)
    assert_type(await engine.run(lambda conn: Repository().load(conn), autocommit=True), float)
    await engine.run(plain, deadline=2, deferrable=False, resolve_commit=True)
    async with engine.transaction(isolation="repeatable read", deadline=3.5) as conn:
        assert_type(await add_event(event)(conn), int)
        assert_type(await savepoint(plain)(conn), bytes)
    await engine.fetch("SELECT 1", 2, timeout=3)


async def engines(pool: asyncpg.Pool[Any]) -> None:
    def observe(event: Event) -> None:
        assert_type(event.name, str)

    Engine(pool, acquire_timeout=0.5, max_waiting=10, budget=RetryBudget(capacity=10), observer=observe)
    async with Engine.open("postgresql://…", max_size=4, acquire_timeout=1) as engine:
        assert_type(engine, Engine)
        assert_type(engine.stats().waiting, int)


Row = tuple[int, str]


async def batches(engine: Engine, events: list[Order], rows: list[Row]) -> None:
    write = batch(each(add_event), retry=POLICY)
    assert_type(write, Batch[Order, int])
    assert_type(write(events), Operation[BatchResult[Order, int]])
    result = await engine.run(write(events))
    assert_type(result, BatchResult[Order, int])
    assert_type(result.results, tuple[int | None, ...])
    assert_type(result.failed, tuple[Failed[Order], ...])
    assert_type(result.failed[0].item, Order)
    assert_type(result.failed[0].verdict, Verdict)
    assert_type(await engine.run(pipe(write(events), timeout(5), retry(POLICY))), BatchResult[Order, int])
    await engine.run(batch(execute_many("INSERT …"), skip_limit=10)(rows))
    await engine.run(batch(copy_into("t", columns=("id", "body"), schema="s"))(rows))
    await engine.run(batch(copy_text("t", columns=["id", "body"]))([("1", None), ("2", "x")]))


class Sink:
    async def write(self, rejects: Any) -> None:
        for reject in rejects:
            assert_type(reject, Any)


async def ingests(engine: Engine, rows: list[Row], stream: AsyncIterator[Row]) -> None:
    write = batch(copy_into("t", columns=("id", "body")))
    assert_type(await ingest(engine, rows, write), IngestReport)
    await ingest(engine, stream, write, linger=0.5, size=10, workers=2, retry=POLICY, skip_limit=3)
    await ingest(engine, iter(rows), write, rejects=JsonlRejects("rejects.jsonl"), ledger=Ledger("x"))
    await ingest(engine, rows, write, rejects=Sink(), progress=print)
    events: Iterator[Order] = iter(())
    await ingest(engine, events, batch(each(add_event)), order_by=lambda event: event.body)


def verdicts(error: Exception, awaitable: Awaitable[int]) -> None:
    assert_type(classify(error), Verdict)
    assert_type(classify(error).transient, bool)
    assert_type(
        classify(error, closed=False, phase=Phase.BODY).blame, Literal["item", "caller", "load", "server"]
    )
    Rule(Repair.NEVER, item=True, reason="ours", blame="caller")
    assert_type(GroupFailed(index=1).index, int)
    Reject(index=1, item=awaitable, sqlstate=None, condition="TypeError", message="…")
