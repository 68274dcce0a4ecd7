"""A connection by script: it answers as told, follows its transaction, and says what it did not expect."""

from __future__ import annotations

import asyncio
import math
import re

import asyncpg
import pytest

from dbop_raw.testing import ScriptedConnection, ScriptedPool, Step

pytestmark = pytest.mark.anyio


class TestConnection:
    async def test_steps_are_used_in_order_by_every_call(self) -> None:
        connection = ScriptedConnection([
            Step("INSERT", "INSERT 0 1"), Step("SELECT", [1, 2]), Step("SELECT", {"a": 1}),
            Step("SELECT", 42),
            Step("INSERT"), Step('COPY "s"."t" ("a", "b")'), Step('COPY "t"'), Step("prepared", "statement"),
        ])  # fmt: skip
        assert await connection.execute("INSERT INTO t VALUES ($1)", 1) == "INSERT 0 1"
        assert await connection.fetch("SELECT 1") == [1, 2]
        assert await connection.fetchrow("SELECT 1") == {"a": 1}
        assert await connection.fetchval("SELECT $1", 1, column=0) == 42
        assert await connection.executemany("INSERT INTO t VALUES ($1)", [(1,)]) is None
        copied = await connection.copy_records_to_table("t", records=[], columns=["a", "b"], schema_name="s")
        assert copied == await connection.copy_to_table("t", source=None) == "COPY"
        assert await connection.prepare("prepared") == "statement"
        connection.assert_finished()
        assert len(connection.sent) == 8

    async def test_a_call_that_was_not_expected_is_told_with_what_was(self) -> None:
        connection = ScriptedConnection([Step("COMMIT"), Step(re.compile("^ROLLBACK$"))])
        with pytest.raises(AssertionError, match="expected 'COMMIT', got 'SELECT 1'"):
            await connection.fetch("SELECT 1")
        with pytest.raises(AssertionError, match="got 'ROLLBACK TO s'"):
            await connection.execute("ROLLBACK TO s")
        with pytest.raises(AssertionError, match="nothing more was expected, but got 'SELECT 2'"):
            await connection.fetch("SELECT 2")

    async def test_a_script_that_was_not_played_to_its_end_is_told(self) -> None:
        with pytest.raises(AssertionError, match=r"1 steps were never reached.*COMMIT"):
            ScriptedConnection([Step("COMMIT")]).assert_finished()

    async def test_an_error_is_raised_and_the_connection_may_close(self) -> None:
        lost = asyncpg.ConnectionDoesNotExistError("gone")
        connection = ScriptedConnection(
            [Step(None, error=ValueError("no")), Step(None, error=lost, closes=True)]
        )
        with pytest.raises(ValueError, match="no"):
            await connection.execute("SELECT 1")
        assert not connection.is_closed()
        with pytest.raises(asyncpg.ConnectionDoesNotExistError):
            await connection.execute("SELECT 1")
        assert connection.is_closed()
        with pytest.raises(asyncpg.InterfaceError, match="connection is closed"):
            await connection.execute("SELECT 1")

    @pytest.mark.parametrize(
        ("sql", "error", "before", "after"),
        [
            ("BEGIN", False, False, True),
            ("begin ISOLATION LEVEL SERIALIZABLE; SET LOCAL x = 1", False, False, True),
            ("START TRANSACTION", False, False, True),
            ("BEGIN", True, False, False),
            ("BEGIN; SET LOCAL x = 1", True, False, True),
            ("SELECT 'BEGIN'", False, False, False),
            ("COMMIT", False, True, False),
            ("COMMIT", True, True, False),
            ("END", False, True, False),
            ("ROLLBACK", False, True, False),
            ("ABORT", False, True, False),
            ("ROLLBACK TO SAVEPOINT s", False, True, True),
            ("rollback work to s; SET LOCAL x = 1", False, True, True),
            ("ROLLBACK WORK", False, True, False),
            ("SAVEPOINT s", True, True, True),
            ("COMMIT; BEGIN", False, True, True),
        ],
    )
    async def test_a_scripted_connection_follows_its_transaction(
        self, sql: str, error: bool, before: bool, after: bool
    ) -> None:
        steps = [Step("BEGIN")] if before else []
        connection = ScriptedConnection([*steps, Step(None, error=ValueError() if error else None)])
        if before:
            await connection.execute("BEGIN")
        assert connection.is_in_transaction() is before
        try:
            await connection.execute(sql)
        except ValueError:
            assert error
        assert connection.is_in_transaction() is after

    async def test_execute_gives_the_last_statements_tag(self) -> None:
        connection = ScriptedConnection([Step(None), Step(None), Step(None, "ROLLBACK")])
        assert await connection.execute("COMMIT") == "COMMIT"
        assert await connection.execute("RELEASE SAVEPOINT s; savepoint s") == "SAVEPOINT"
        assert await connection.execute("COMMIT") == "ROLLBACK"

    async def test_an_answer_may_never_come(self) -> None:
        connection = ScriptedConnection([Step(None, delay=math.inf), Step(None, delay=math.inf)])
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT 1", timeout=0.001)
        call = asyncio.ensure_future(connection.execute("SELECT 1"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not call.done()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    async def test_terminate_closes(self) -> None:
        connection = ScriptedConnection([Step("BEGIN")])
        await connection.execute("BEGIN")
        connection.terminate()
        assert (connection.terminated, connection.is_closed(), connection.is_in_transaction()) == (
            True,
            True,
            False,
        )

    async def test_settings_are_attributes(self) -> None:
        connection = ScriptedConnection(settings={"application_name": "x:1"})
        connection.settings["application_name"] = "x:2"
        assert connection.get_settings().application_name == "x:2"


class TestPool:
    async def test_connections_come_in_order_and_a_released_one_comes_next(self) -> None:
        one, two = ScriptedConnection(), ScriptedConnection()
        pool = ScriptedPool([one, two])
        first, second = await pool.acquire(), await pool.acquire(timeout=1)
        assert (first, second) == (one, two)
        await pool.release(two)
        async with pool.acquire() as again:
            assert again is two
            assert (pool.get_size(), pool.get_idle_size(), pool.get_max_size()) == (2, 0, 2)
        assert (pool.acquired, pool.released, pool.terminated) == (3, 2, 0)

    async def test_a_closed_connection_is_not_handed_out_again(self) -> None:
        one, two = ScriptedConnection(), ScriptedConnection()
        pool = ScriptedPool([one, two], max_size=1)
        async with pool.acquire() as connection:
            connection.terminate()
        assert await pool.acquire() is two
        assert (pool.terminated, pool.get_size()) == (1, 1)

    async def test_an_acquire_waits_for_a_release(self) -> None:
        pool = ScriptedPool([ScriptedConnection()])
        held = await pool.acquire()
        with pytest.raises(TimeoutError):
            await pool.acquire(timeout=0.001)
        waiting = asyncio.ensure_future(_take(pool))
        await asyncio.sleep(0)
        await pool.release(held)
        assert await asyncio.wait_for(waiting, 5) is held

    async def test_an_acquire_may_fail(self) -> None:
        connection = ScriptedConnection()
        pool = ScriptedPool([OSError("refused"), connection])
        with pytest.raises(OSError, match="refused"):
            await pool.acquire()
        assert await pool.acquire() is connection

    async def test_a_pool_with_nothing_left_fails_and_does_not_wait(self) -> None:
        pool = ScriptedPool([])
        with pytest.raises(AssertionError, match="no connection is left"):
            await pool.acquire()

    async def test_expired_connections_are_closed_by_their_release(self) -> None:
        free, held, fresh = ScriptedConnection(), ScriptedConnection(), ScriptedConnection()
        pool = ScriptedPool([free, held, fresh])
        one, two = await pool.acquire(), await pool.acquire()
        await pool.release(one)
        await pool.expire_connections()
        assert (free.is_closed(), held.is_closed()) == (True, False)
        await pool.release(two)
        assert held.is_closed()
        assert await pool.acquire() is fresh
        assert pool.expired == 1

    async def test_only_its_own_connections_are_taken_back_and_only_once(self) -> None:
        pool = ScriptedPool([ScriptedConnection()])
        connection = await pool.acquire()
        await pool.release(connection)
        for stranger in (connection, ScriptedConnection()):
            with pytest.raises(asyncpg.InterfaceError, match="not acquired"):
                await pool.release(stranger)

    async def test_a_closed_pool_gives_nothing(self) -> None:
        pool = ScriptedPool([ScriptedConnection()])
        await pool.close()
        assert pool.is_closing()
        with pytest.raises(asyncpg.InterfaceError, match="closing"):
            await pool.acquire()


async def _take(pool: ScriptedPool) -> ScriptedConnection:
    return await pool.acquire()
