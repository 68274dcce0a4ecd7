"""Connections handed on past the pool: the driver's private names are there, and nothing goes along."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import Engine
from dbop_raw.driver.handover import can_hand_over, hand_over
from tests.support.pools import pool_on
from tests.support.sessions import backend
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

AT_MOST = 32
"""So many times in a row."""


@pytest.fixture
async def single(postgres_dsn: str) -> AsyncIterator[asyncpg.Pool]:
    """One connection, which is open."""
    async with pool_on(postgres_dsn, min_size=1, max_size=1) as pool:
        yield pool


class Acquired:
    """Counts how often anybody takes a connection from a pool."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        acquire = asyncpg.Pool.acquire

        def counted(pool: asyncpg.Pool, **options: Any) -> Any:
            self.count += 1
            return acquire(pool, **options)

        monkeypatch.setattr(asyncpg.Pool, "acquire", counted)


@pytest.fixture
def acquired(monkeypatch: pytest.MonkeyPatch) -> Acquired:
    return Acquired(monkeypatch)


# --- the driver


async def test_the_driver_has_the_names_that_a_handover_needs(single: asyncpg.Pool) -> None:
    pool: Any = single
    assert (pool._setup, pool._reset) == (None, None)
    conn: Any = await single.acquire()
    holder, connection = conn._holder, conn._con
    assert holder._proxy is conn
    assert holder._con is connection
    assert holder._pool is pool
    assert holder._generation == pool._generation
    assert callable(connection._on_release)
    assert callable(conn._detach)
    await single.release(conn)
    assert (holder._proxy, conn._con) == (None, None)


@pytest.mark.parametrize("name", ["_setup", "_reset"])
def test_a_pool_without_one_of_the_names_hands_nothing_over(name: str) -> None:
    names: dict[str, Any] = {"_setup": None, "_reset": None}
    assert can_hand_over(SimpleNamespace(**names))
    del names[name]
    assert not can_hand_over(SimpleNamespace(**names))


class Driver:
    """Stands for the driver's things, as far as a handover knows them."""

    def __init__(self) -> None:
        self.resets = 0
        self.pool = SimpleNamespace(is_closing=lambda: False, _generation=0)
        self.holder = SimpleNamespace(_pool=self.pool, _generation=0)
        self.connection = SimpleNamespace(_on_release=lambda: None, reset=self._reset)
        self.conn = Proxy(self.holder, self.connection)
        self.holder._proxy = self.conn

    async def _reset(self, *, timeout: float) -> None:  # noqa: ASYNC109 - asyncpg's
        assert timeout == 1
        self.resets += 1


class Proxy(SimpleNamespace):
    """As the driver's: made of a holder and a connection."""

    def __init__(self, holder: Any, connection: Any) -> None:
        super().__init__(_holder=holder, _con=connection, _detach=lambda: connection)


async def test_with_all_of_the_names_a_connection_is_handed_over() -> None:
    driver = Driver()
    proxy = await hand_over(driver.conn, 1)
    assert proxy is not driver.conn
    assert proxy is driver.holder._proxy
    assert driver.resets == 1


@pytest.mark.parametrize(
    ("of", "name"),
    [
        ("conn", "_holder"),
        ("conn", "_con"),
        ("conn", "_detach"),
        ("holder", "_proxy"),
        ("holder", "_pool"),
        ("holder", "_generation"),
        ("pool", "_generation"),
        ("connection", "_on_release"),
    ],
)
async def test_without_one_of_the_names_the_pool_has_to_do_it(of: str, name: str) -> None:
    driver = Driver()
    delattr(getattr(driver, of), name)
    assert await hand_over(driver.conn, 1) is None
    assert driver.resets == 0


# --- what does not go along


async def sets(conn: Any) -> None:
    await conn.execute("SET work_mem = '77kB'")


async def no_setting(conn: Any) -> None:
    assert await conn.fetchval("SELECT current_setting('work_mem')") != "77kB"


async def sets_locally(conn: Any) -> None:
    await conn.execute("SET LOCAL work_mem = '77kB'")


async def sets_of_its_own(conn: Any) -> None:
    await conn.execute("SELECT set_config('test.mine', 'yes', false)")


async def no_setting_of_its_own(conn: Any) -> None:
    assert not await conn.fetchval("SELECT current_setting('test.mine', true)")


async def locks(conn: Any) -> None:
    await conn.execute("SELECT pg_advisory_lock(77), pg_advisory_lock(77)")


async def no_lock(conn: Any) -> None:
    assert await conn.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = "
                               "pg_backend_pid()") == 0  # fmt: skip


async def listens(conn: Any) -> None:
    await conn.execute("LISTEN test")


async def no_listener(conn: Any) -> None:
    assert await conn.fetch("SELECT pg_listening_channels()") == []


async def keeps_a_cursor(conn: Any) -> None:
    await conn.execute("DECLARE kept CURSOR WITH HOLD FOR SELECT 1")


async def no_cursor(conn: Any) -> None:
    assert await conn.fetchval("SELECT count(*) FROM pg_cursors WHERE name = 'kept'") == 0


Body = Callable[[Any], Awaitable[None]]


async def one_after_the_other(engine: Engine, *bodies: Body) -> list[Any]:
    """Run the bodies on one connection, the others waiting from the beginning; gives what each was given."""
    conns: list[Any] = []
    all_wait = asyncio.Event()

    async def run(body: Body) -> None:
        async def noted(conn: Any) -> None:
            conns.append(conn)
            await body(conn)
            await all_wait.wait()

        await engine.run(noted)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for body in bodies:
                group.start_soon(run, body)
            await until(lambda: engine.stats().waiting == len(bodies) - 1 and conns)
            all_wait.set()
    return conns


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        (sets, no_setting),
        (sets_locally, no_setting),
        (sets_of_its_own, no_setting_of_its_own),
        (locks, no_lock),
        (listens, no_listener),
        (keeps_a_cursor, no_cursor),
    ],
    ids=lambda body: body.__name__,
)
async def test_nothing_of_one_user_reaches_the_next(
    dirty: Body, clean: Body, single: asyncpg.Pool, acquired: Acquired
) -> None:
    engine = Engine(single)
    first, second = await one_after_the_other(engine, dirty, clean)
    assert first is not second
    assert (acquired.count, engine.stats().evicted) == (1, 0)


async def test_a_listener_that_was_left_is_warned_of_and_hears_no_more(
    single: asyncpg.Pool, acquired: Acquired
) -> None:
    heard: list[Any] = []

    async def listens(conn: Any) -> None:
        await conn.add_listener("test", lambda *args: heard.append(args))

    async def notifies(conn: Any) -> None:
        assert await conn.fetch("SELECT pg_listening_channels()") == []
        await conn.execute("NOTIFY test")

    with pytest.warns(asyncpg.InterfaceWarning, match="active notification listener"):
        await one_after_the_other(Engine(single), listens, notifies)
    assert (heard, acquired.count) == ([], 1)


# --- what was kept


async def test_what_the_first_user_kept_is_useless_afterwards(
    single: asyncpg.Pool, acquired: Acquired
) -> None:
    kept: list[Any] = []

    async def keeps(conn: Any) -> None:
        kept.append(await conn.prepare("SELECT 1"))

    async def tries(conn: Any) -> None:
        with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
            await kept[0].fetch()
        assert await backend(conn) == conn.get_server_pid()

    first, _ = await one_after_the_other(Engine(single), keeps, tries)
    assert acquired.count == 1
    with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
        await first.fetchval("SELECT 1")


async def test_to_give_the_old_one_back_takes_nothing_from_its_new_user(single: asyncpg.Pool) -> None:
    old: Any = await single.acquire()
    new = await hand_over(old, 1)
    await single.release(old)
    assert single.get_idle_size() == 0
    assert await new.fetchval("SELECT 7") == 7
    with pytest.raises(asyncpg.InterfaceError):
        old.terminate()
    assert await new.fetchval("SELECT 7") == 7
    await single.release(new)
    assert single.get_idle_size() == 1


async def test_what_was_given_back_is_not_handed_over(single: asyncpg.Pool) -> None:
    conn: Any = await single.acquire()
    await single.release(conn)
    assert await hand_over(conn, 1) is None
    async with single.acquire() as other:
        assert await hand_over(conn, 1) is None
        assert await other.fetchval("SELECT 7") == 7


# --- which pools, and how often


@pytest.mark.parametrize("hook", ["setup", "reset"])
async def test_a_pool_with_a_hook_is_asked_for_each_user(
    hook: str, postgres_dsn: str, acquired: Acquired
) -> None:
    called: list[Any] = []

    async def note(conn: Any) -> None:
        called.append(conn)

    async def nothing(_: Any) -> None:
        pass

    options: dict[str, Any] = {hook: note}
    async with pool_on(postgres_dsn, min_size=1, max_size=1, **options) as pool:
        assert not can_hand_over(pool)
        await one_after_the_other(Engine(pool), nothing, nothing, nothing)
    assert (len(called), acquired.count) == (3, 3)


async def test_a_connection_goes_through_the_pool_after_so_many_users(
    single: asyncpg.Pool, acquired: Acquired
) -> None:
    async def nothing(_: Any) -> None:
        pass

    times = 3
    conns = await one_after_the_other(Engine(single), *[nothing] * (times * (AT_MOST + 1)))
    assert acquired.count == times
    assert len({id(conn) for conn in conns}) == times * (AT_MOST + 1)


async def test_an_expired_pool_or_one_that_closes_gets_its_connection_back(single: asyncpg.Pool) -> None:
    conn: Any = await single.acquire()
    await single.expire_connections()
    assert await hand_over(conn, 1) is None
    await single.release(conn)
    conn = await single.acquire()
    closing = asyncio.create_task(single.close())
    await asyncio.sleep(0)
    assert await hand_over(conn, 1) is None
    await single.release(conn)
    await closing
