"""A migration is never held up by a batch that is over: nothing of ours depends on what is the user's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest

from dbop_raw import Engine, batch
from dbop_raw.testing import Server
from tests.support.batching import ROW_WRITERS, as_items, make_writer, told

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

COLUMNS = ("id", "must", "mood", "small", "tag")
SCHEMA = (
    "DROP EXTENSION IF EXISTS ltree CASCADE",
    "DROP SCHEMA IF EXISTS app CASCADE",
    "CREATE SCHEMA app",
    "CREATE EXTENSION ltree SCHEMA app",
    "CREATE TYPE app.mood AS ENUM ('ok', 'sad')",
    "CREATE DOMAIN app.small AS int CHECK (VALUE < 100)",
    "CREATE TABLE app.land (id int PRIMARY KEY)",
    """
    CREATE TABLE app.t (
        id int PRIMARY KEY, must int NOT NULL, mood app.mood, small app.small, tag app.ltree,
        land int REFERENCES app.land
    )
    """,
)

MIGRATIONS: dict[str, Sequence[str]] = {
    "drop an enum": ("ALTER TABLE app.t DROP mood", "DROP TYPE app.mood"),
    "replace an enum": (
        "ALTER TYPE app.mood RENAME TO mood_old",
        "CREATE TYPE app.mood AS ENUM ('ok', 'glad')",
        "ALTER TABLE app.t ALTER mood TYPE app.mood USING mood::text::app.mood",
        "DROP TYPE app.mood_old",
    ),
    "drop a domain": ("ALTER TABLE app.t ALTER small TYPE int", "DROP DOMAIN app.small"),
    "tighten a domain": ("ALTER DOMAIN app.small ADD CHECK (VALUE > -1000)",),
    "drop an extension": ("ALTER TABLE app.t DROP tag", "DROP EXTENSION ltree"),
    "move an extension": ("ALTER EXTENSION ltree SET SCHEMA public",),
    "alter a column": ("ALTER TABLE app.t ALTER must TYPE bigint", "ALTER TABLE app.t ALTER id TYPE bigint"),
    "drop a column": ("ALTER TABLE app.t DROP must",),
    "rename a column": ("ALTER TABLE app.t RENAME must TO need",),
    "add a constraint": ("ALTER TABLE app.t ADD CHECK (must < 1000)", "CREATE INDEX ON app.t (must)"),
    "drop the table": ("DROP TABLE app.t",),
    "truncate the table": ("TRUNCATE app.t",),
    "drop its parent": ("ALTER TABLE app.t DROP land", "DROP TABLE app.land"),
    "drop the schema": (
        "DROP TABLE app.t, app.land",
        "DROP TYPE app.mood",
        "DROP DOMAIN app.small",
        "DROP EXTENSION ltree",
        "DROP SCHEMA app",
    ),
    "drop the role's rights": ("REVOKE ALL ON app.t FROM PUBLIC",),
}

# What depends on an object of the schema, and lives in a schema of a session's own.
DEPENDENTS = """
    SELECT d.classid::regclass::text AS what, pg_describe_object(d.classid, d.objid, d.objsubid) AS whose,
        pg_describe_object(d.refclassid, d.refobjid, d.refobjsubid) AS upon
    FROM pg_depend d
    WHERE split_part(pg_describe_object(d.classid, d.objid, d.objsubid), 'pg_temp', 2) <> ''
    AND (d.refobjid IN (SELECT oid FROM pg_type WHERE typnamespace = 'app'::regnamespace)
        OR d.refobjid IN (SELECT oid FROM pg_class WHERE relnamespace = 'app'::regnamespace)
        OR d.refobjid IN (SELECT oid FROM pg_extension WHERE extname = 'ltree'))
"""


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    yield dsn
    postgres_server.drop_database(dsn)


@dataclass
class Scene:
    engine: Engine
    migration: Any


@asynccontextmanager
async def scene_on(dsn: str) -> AsyncIterator[Scene]:
    """A pool that has written, and stays open; and the session of a migration, which waits for nobody."""
    migration = await asyncpg.connect(dsn, server_settings={"lock_timeout": "2000"})
    try:
        for statement in SCHEMA:
            await migration.execute(statement)
        async with Engine.open(dsn, min_size=0, max_size=2) as engine:
            yield Scene(engine, migration)
    finally:
        await migration.close()


def app_batch(writer: str) -> Any:
    # There is no binary form of an ltree in the driver.
    columns = COLUMNS[:4] if writer == "copy_into" else COLUMNS
    return batch(make_writer(writer, "t", columns, schema="app"))


def rows_of(writer: str, bad_one_in: int) -> list[Any]:
    rows: list[tuple[Any, ...]] = [
        (n, None if n % bad_one_in == 1 else n, "ok", n % 100, "a.b") for n in range(200)
    ]
    return [row[:4] for row in rows] if writer == "copy_into" else as_items(writer, rows)


async def write_all(scene: Scene, writer: str) -> None:
    """Batches of each kind: clean, with few bad rows, with many, and one whose transaction is rolled back."""
    write = app_batch(writer)
    for bad_one_in in (1000, 100, 3, 2, 2):
        await scene.migration.execute("TRUNCATE app.t")
        result = await scene.engine.run(write(rows_of(writer, bad_one_in)))
        assert told(result) == [(n, "23502") for n in range(200) if n % bad_one_in == 1]
    await scene.migration.execute("TRUNCATE app.t")

    async def fails(conn: Any) -> None:
        await write(rows_of(writer, 2))(conn)
        raise LookupError

    with pytest.raises(LookupError):
        await scene.engine.run(fails)
    await scene.engine.run(write(rows_of(writer, 2)))


@pytest.mark.parametrize("name", MIGRATIONS)
@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_a_migration_goes_through_while_the_pool_is_open(database: str, writer: str, name: str) -> None:
    async with scene_on(database) as scene:
        await write_all(scene, writer)
        for statement in MIGRATIONS[name]:
            await scene.migration.execute(statement)
        assert scene.engine.stats().size > 0


@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_between_batches_nothing_of_a_session_depends_on_what_is_the_users(
    database: str, writer: str
) -> None:
    async with scene_on(database) as scene:
        await write_all(scene, writer)
        assert await scene.migration.fetch(DEPENDENTS) == []


@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_batches_do_not_fill_the_catalogs(database: str, writer: str) -> None:
    """What one batch leaves is used by the next.

    Making it anew each time would fill the catalogs with dead rows.

    Whatever is made in a catalog takes a number, and so does a large object: the numbers between two were
    taken.
    """
    async with scene_on(database) as scene:
        write = app_batch(writer)

        async def run(times: int) -> int:
            first: int = await scene.migration.fetchval("SELECT lo_create(0)")
            for _ in range(times):
                await scene.migration.execute("DELETE FROM app.t")
                result = await scene.engine.run(write(rows_of(writer, 3)))
                assert len(result.failed) == 67
            last: int = await scene.migration.fetchval("SELECT lo_create(0)")
            return last - first - 1

        await run(5)
        assert await run(40) < 20


@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_a_batch_goes_on_after_a_migration(database: str, writer: str) -> None:
    """The same batch object and the same connections, with an enum that is another one now."""
    async with scene_on(database) as scene:
        await write_all(scene, writer)
        await scene.migration.execute("TRUNCATE app.t")
        for statement in MIGRATIONS["replace an enum"]:
            await scene.migration.execute(statement)
        write = app_batch(writer)
        for bad_one_in in (1000, 3):
            await scene.migration.execute("TRUNCATE app.t")
            rows = [(*row[:2], "glad", *row[3:]) for row in rows_of(writer, bad_one_in)]
            result = await scene.engine.run(write(rows))
            assert told(result) == [(n, "23502") for n in range(200) if n % bad_one_in == 1]
