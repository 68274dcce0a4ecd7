"""Calls that must not type-check: each line marked `# E:` and no other. Never run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from dbop_raw import (
    Engine,
    JsonlRejects,
    Operation,
    Repair,
    RetryPolicy,
    Rule,
    batch,
    chain,
    classify,
    copy_into,
    copy_text,
    each,
    ingest,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)

POLICY = RetryPolicy(attempts=4)


@operation
async def add(conn: Any, number: int, *, note: str = "") -> int:
    return int(conn) + number + len(note)


async def plain(conn: Any) -> bytes:
    return bytes(conn)


async def two_arguments(conn: Any, other: int) -> int:
    return int(conn) + other


def not_async(conn: Any) -> int:
    return int(conn)


@operation  # E: an operation is given its connection
async def without_connection() -> int:
    return 1


@operation  # E: and returns an awaitable
def without_await(conn: Any) -> int:
    return int(conn)


def takes_text(text: str) -> None:
    """Takes a str."""


def takes_operation(op: Operation[str]) -> None:
    """Takes an operation that gives a str."""


def operations() -> None:
    add()  # E: an argument is missing
    add("1")  # E: of the wrong type
    add(1, 2)  # E: one too many
    add(1, note=2)  # E: of the wrong type, by name
    takes_operation(add(1))  # E: the result is an int
    takes_operation(pipe(add(1), timeout(1), retry(POLICY)))  # E: still an int
    takes_operation(pipe(add(1), chain(timeout(1), savepoint)))  # E: and through a chain
    pipe(two_arguments, savepoint)  # E: called with a connection only
    pipe(not_async, savepoint)  # E: not awaitable
    pipe(plain(None), savepoint)  # E: a coroutine that runs already
    pipe(add(1), POLICY)  # E: not a wrapper
    pipe(add(1), 5)  # E: not a wrapper
    pipe(add(1), retry)  # E: a wrapper's maker
    chain(timeout(1), 3)  # E: not a wrapper
    retry(3)  # E: not a policy
    retry(POLICY, attempts=3)  # E: options are the policy's
    timeout("1")  # E: seconds are a number
    timeout(1, 0.5)  # E: options are keyword-only
    RetryPolicy(4)  # E: options are keyword-only
    Rule(Repair.NEVER, blame="user")  # E: one of four words
    classify(ValueError(), phase="body")  # E: a Phase
    RetryPolicy(attempts="4")  # E: a whole number
    POLICY.attempts = 3  # E: frozen


async def runs(engine: Engine, pool: Any) -> None:
    takes_text(await engine.run(add(1)))  # E: the result is an int
    takes_text(await engine.run(pipe(plain, timeout(1), retry(POLICY))))  # E: the result is bytes
    await engine.run(add(1), POLICY)  # E: options are keyword-only
    await engine.run(add(1), retry=3)  # E: not a policy
    await engine.run(add(1), isolation="snapshot")  # E: no such level
    await engine.run(add)  # E: its argument is missing
    await engine.run(plain(None))  # E: a coroutine that runs already
    Engine(pool, 5.0)  # E: options are keyword-only


async def batches(engine: Engine) -> None:
    write = batch(each(add))
    write(["1"])  # E: items are numbers
    write(iter([1]))  # E: an iterator is no sequence
    result = await engine.run(write([1, 2]))
    takes_text(result.results[0])  # E: an int, or None
    takes_text(result.failed[0].item)  # E: an int
    batch(add)  # E: not a writer
    batch(each(add), POLICY)  # E: options are keyword-only
    batch(each(not_async))  # E: makes no operation
    batch(copy_into("t", columns=("a",)))([1, 2])  # E: a row is a sequence
    batch(copy_text("t", columns=("a",)))([(1,)])  # E: texts only
    copy_into("t", ("a",))  # E: options are keyword-only
    copy_into("t", columns=(1,))  # E: names are texts


async def ingests(engine: Engine, numbers: list[int], texts: AsyncIterator[str]) -> None:
    write = batch(each(add))
    await ingest(engine, texts, write)  # E: items are numbers
    await ingest(engine, numbers, each(add))  # E: not a batch
    await ingest(engine, numbers, write, size="10")  # E: a whole number
    await ingest(engine, numbers, write, order_by=lambda number: number.nothing)  # E: an item has no such
    await ingest(engine, numbers, write, rejects="rejects.jsonl")  # E: not a sink
    await ingest(engine, numbers, write, 10)  # E: options are keyword-only
    await ingest(engine, numbers, write, ledger="name")  # E: not a ledger
    await ingest(engine, numbers, write, progress=lambda: None)  # E: called with a report
    takes_text(await ingest(engine, numbers, write, rejects=JsonlRejects("x")))  # E: a report
