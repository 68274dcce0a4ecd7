"""A connection that is held too long is reported where somebody sees it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import Engine, events
from tests.support.bodies import insert
from tests.support.observing import Seen
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


async def test_without_an_observer_a_leak_is_told_to_the_loops_exception_handler_and_as_a_warning(
    single: asyncpg.Pool,
) -> None:
    told: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: told.append(context))
    engine = Engine(single, leak_after=0.02)

    async def the_one_who_forgets() -> None:
        await engine.run(lambda _: until(lambda: told))

    try:
        with pytest.warns(ResourceWarning, match=r"held for more than 0\.02 s"):
            await the_one_who_forgets()
    finally:
        loop.set_exception_handler(before)
    (context,) = told
    assert "held for more than 0.02 s" in context["message"]
    assert "the_one_who_forgets" in context["message"]


async def test_a_leak_is_seen_by_who_runs_a_program_without_any_settings(dsn: str) -> None:
    """By default Python shows no ResourceWarning; an error log of asyncio's it does."""
    program = textwrap.dedent(
        """
        import asyncio, sys
        from dbop_raw import Engine

        async def the_one_who_forgets(engine):
            async with engine.transaction():
                await asyncio.sleep(0.3)

        async def main():
            async with Engine.open(sys.argv[1], min_size=0, max_size=1, leak_after=0.05) as engine:
                await the_one_who_forgets(engine)

        asyncio.run(main())
        """
    )
    done = await anyio.run_process([sys.executable, "-c", program, dsn], stderr=subprocess.PIPE, check=True)
    assert "the_one_who_forgets" in done.stderr.decode()


async def test_a_connection_held_too_long_is_reported_with_who_took_it(pool: asyncpg.Pool) -> None:
    seen = Seen()
    engine = Engine(pool, leak_after=0.02, observer=seen)

    async def the_one_who_forgets() -> None:
        await engine.run(lambda _: until(lambda: seen.of(events.LeakSuspected)))

    await the_one_who_forgets()
    (leak,) = seen.of(events.LeakSuspected)
    assert leak.held == 0.02
    assert "the_one_who_forgets" in leak.stack


async def test_without_an_observer_a_leak_is_a_warning(pool: asyncpg.Pool) -> None:
    engine = Engine(pool, leak_after=0.02)
    with pytest.warns(ResourceWarning, match=r"held for more than 0\.02 s.*taken here"):
        await engine.run(lambda _: anyio.sleep(0.1))


async def test_a_connection_given_back_in_time_is_not_reported(pool: asyncpg.Pool) -> None:
    seen = Seen()
    engine = Engine(pool, leak_after=0.05, observer=seen)
    await engine.run(insert)
    async with engine.transaction() as conn:
        await insert(conn, 2)
    await engine.execute("SELECT 1")
    await anyio.sleep(0.1)
    assert seen.of(events.LeakSuspected) == []
