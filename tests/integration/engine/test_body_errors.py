"""An error of the body's own (a file, another service) is no failure of the connection beside it.

It is permanent: raised unchanged after one start, nothing is thrown away, and in a batch it costs its item.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    Engine,
    JsonlRejects,
    RetriesExhausted,
    RetryPolicy,
    batch,
    each,
    events,
    execute_many,
    ingest,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from tests.support.bodies import insert, rows
from tests.support.observing import Seen
from tests.support.policies import QUICK
from tests.support.sessions import backend

pytestmark = pytest.mark.anyio

Make = Callable[[], Exception]

OWN: list[Make] = [
    lambda: OSError(errno.ENOSPC, "No space left on device", "rejects.jsonl"),
    lambda: FileNotFoundError(errno.ENOENT, "No such file or directory", "prices.csv"),
    lambda: TimeoutError("the price service did not answer"),
    lambda: EOFError("the upload was cut short"),
    lambda: ConnectionError("the price service"),
    lambda: ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    lambda: ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    lambda: BrokenPipeError(errno.EPIPE, "Broken pipe"),
    lambda: socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
]
OWN_ERRORS = pytest.mark.parametrize("make", OWN, ids=lambda make: type(make()).__name__)


class Body:
    """Insert, then fail with an error that is no error of the database."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.starts = 0

    async def __call__(self, conn: Any) -> None:
        self.starts += 1
        await insert(conn, self.starts)
        raise self.error


WRAPPED: dict[str, Callable[[Body], Any]] = {
    "plain": lambda body: body,
    "retry": lambda body: pipe(body, retry(QUICK)),
    "timeout and retry": lambda body: pipe(body, timeout(5), retry(QUICK), timeout(10)),
    "savepoint": lambda body: pipe(body, savepoint, retry(QUICK)),
}


@OWN_ERRORS
@pytest.mark.parametrize("wrapped", WRAPPED)
async def test_an_error_of_the_bodys_own_is_raised_unchanged_after_one_start(
    wrapped: str, make: Make, single: asyncpg.Pool
) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen)
    pid = await engine.run(backend)
    body = Body(make())
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one, is asserted
        await engine.run(WRAPPED[wrapped](body), retry=QUICK)
    assert caught.value is body.error
    assert body.starts == 1
    assert (engine.stats().evicted, engine.stats().retries) == (0, 0)
    assert seen.of(events.Evicted) == seen.of(events.Retried) == []
    assert await engine.run(backend) == pid
    assert await rows(single) == []


@OWN_ERRORS
async def test_an_error_of_an_autocommitted_bodys_own_is_not_in_doubt(
    make: Make, single: asyncpg.Pool
) -> None:
    engine = Engine(single)
    pid = await engine.run(backend)
    body = Body(make())
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one, is asserted
        await engine.run(pipe(body, retry(QUICK)), autocommit=True, retry=QUICK)
    assert caught.value is body.error
    assert body.starts == 1
    assert (engine.stats().evicted, engine.stats().commits_in_doubt) == (0, 0)
    assert await engine.run(backend) == pid
    assert await rows(single) == [1]


@OWN_ERRORS
async def test_an_error_of_a_transactions_block_costs_no_connection(make: Make, single: asyncpg.Pool) -> None:
    engine = Engine(single)
    pid = await engine.run(backend)
    body = Body(make())
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one, is asserted
        async with engine.transaction() as conn:
            await body(conn)
    assert caught.value is body.error
    assert engine.stats().evicted == 0
    assert await engine.run(backend) == pid
    assert await rows(single) == []


@OWN_ERRORS
async def test_an_error_of_an_items_own_costs_that_item_alone(make: Make, single: asyncpg.Pool) -> None:
    engine = Engine(single)
    pid = await engine.run(backend)
    error = make()

    @operation
    async def write(conn: Any, n: int) -> int:
        await insert(conn, n)
        if n == 3:
            raise error
        return n

    result = await engine.run(batch(each(write), retry=QUICK)([1, 2, 3, 4, 5]))
    (failed,) = result.failed
    assert (failed.index, failed.item) == (2, 3)
    assert failed.error is error
    assert (failed.verdict.transient, failed.verdict.evict) == (False, False)
    assert (result.written, result.retries) == (4, 0)
    assert result.results == (1, 2, None, 4, 5)
    assert await rows(single) == [1, 2, 4, 5]
    assert engine.stats().evicted == 0
    assert await engine.run(backend) == pid


async def test_a_timeout_of_anyios_in_a_body_is_the_bodys_own(single: asyncpg.Pool) -> None:
    """Its statement is not what ran out: the body waited for something else."""

    async def waits_for_a_service(conn: Any) -> None:
        starts.append(await backend(conn))
        with anyio.fail_after(0.01):
            await anyio.sleep(30)

    starts: list[int] = []
    engine = Engine(single)
    with pytest.raises(TimeoutError):
        await engine.run(pipe(waits_for_a_service, retry(QUICK)), retry=QUICK)
    assert len(starts) == 1
    assert engine.stats().evicted == 0
    assert await engine.run(backend) == starts[0]


async def test_an_error_of_the_same_kind_on_a_connection_that_is_gone_is_repaired(
    single: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    """Then it may well be the connection's, whoever raised it: the run has a new one."""

    async def loses_its_connection_first(conn: Any) -> int:
        pids.append(await backend(conn))
        if len(pids) == 1:
            await other.fetchval("SELECT pg_terminate_backend($1, 5000)", pids[0])
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
                await insert(conn)
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        return await insert(conn)

    pids: list[int] = []
    engine = Engine(single)
    assert await engine.run(loses_its_connection_first, retry=QUICK) == 1
    assert len(set(pids)) == 2
    assert engine.stats().evicted == 1
    assert await rows(single) == [1]


async def test_a_server_that_can_not_be_reached_is_still_tried_again(dsn: str) -> None:
    """A bare OSError of *connecting* is no body's: nothing was sent."""
    refused: list[int] = []

    async def connect(*args: Any, **kwargs: Any) -> asyncpg.Connection:
        if len(refused) < 2:
            refused.append(1)
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        return await asyncpg.connect(*args, **kwargs)

    async with asyncpg.create_pool(dsn, min_size=0, max_size=1, connect=connect) as pool:
        engine = Engine(pool)
        with pytest.raises(RetriesExhausted) as caught:
            await engine.run(backend, retry=RetryPolicy(attempts=1, first_delay=0.001))
        assert isinstance(caught.value.__cause__, ConnectionRefusedError)
        assert await engine.run(backend, retry=QUICK) > 0
    assert len(refused) == 2


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="/dev/full is a device of Linux")
async def test_a_disk_that_is_full_for_rejects_is_told_by_the_files_name(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    pid = await engine.run(backend)
    write = batch(execute_many("INSERT INTO t VALUES ($1)"))
    with pytest.raises(OSError, match="No space left on device") as caught:
        await ingest(
            engine, [(1,), (None,), (2,)], write, size=10, workers=1, rejects=JsonlRejects(FULL), retry=QUICK
        )
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(FULL)
    assert str(FULL) in str(caught.value)
    assert await engine.run(backend) == pid
    assert engine.stats().evicted == 0
