"""A COMMIT that another node has done, or may have.

In doubt, whatever an override says; nothing is written twice.

There is no distributed server here. A deferred constraint trigger raises what one answers, and dblink has
committed a row elsewhere by then: as where a worker has committed, and its answer is lost.
"""

# ruff: noqa: ASYNC110 - what the server has done, only asking again can tell

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from dbop_raw import (
    BatchResult,
    CommitTokens,
    CommitUnknown,
    Engine,
    Ledger,
    Repair,
    Rule,
    batch,
    copy_into,
    events,
    ingest,
    pipe,
    retry,
)
from dbop_raw.testing import Fault, FaultProxy, Server
from dbop_raw.testing.server import run_sql
from tests.support.batching import QUICK, WRITERS, as_items, make_batch, told
from tests.support.dsn import without_tls
from tests.support.observing import Seen
from tests.support.protocol import answer_to_commit
from tests.support.settings import with_bounds
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

COLUMNS = ("id", "body")
SCHEMA = (
    "CREATE EXTENSION dblink",
    "CREATE TABLE here (conninfo text)",
    "CREATE TABLE elsewhere (id int, body text)",
    "CREATE TABLE item (id int PRIMARY KEY, body text NOT NULL)",
    "CREATE SEQUENCE met",
    """
    CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        code text := split_part(NEW.body, ' ', 2);
    BEGIN
        IF NEW.body LIKE 'wait' THEN
            PERFORM nextval('met');
            PERFORM pg_advisory_xact_lock_shared(7);
        ELSIF NEW.body LIKE 'lose % once' AND nextval('met') > 1 THEN
            NULL;
        ELSIF NEW.body LIKE 'lose %' THEN
            PERFORM dblink_exec(conninfo, format('INSERT INTO elsewhere VALUES (%s, %L)', NEW.id, NEW.body))
            FROM here;
            RAISE EXCEPTION 'a node did not answer' USING ERRCODE = code;
        ELSIF NEW.body LIKE 'refuse %' THEN
            RAISE EXCEPTION 'refused' USING ERRCODE = code;
        END IF;
        RETURN NULL;
    END $$
    """,
    (
        "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION at_commit()"
    ),
)

# By these PostgreSQL itself does not refuse a COMMIT: somebody else could not tell what became of it.
NOBODY_KNOWS = ("XX000", "XX001", "08006", "08003", "08007", "40003", "57P01", "58000", "58030")
# By these it does, or a constraint trigger of the user's.
REFUSED = ("23505", "23503", "23514", "23P01", "P0001", "UE001", "22012")

OVERRIDES: dict[str, Any] = {
    "no override": None,
    "the code is an item's": lambda code: {code: Rule(Repair.NEVER, item=True)},
    "the class is an item's": lambda code: {code[:2]: Rule(Repair.NEVER, item=True)},
    "the code is transient": lambda code: {code: Repair.TRANSACTION},
}


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    for statement in SCHEMA:
        run_sql(dsn, statement)
    parts = urlsplit(dsn)
    conninfo = f"host={parts.hostname} port={parts.port} user={parts.username} dbname={parts.path[1:]}"
    run_sql(dsn, f"INSERT INTO here VALUES ('{conninfo}')")
    yield dsn
    postgres_server.drop_database(dsn)


class World:
    """A pool, and a session that looks on."""

    def __init__(self, dsn: str, pool: asyncpg.Pool, outside: Any) -> None:
        self.dsn = dsn
        self.pool = pool
        self.outside = outside
        self.seen = Seen()

    def engine(self, **options: Any) -> Engine:
        return Engine(self.pool, observer=self.seen, **options)

    async def elsewhere(self) -> int:
        found: int = await self.outside.fetchval("SELECT count(*) FROM elsewhere")
        return found

    async def stored(self) -> list[int]:
        return [row["id"] for row in await self.outside.fetch("SELECT id FROM item ORDER BY id")]


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    outside = await asyncpg.connect(database)
    try:
        await outside.execute(
            "TRUNCATE item, elsewhere; ALTER SEQUENCE met RESTART; "
            "DROP TABLE IF EXISTS dbop_raw_commits, dbop_raw_ledger CASCADE"
        )
        async with asyncpg.create_pool(database, min_size=0, max_size=3) as pool:
            yield World(database, pool, outside)
    finally:
        await outside.close()


def verdicts_of(override: str, code: str) -> Any:
    return None if OVERRIDES[override] is None else OVERRIDES[override](code)


def rows_with(writer: str, body: str) -> list[Any]:
    return as_items(writer, [(n, body if n == 3 else "fine") for n in range(10)])


# --- C.1: what is in doubt, and what is not


@pytest.mark.parametrize("retried", [False, True], ids=["no retry", "retry"])
@pytest.mark.parametrize("override", OVERRIDES)
@pytest.mark.parametrize("code", NOBODY_KNOWS)
async def test_a_commit_that_ends_with_such_a_code_is_in_doubt_whatever_an_override_says(
    world: World, code: str, override: str, retried: bool
) -> None:
    engine = world.engine(verdicts=verdicts_of(override, code))
    starts = 0

    async def body(conn: Any) -> None:
        nonlocal starts
        starts += 1
        await conn.execute("INSERT INTO item VALUES (1, $1)", f"lose {code}")

    with pytest.raises(CommitUnknown) as raised:
        await engine.run(body, retry=QUICK if retried else None)
    assert isinstance(raised.value.__cause__, asyncpg.PostgresError)
    assert raised.value.__cause__.sqlstate == code
    assert starts == 1
    assert await world.elsewhere() == 1
    assert engine.stats().commits_in_doubt == 1
    assert len(world.seen.of(events.CommitInDoubt)) == 1
    assert world.seen.of(events.RolledBack) == world.seen.of(events.Committed) == []


@pytest.mark.parametrize("override", OVERRIDES)
@pytest.mark.parametrize("code", ["XX000", "08006", "57P01"])
@pytest.mark.parametrize("writer", WRITERS)
async def test_a_batch_is_not_written_twice_for_a_code_at_commit(
    world: World, writer: str, code: str, override: str
) -> None:
    """A user's `XX000 → NEVER, item` had rows taken for a violated constraint, and all written once more."""
    engine = world.engine(verdicts=verdicts_of(override, code))
    write = make_batch(writer, "item", COLUMNS)
    with pytest.raises(CommitUnknown):
        await engine.run(pipe(write(rows_with(writer, f"lose {code}")), retry(QUICK)))
    assert await world.elsewhere() == 1


@pytest.mark.parametrize("override", OVERRIDES)
@pytest.mark.parametrize("code", ["XX000", "08006", "57P01"])
async def test_a_block_of_plain_code_is_in_doubt_by_the_same_codes(
    world: World, code: str, override: str
) -> None:
    engine = world.engine(verdicts=verdicts_of(override, code))
    with pytest.raises(CommitUnknown):
        async with engine.transaction() as conn:
            await conn.execute("INSERT INTO item VALUES (1, $1)", f"lose {code}")
    assert engine.stats().commits_in_doubt == 1
    assert await world.elsewhere() == 1


@pytest.mark.parametrize("way", ["xid", "token"])
@pytest.mark.parametrize("override", OVERRIDES)
@pytest.mark.parametrize("writer", WRITERS)
async def test_such_a_commit_is_looked_up_where_that_was_asked_for(
    world: World, writer: str, override: str, way: str
) -> None:
    """Here it shows that nothing is in on this server, so the run starts again; and says why."""
    tokens = CommitTokens() if way == "token" else None
    engine = world.engine(verdicts=verdicts_of(override, "XX000"), commit_tokens=tokens)
    if tokens is not None:
        await engine.run(tokens.install)
    world.seen.events.clear()
    result: BatchResult[Any, Any] = await engine.run(
        make_batch(writer, "item", COLUMNS)(rows_with(writer, "lose XX000 once")), resolve_commit=True
    )
    assert told(result) == []
    assert await world.stored() == list(range(10))
    assert [event.outcome for event in world.seen.of(events.CommitResolved)] == ["aborted"]
    assert engine.stats().commits_in_doubt == 1


@pytest.mark.parametrize("code", REFUSED)
async def test_a_code_by_which_the_server_refuses_leaves_nothing_in_doubt(world: World, code: str) -> None:
    engine = world.engine()

    async def body(conn: Any) -> None:
        await conn.execute("INSERT INTO item VALUES (1, $1)", f"refuse {code}")

    with pytest.raises(asyncpg.PostgresError) as raised:
        await engine.run(body, retry=QUICK)
    assert raised.value.sqlstate == code
    stats = engine.stats()
    assert (stats.commits_in_doubt, stats.evicted) == (0, 0)
    assert await world.stored() == []


@pytest.mark.parametrize("code", REFUSED)
@pytest.mark.parametrize("writer", WRITERS)
async def test_an_item_whose_deferred_constraint_is_refused_is_set_aside(
    world: World, writer: str, code: str
) -> None:
    """As before: nothing is in doubt, and the batch finds whom it is about."""
    engine = world.engine()
    result = await engine.run(
        make_batch(writer, "item", COLUMNS)(rows_with(writer, f"refuse {code}")), resolve_commit=True
    )
    assert told(result) == [(3, code)]
    assert await world.stored() == [n for n in range(10) if n != 3]
    assert engine.stats().commits_in_doubt == 0


@pytest.mark.parametrize("code", ["40001", "40P01"])
@pytest.mark.parametrize("writer", WRITERS)
async def test_a_conflict_at_commit_is_a_sure_no_and_starts_the_run_again(
    world: World, writer: str, code: str
) -> None:
    engine = world.engine()
    result = await engine.run(
        make_batch(writer, "item", COLUMNS)(rows_with(writer, f"lose {code} once")), retry=QUICK
    )
    assert told(result) == []
    assert engine.stats().commits_in_doubt == 0
    assert [event.level for event in world.seen.of(events.Retried)] == ["transaction"]


# --- C.4: a token or a ledger's row, known by itself and not by the fields of an error


@contextlib.asynccontextmanager
async def losing_the_answer(
    server: Server, world: World, **options: Any
) -> AsyncIterator[tuple[Engine, FaultProxy]]:
    """An engine behind a line that loses the answer to the first COMMIT."""
    async with FaultProxy(server.host, server.port) as proxy:
        dsn = without_tls(proxy.dsn(world.dsn))
        async with Engine.open(dsn, min_size=0, max_size=2, observer=world.seen, **options) as engine:
            yield engine, proxy


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_batchs_token_is_found_also_where_an_error_would_not_name_its_table(
    postgres_server: Server, world: World, writer: str
) -> None:
    """In a partitioned table, say: the error then names a partition, and a distributed server names none."""
    tokens = CommitTokens()
    await world.outside.execute(
        "CREATE TABLE dbop_raw_commits (token uuid PRIMARY KEY, at timestamptz NOT NULL DEFAULT now()) "
        "PARTITION BY HASH (token)"
    )
    await world.outside.execute(
        "CREATE TABLE commits_0 PARTITION OF dbop_raw_commits FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
    )
    async with losing_the_answer(postgres_server, world, commit_tokens=tokens) as (engine, proxy):
        proxy.inject(Fault("reset", when=answer_to_commit))
        result: BatchResult[Any, Any] = await engine.run(
            make_batch(writer, "item", COLUMNS)(rows_with(writer, "fine")), resolve_commit=True
        )
    assert told(result) == []
    assert await world.stored() == list(range(10))
    assert [event.outcome for event in world.seen.of(events.CommitResolved)] == ["committed"]


async def partitioned_ledger(world: World) -> Ledger:
    """A ledger whose table was installed, and then made a partitioned one."""
    ledger = Ledger("events-1")
    await world.engine().run(ledger.install)
    await world.outside.execute(
        "ALTER TABLE dbop_raw_ledger RENAME TO plain; "
        "CREATE TABLE dbop_raw_ledger (LIKE plain INCLUDING DEFAULTS, PRIMARY KEY (name, chunk)) "
        "PARTITION BY HASH (name); "
        "CREATE TABLE ledger_0 PARTITION OF dbop_raw_ledger FOR VALUES WITH (MODULUS 1, REMAINDER 0); "
        "DROP TABLE plain"
    )
    return ledger


async def test_a_chunk_whose_answer_was_lost_is_found_in_a_ledger_that_no_error_names(
    postgres_server: Server, world: World
) -> None:
    ledger = await partitioned_ledger(world)
    async with losing_the_answer(postgres_server, world) as (engine, proxy):
        # The ledger is read first; what is lost is the answer to a chunk.
        proxy.inject(Fault("reset", when=answer_to_commit))
        proxy.inject(Fault("reset", when=answer_to_commit))
        report = await ingest(
            engine,
            [(n, "fine") for n in range(30)],
            batch(copy_into("item", columns=COLUMNS)),
            size=10,
            workers=1,
            ledger=ledger,
            retry=QUICK,
        )
    assert report.finished
    assert await world.stored() == list(range(30))
    assert report.read == 30


async def test_two_ingests_with_a_ledger_that_no_error_names_write_each_chunk_once(world: World) -> None:
    """The second finds each chunk's row there, whatever the error calls the table, and takes it for done."""
    ledger = await partitioned_ledger(world)
    engine = world.engine()
    source = [(n, "fine") for n in range(30)]
    raced = False

    async def rows() -> AsyncIterator[tuple[int, str]]:
        """While the first is at its first chunk, the second does all."""
        nonlocal raced
        for row in source:
            if row[0] == 10 and not raced:
                raced = True
                await ingest(
                    engine,
                    source,
                    batch(copy_into("item", columns=COLUMNS)),
                    size=10,
                    workers=1,
                    ledger=ledger,
                )
            yield row

    report = await ingest(
        engine, rows(), batch(copy_into("item", columns=COLUMNS)), size=10, workers=1, ledger=ledger
    )
    assert report.finished
    assert (report.read, report.chunks + report.skipped) == (30, 3)
    assert report.skipped >= 2
    assert await world.stored() == list(range(30))


class TestReferenceTables:
    """`reference=True`: as Citus' `create_reference_table` is called, modelled by a function of that name."""

    MODEL = (
        "SET allow_system_table_mods = on",
        "CREATE TABLE IF NOT EXISTS pg_catalog.pg_dist_partition (logicalrelid regclass PRIMARY KEY)",
        "TRUNCATE pg_catalog.pg_dist_partition",
        "RESET allow_system_table_mods",
        (
            "CREATE OR REPLACE FUNCTION create_reference_table(table_name regclass) RETURNS void "
            "LANGUAGE sql AS 'INSERT INTO pg_catalog.pg_dist_partition VALUES (table_name)'"
        ),
    )

    @pytest.fixture
    async def citus(self, world: World) -> World:
        for statement in self.MODEL:
            await world.outside.execute(statement)
        return world

    async def test_tokens_are_kept_in_a_reference_table_where_that_is_asked_for(self, citus: World) -> None:
        tokens = CommitTokens(reference=True)
        engine = citus.engine(commit_tokens=tokens)
        for _ in range(2):
            await engine.run(tokens.install)
        assert await self.distributed(citus) == ["dbop_raw_commits"]

    async def test_a_ledger_is_kept_in_a_reference_table_where_that_is_asked_for(self, citus: World) -> None:
        make: Any = Ledger
        engine = citus.engine()
        for start in (0, 30):
            await ingest(
                engine,
                [(n, "fine") for n in range(start, start + 30)],
                batch(copy_into("item", columns=COLUMNS)),
                size=10,
                ledger=make(f"events-{start}", reference=True),
            )
        assert await self.distributed(citus) == ["dbop_raw_ledger"]
        assert await citus.stored() == list(range(60))

    async def test_neither_is_made_one_unasked(self, citus: World) -> None:
        tokens, ledger = CommitTokens(), Ledger("events-1")
        engine = citus.engine(commit_tokens=tokens)
        await engine.run(tokens.install)
        await engine.run(ledger.install)
        assert await self.distributed(citus) == []

    async def distributed(self, citus: World) -> list[str]:
        found = await citus.outside.fetch("SELECT logicalrelid::text AS name FROM pg_dist_partition")
        return [row["name"] for row in found]


# --- C.5: a COMMIT that takes long


@pytest.mark.parametrize("way", ["xid", "token", "ledger"])
async def test_a_commit_that_is_seen_to_be_at_work_is_waited_for_and_not_ended(
    world: World, way: str
) -> None:
    """Without a deadline: its backend is busy, so the answer is late and not lost, however long it takes."""
    tokens = CommitTokens() if way == "token" else None
    engine = with_bounds(world.engine(commit_tokens=tokens), answer=0.05, resolve=0.5)
    if tokens is not None:
        await engine.run(tokens.install)
    write = make_batch("copy_into", "item", COLUMNS)
    rows = [(n, "wait" if n == 3 else "fine") for n in range(10)]
    await world.outside.execute("SELECT pg_advisory_lock(7)")

    async def work() -> Any:
        if way == "ledger":
            return await ingest(engine, rows, write, size=10, workers=1, ledger=Ledger("events-1"))
        return await engine.run(write(rows), resolve_commit=True)

    task = asyncio.ensure_future(work())
    try:
        query = "SELECT last_value > 1 OR is_called FROM met"
        while not await world.outside.fetchval(query) and not task.done():
            await asyncio.sleep(0.01)
        backends = "SELECT array_agg(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        pids = await world.outside.fetchval(backends)
        # Many times the bound for an answer, and more than that for a look-up.
        await asyncio.sleep(1.0)
        assert not task.done()
        assert await world.outside.fetchval(backends) == pids
    finally:
        await world.outside.execute("SELECT pg_advisory_unlock(7)")
        result = await task
    assert (result.written, await world.stored()) == (10, list(range(10)))
    await until(lambda: engine.stats().in_use == 0)
    stats = engine.stats()
    assert (stats.commits_in_doubt, stats.evicted, stats.retries) == (0, 0, 0)
    assert world.seen.of(events.CommitResolved) == []
