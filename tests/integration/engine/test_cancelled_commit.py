"""A caller is cancelled while its COMMIT is on its way: it waits for the answer, in bounded time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import anyio
import pytest

from dbop_raw import Engine
from dbop_raw.session.settings import Bounds
from dbop_raw.testing import Fault, FaultProxy, Injected, query
from dbop_raw.testing.server import run_sql
from tests.support.bodies import add
from tests.support.pools import engine_on
from tests.support.protocol import answer_to_commit
from tests.support.settings import with_bounds

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]


@pytest.fixture
async def behind(proxy: FaultProxy, dsn: str) -> AsyncIterator[Engine]:
    """An engine behind the proxy, with one connection."""
    async with engine_on(proxy.dsn(dsn), min_size=1, max_size=1) as engine:
        yield engine


async def cancel_at(fault: Injected, engine: Engine, how: str) -> float:
    """Run an operation, cancel it when the fault happens, and return when that was (the loop's clock)."""
    loop = asyncio.get_running_loop()
    if how == "task":
        task = asyncio.ensure_future(engine.run(add(1)))
        await fault.wait()
        cancelled_at = loop.time()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(engine.run, add(1))
            await fault.wait()
            cancelled_at = loop.time()
            group.cancel_scope.cancel()
    return cancelled_at


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_a_cancelled_caller_waits_for_the_answer_to_its_commit(
    how: str, behind: Engine, proxy: FaultProxy, dsn: str
) -> None:
    late = proxy.inject(Fault("delay", when=answer_to_commit, seconds=0.3))
    cancelled_at = await cancel_at(late, behind, how)
    assert asyncio.get_running_loop().time() - cancelled_at >= 0.2
    assert run_sql(dsn, "SELECT count(*) FROM t") == 1
    stats = behind.stats()
    assert (stats.in_use, stats.evicted, stats.commits_in_doubt) == (0, 0, 0)


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_a_cancelled_caller_gives_up_on_a_commit_that_hangs_and_evicts_its_connection(
    how: str, behind: Engine, proxy: FaultProxy
) -> None:
    with_bounds(behind, commit=0.2)
    hung = proxy.inject(Fault("hang", when=query("COMMIT")))
    with anyio.fail_after(5):
        await cancel_at(hung, behind, how)
    stats = behind.stats()
    assert (stats.in_use, stats.size, stats.evicted) == (0, 0, 1)
    proxy.heal()
    assert await behind.run(lambda conn: conn.fetchval("SELECT 7")) == 7


def test_the_bound_for_a_commit_that_hangs_is_seconds() -> None:
    assert 0 < Bounds().commit <= 10


@pytest.mark.slow
async def test_a_cancelled_caller_of_a_dead_server_gives_up_in_bounded_time(
    behind: Engine, proxy: FaultProxy
) -> None:
    hung = proxy.inject(Fault("hang", when=query("INSERT")))
    with anyio.fail_after(5):
        await cancel_at(hung, behind, "task")
    assert (behind.stats().in_use, behind.stats().size) == (0, 0)
    # Else the engine's end would wait for what hangs.
    proxy.heal()
