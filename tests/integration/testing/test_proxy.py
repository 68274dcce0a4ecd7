"""The faulty network: what it counts on the wire, what it does to it, and that it harms nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio.to_thread
import asyncpg
import pytest

from dbop_raw.testing import Fault, FaultProxy, Message, Server, message, nth, query
from dbop_raw.testing.server import run_sql
from tests.support.sessions import others
from tests.support.waiting import until, until_in_thread

pytestmark = pytest.mark.anyio

LOST = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)


@pytest.fixture(scope="module")
def database(server: Server) -> Iterator[str]:
    dsn = server.create_database()
    yield dsn
    server.drop_database(dsn)


@pytest.fixture
def table(database: str) -> Iterator[str]:
    run_sql(database, "CREATE TABLE t (a int)")
    yield database
    run_sql(database, "DROP TABLE t")


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(server.host, server.port) as proxy:
        yield proxy


@pytest.fixture
async def connection(proxy: FaultProxy, table: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(proxy.dsn(table))
    proxy.reset_counts()
    yield connection
    connection.terminate()


def _rows(dsn: str) -> int:
    """Count the committed rows, past the proxy."""
    return int(run_sql(dsn, "SELECT count(*) FROM t"))


async def _settled(dsn: str) -> None:
    """Wait until the server has noticed that its client is gone."""
    await anyio.to_thread.run_sync(lambda: until_in_thread(lambda: others(dsn) == 0))


Work = Callable[[asyncpg.Connection], Awaitable[Any]]


def copies(count: int) -> Work:
    return lambda conn: conn.copy_records_to_table("t", columns=["a"], records=[(n,) for n in range(count)])


# What is done, and its round trips the first time and the second.
COSTS: dict[str, tuple[Work, int, int]] = {
    "three statements without arguments": (
        lambda conn: conn.execute("SET application_name = 'x'; BEGIN; COMMIT"), 1, 1,
    ),
    "a statement that is prepared first": (lambda conn: conn.fetchval("SELECT 1"), 2, 1),
    "many executions, prepared first": (
        lambda conn: conn.executemany("INSERT INTO t VALUES ($1)", [(n,) for n in range(100)]), 2, 1,
    ),
    "a COPY that asks for the types first": (copies(2), 2, 1),
    "a COPY of many rows": (copies(50_000), 2, 1),
}  # fmt: skip


class TestCounting:
    @pytest.mark.parametrize("call", COSTS)
    async def test_a_call_costs_what_the_protocol_says(
        self, proxy: FaultProxy, connection: asyncpg.Connection, call: str
    ) -> None:
        work, first, again = COSTS[call]
        counted = []
        for _ in range(2):
            proxy.reset_counts()
            await work(connection)
            counted.append(proxy.round_trips)
        assert counted == [first, again]

    async def test_startup_and_goodbye_are_not_counted(self, proxy: FaultProxy, database: str) -> None:
        connection = await asyncpg.connect(proxy.dsn(database))
        await connection.close()
        assert proxy.round_trips == 0
        assert proxy.connections_opened == 1
        assert [m.type for m in proxy.messages][-1] == "X"

    async def test_a_message_that_comes_unasked_is_not_counted(
        self, proxy: FaultProxy, connection: asyncpg.Connection, table: str
    ) -> None:
        heard: asyncio.Queue[str] = asyncio.Queue()
        await connection.add_listener("news", lambda *args: heard.put_nowait(args[-1]))
        before = proxy.round_trips
        run_sql(table, "SELECT pg_notify('news', 'hello')")
        assert await asyncio.wait_for(heard.get(), 5) == "hello"
        assert proxy.messages[-1].type == "A"
        assert proxy.round_trips == before
        await connection.fetchval("SELECT 1")
        assert proxy.round_trips == before + 2

    async def test_a_notice_before_the_answer_is_part_of_it(
        self, proxy: FaultProxy, connection: asyncpg.Connection
    ) -> None:
        await connection.execute("DO $$ BEGIN RAISE WARNING 'x'; END $$")
        assert proxy.round_trips == 1

    async def test_connections_are_counted_apart(self, proxy: FaultProxy, database: str) -> None:
        one, two = await asyncpg.connect(proxy.dsn(database)), await asyncpg.connect(proxy.dsn(database))
        proxy.reset_counts()
        await one.execute("SELECT 1")
        await two.execute("SELECT 1")
        await two.execute("SELECT 1")
        assert proxy.round_trips_by_connection == {1: 1, 2: 2}
        assert proxy.round_trips == 3
        await one.close()
        await two.close()

    async def test_a_copy_that_fails_is_no_round_trip_more(
        self, proxy: FaultProxy, connection: asyncpg.Connection
    ) -> None:
        await connection.execute("CREATE TEMP TABLE u (a int CHECK (a < 10))")
        await connection.copy_records_to_table("u", columns=["a"], records=[(1,)])
        proxy.reset_counts()
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.copy_records_to_table("u", columns=["a"], records=((n,) for n in range(50_000)))
        assert proxy.round_trips == 1
        await connection.execute("SELECT 1")
        assert proxy.round_trips == 2

    async def test_messages_are_shown_in_order(
        self, proxy: FaultProxy, connection: asyncpg.Connection
    ) -> None:
        await connection.execute(f"SELECT 1 -- {'x' * 1000}")
        assert [(m.sender, m.type, m.index) for m in proxy.messages] == [
            ("client", "Q", 1),
            ("server", "T", 2), ("server", "D", 3), ("server", "C", 4), ("server", "Z", 5),
        ]  # fmt: skip
        first = proxy.messages[0]
        assert (len(first.body), len(first.sql), first.sql[:8]) == (200, 1012, "SELECT 1")


class TestTruth:
    async def test_large_messages_pass_unharmed(self, connection: asyncpg.Connection) -> None:
        blob = bytes(range(256)) * 20_000
        assert await connection.fetchval("SELECT $1::bytea", blob) == blob
        digest = await connection.fetchval("SELECT encode(sha256($1::bytea), 'hex')", blob)
        assert digest == hashlib.sha256(blob).hexdigest()

    async def test_thousands_of_messages_pass_in_order(self, connection: asyncpg.Connection) -> None:
        rows = await connection.fetch("SELECT n FROM generate_series(1, 20000) n")
        assert [row["n"] for row in rows] == list(range(1, 20_001))
        await connection.copy_records_to_table("t", columns=["a"], records=((n,) for n in range(50_000)))
        assert await connection.fetchval("SELECT sum(a) FROM t") == sum(range(50_000))

    async def test_a_late_server_is_late_and_in_order(
        self, proxy: FaultProxy, connection: asyncpg.Connection
    ) -> None:
        proxy.delay_server = 0.05
        loop = asyncio.get_running_loop()
        start = loop.time()
        rows = await connection.fetch("SELECT n, repeat('x', 100) FROM generate_series(1, 20000) n")
        proxy.delay_server = 0.0
        assert [row["n"] for row in rows] == list(range(1, 20_001))
        assert loop.time() - start >= 0.1  # two round trips; a lower bound only
        assert await connection.fetchval("SELECT 5") == 5

    async def test_late_bytes_of_a_line_that_was_cut_are_dropped(
        self, proxy: FaultProxy, connection: asyncpg.Connection
    ) -> None:
        complaints: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        proxy.delay_server = 0.05
        call = asyncio.ensure_future(connection.execute("SELECT 1"))
        await until(lambda: proxy.round_trips == 1)
        proxy.drop_all("cut")
        with pytest.raises(LOST):
            await call
        await asyncio.sleep(0.1)  # until they would have come
        assert complaints == []

    async def test_a_cancel_request_goes_through(
        self, proxy: FaultProxy, connection: asyncpg.Connection
    ) -> None:
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(30)", timeout=0.05)
        assert await connection.fetchval("SELECT 1") == 1
        assert "cancel" in [m.type for m in proxy.messages]

    async def test_a_wish_for_tls_is_answered_by_the_server(self, proxy: FaultProxy, database: str) -> None:
        connection = await asyncpg.connect(proxy.dsn(database), ssl="prefer")
        assert [m.type for m in proxy.messages][:3] == ["ssl", "ssl-answer", "startup"]
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()

    async def test_a_client_that_does_not_speak_postgresql_is_refused(self, proxy: FaultProxy) -> None:
        reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
        writer.write(b"\0\0\0\1GET ")
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 5)
        writer.close()


class TestFaults:
    @pytest.mark.parametrize("action", ["cut", "reset"])
    @pytest.mark.parametrize(("sender", "side", "committed"), [
        ("client", "before", 0), ("client", "after", 1), ("server", "before", 1),
    ])  # fmt: skip
    async def test_a_commit_is_lost_on_its_way_or_only_its_answer_is(
        self, proxy: FaultProxy, connection: asyncpg.Connection, table: str,
        action: str, sender: str, side: str, committed: int,
    ) -> None:  # fmt: skip
        await connection.execute("BEGIN; INSERT INTO t VALUES (1)")
        when = query("COMMIT") if sender == "client" else message("server", "C")
        injected = proxy.inject(Fault(action, when, side))  # type: ignore[arg-type]
        with pytest.raises(LOST):
            await connection.execute("COMMIT")
        assert injected.fired == 1
        await _settled(table)
        assert _rows(table) == committed

    @pytest.mark.parametrize(("side", "committed"), [("before", 0), ("after", 1)])
    async def test_a_hanging_line_holds_back_until_it_heals(
        self, proxy: FaultProxy, connection: asyncpg.Connection, table: str, side: str, committed: int
    ) -> None:
        await connection.execute("BEGIN; INSERT INTO t VALUES (1)")
        injected = proxy.inject(Fault("hang", query("COMMIT"), side))  # type: ignore[arg-type]
        call = asyncio.ensure_future(connection.execute("COMMIT"))
        await asyncio.wait_for(injected.wait(), 5)
        for _ in range(100):
            if await asyncio.to_thread(_rows, table) == committed:
                break
        assert await asyncio.to_thread(_rows, table) == committed
        assert not call.done()
        proxy.heal()
        assert await asyncio.wait_for(call, 5) == "COMMIT"
        assert _rows(table) == 1

    async def test_while_a_line_hangs_neither_side_learns_that_the_other_is_gone(
        self, proxy: FaultProxy, table: str
    ) -> None:
        connection = await asyncpg.connect(proxy.dsn(table))
        pid = connection.get_server_pid()
        injected = proxy.inject(Fault("hang", query("SELECT 'hang'")))
        call = asyncio.ensure_future(connection.execute("SELECT 'hang'"))
        await asyncio.wait_for(injected.wait(), 5)
        connection.terminate()
        with pytest.raises(LOST):
            await call
        there = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}"
        for _ in range(20):
            assert await asyncio.to_thread(run_sql, table, there) == 1
        proxy.heal()
        await _settled(table)

    async def test_a_when_that_fails_is_not_kept_secret(self, server: Server, database: str) -> None:
        def wrong(_: Message) -> bool:
            raise ZeroDivisionError("in my own when")

        proxy = await FaultProxy(server.host, server.port).__aenter__()
        connection = await asyncpg.connect(proxy.dsn(database))
        proxy.inject(Fault("cut", wrong))
        with pytest.raises(LOST):
            await connection.execute("SELECT 1")
        with pytest.raises(ZeroDivisionError, match="in my own when"):
            await proxy.__aexit__(None, None, None)

    async def test_a_delay_only_delays(self, proxy: FaultProxy, connection: asyncpg.Connection) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        proxy.inject(Fault("delay", query("SELECT"), seconds=0.1))
        assert await connection.execute("SELECT 1") == "SELECT 1"
        assert loop.time() - start >= 0.1

    async def test_a_fault_happens_as_often_as_it_was_told(
        self, proxy: FaultProxy, connection: asyncpg.Connection
    ) -> None:
        once = proxy.inject(Fault("delay", query("SELECT"), seconds=0))
        twice = proxy.inject(Fault("delay", query("SELECT"), seconds=0, times=2))
        each = proxy.inject(Fault("delay", query("SELECT"), seconds=0, times=None))
        for _ in range(5):
            await connection.execute("SELECT 1")
        assert (once.fired, twice.fired, each.fired) == (1, 2, 2)

    async def test_the_nth_message_is_the_nth(
        self, proxy: FaultProxy, connection: asyncpg.Connection
    ) -> None:
        second = proxy.inject(Fault("delay", message("client", "Q", nth=2), seconds=0))
        sixth = proxy.inject(Fault("delay", nth(6), seconds=0, times=None))
        await connection.execute("SELECT 1")
        assert (second.fired, sixth.fired) == (0, 0)
        await connection.execute("SELECT 1")
        assert (second.fired, sixth.fired) == (1, 0)  # the sixth is the second Q: the first fault took it
        proxy.reset_counts()
        await connection.execute("SELECT 1")
        await connection.execute("SELECT 1")
        assert sixth.fired == 1

    async def test_sql_is_found_wherever_it_is_in_a_long_message(
        self, proxy: FaultProxy, connection: asyncpg.Connection
    ) -> None:
        injected = proxy.inject(Fault("cut", query("needle")))
        with pytest.raises(LOST):
            await connection.fetch(f"SELECT 1 /* {'x' * 300} needle */")
        assert injected.fired == 1

    async def test_other_connections_are_not_touched(self, proxy: FaultProxy, database: str) -> None:
        one, two = await asyncpg.connect(proxy.dsn(database)), await asyncpg.connect(proxy.dsn(database))
        proxy.inject(Fault("reset", query("SELECT 'one'")))
        with pytest.raises(LOST):
            await one.execute("SELECT 'one'")
        assert await two.execute("SELECT 'one'") == "SELECT 1"
        await two.close()

    @pytest.mark.every_loop
    async def test_a_line_that_was_reset_may_be_dropped_again(
        self, proxy: FaultProxy, connection: asyncpg.Connection
    ) -> None:
        """Before the proxy has seen its end: uvloop has no socket any more then."""
        proxy.drop_all("reset")
        proxy.drop_all("reset")
        with pytest.raises(LOST):
            await connection.execute("SELECT 1")
        await until(lambda: proxy.connections == 0)

    @pytest.mark.parametrize(("action", "end"), [("cut", b""), ("reset", ConnectionResetError)])
    async def test_the_client_sees_a_fin_or_a_rst(self, proxy: FaultProxy, action: str, end: object) -> None:
        reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
        await until(lambda: proxy.connections == 1)
        writer.write(struct.pack("!II", 8, 80877103))
        assert await reader.read(1) == b"N"
        proxy.drop_all(action)  # type: ignore[arg-type]
        if end == b"":
            assert await asyncio.wait_for(reader.read(), 5) == b""
        else:
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 5)
        writer.close()

    async def test_all_connections_are_dropped_and_new_ones_work(
        self, proxy: FaultProxy, database: str
    ) -> None:
        old = [await asyncpg.connect(proxy.dsn(database)) for _ in range(3)]
        proxy.drop_all("reset")
        for each in old:
            with pytest.raises(LOST):
                await each.execute("SELECT 1")
        new = await asyncpg.connect(proxy.dsn(database))
        assert await new.fetchval("SELECT 1") == 1
        await new.close()
        await until(lambda: proxy.connections == 0)


class TestEnd:
    async def test_a_server_that_is_not_there_is_a_reset(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            async with FaultProxy("127.0.0.1", free.getsockname()[1]) as proxy:
                with pytest.raises(LOST):
                    await asyncpg.connect(f"postgresql://me@{proxy.host}:{proxy.port}/x", timeout=5)

    @pytest.mark.parametrize("state", ["idle", "hanging", "cut", "late"])
    async def test_a_proxy_stops_with_nothing_left(self, server: Server, table: str, state: str) -> None:
        before = asyncio.all_tasks()
        async with FaultProxy(server.host, server.port) as proxy:
            connection = await asyncpg.connect(proxy.dsn(table))
            if state == "late":
                proxy.delay_server = 60
            elif state != "idle":
                proxy.inject(Fault("hang" if state == "hanging" else "cut", query("pg_sleep"), "after"))
            call = asyncio.ensure_future(connection.execute("SELECT pg_sleep(0.05)"))
            await until(lambda: any("pg_sleep" in m.sql for m in proxy.messages))
        with pytest.raises(LOST):
            await asyncio.wait_for(call, 5)
        connection.terminate()
        await until(lambda: asyncio.all_tasks() <= before)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(proxy.host, proxy.port)
        await _settled(table)

    async def test_the_end_of_one_side_reaches_the_other(self, proxy: FaultProxy, database: str) -> None:
        one, two = await asyncpg.connect(proxy.dsn(database)), await asyncpg.connect(proxy.dsn(database))
        one.terminate()
        run_sql(database, f"SELECT pg_terminate_backend({two.get_server_pid()}, 5000)")
        with pytest.raises((asyncpg.AdminShutdownError, *LOST)):
            await two.execute("SELECT 1")
        await until(lambda: proxy.connections == 0)
        await _settled(database)
