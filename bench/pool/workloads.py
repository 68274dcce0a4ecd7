"""What is measured: each workload makes its tables, and its requests one by one.

All built-in tables are in a schema of their own, which is dropped at the end.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from bench.pool.errors import BadOption
from dbop_raw import batch, copy_into, operation
from dbop_raw.driver import sql
from dbop_raw.driver.connection import Connection
from dbop_raw.pipeline.operation import AnyOperation

__all__ = ["BUILT_IN", "SCHEMA", "Request", "Workload", "nothing", "prepare_schema", "remove_schema"]

SCHEMA = "dbop_raw_bench_pool"
# What makes the schema ours: one that has another comment, or none, is not touched.
MARK = "made by dbop_raw's bench pool; it may be dropped"
ROWS = 10_000
CHUNK = 500


@dataclass(frozen=True, slots=True)
class Request:
    """One piece of work, for the engine and for plain asyncpg."""

    operation: AnyOperation[Any]
    """For `engine.run`."""
    bare: Callable[[Connection], Awaitable[Any]]
    """The same SQL, on a connection of `pool.acquire()`."""
    transaction: bool
    """In one transaction (`conn.transaction()` in plain asyncpg), else each statement by itself."""


async def nothing(conn: Connection) -> None:
    """Do nothing: a workload that needs no tables, or none cleared."""
    _ = conn


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of request."""

    name: str
    description: str
    make: Callable[[random.Random], Request]
    """Make the next request; the same random numbers make the same one."""
    setup: Callable[[Connection], Awaitable[None]] = nothing
    """Once, before all."""
    clear: Callable[[Connection], Awaitable[None]] = nothing
    """Before each measurement, outside a transaction: what the one before it left must not slow this one."""


# --- built in

_READ = f"SELECT body FROM {SCHEMA}.accounts WHERE id = $1"
_WRITE = f"UPDATE {SCHEMA}.accounts SET balance = balance + $2 WHERE id = $1"


async def _read(conn: Connection, key: int) -> str:
    body: str = await conn.fetchval(_READ, key)
    return body


async def _write(conn: Connection, key: int, amount: int) -> str:
    tag: str = await conn.execute(_WRITE, key, amount)
    return tag


read_account, write_account = operation(_read), operation(_write)


def _point_read(rng: random.Random) -> Request:
    key = rng.randrange(ROWS)
    return Request(read_account(key), lambda conn: _read(conn, key), transaction=False)


def _short_write(rng: random.Random) -> Request:
    key, amount = rng.randrange(ROWS), rng.randint(-100, 100)
    return Request(write_account(key, amount), lambda conn: _write(conn, key, amount), transaction=True)


def _mixed(rng: random.Random) -> Request:
    return _short_write(rng) if rng.random() < 0.2 else _point_read(rng)


_COLUMNS = ("id", "body")
_copy_events = batch(copy_into("events", columns=_COLUMNS, schema=SCHEMA))


def _ingest(rng: random.Random) -> Request:
    first = rng.getrandbits(40)
    rows = [(first + number, "an event of a middling length, as they come") for number in range(CHUNK)]

    def bare(conn: Connection) -> Awaitable[Any]:
        copied: Awaitable[Any] = conn.copy_records_to_table(
            "events", schema_name=SCHEMA, columns=_COLUMNS, records=rows
        )
        return copied

    return Request(_copy_events(rows), bare, transaction=True)


async def _accounts(conn: Connection) -> None:
    await conn.execute(
        f"CREATE TABLE {SCHEMA}.accounts (id int PRIMARY KEY, balance bigint NOT NULL, body text NOT NULL) "
        "WITH (fillfactor = 50);"
        f"INSERT INTO {SCHEMA}.accounts SELECT n, 0, 'account ' || n || repeat(' ', 80) "
        f"FROM generate_series(0, {ROWS - 1}) n"
    )


async def _vacuum(conn: Connection) -> None:
    await conn.execute(f"VACUUM ANALYZE {SCHEMA}.accounts")


async def _events(conn: Connection) -> None:
    await conn.execute(f"CREATE TABLE {SCHEMA}.events (id bigint NOT NULL, body text NOT NULL)")


async def _truncate(conn: Connection) -> None:
    await conn.execute(f"TRUNCATE {SCHEMA}.events")


BUILT_IN = {
    one.name: one
    for one in (
        Workload(
            "point-read",
            f"one row of {ROWS:,} by its primary key, no transaction",
            _point_read,
            _accounts,
            _vacuum,
        ),
        Workload(
            "short-write",
            f"one row of {ROWS:,} updated, in a transaction",
            _short_write,
            _accounts,
            _vacuum,
        ),
        Workload("mixed", "80 % point-read, 20 % short-write", _mixed, _accounts, _vacuum),
        Workload("ingest", f"{CHUNK} rows by COPY, in a transaction", _ingest, _events, _truncate),
    )
}


async def prepare_schema(conn: Connection) -> None:
    """Make the schema, empty. Raises `BadOption` where somebody else's has that name."""
    comment = await conn.fetchrow(
        "SELECT pg_catalog.obj_description(oid, 'pg_namespace') AS mark FROM pg_catalog.pg_namespace "
        "WHERE nspname = $1",
        SCHEMA,
    )
    if comment is not None and comment["mark"] != MARK:
        raise BadOption(f"the database has a schema {SCHEMA} that this benchmark did not make: drop it first")
    await remove_schema(conn)
    await conn.execute(f"CREATE SCHEMA {SCHEMA}; COMMENT ON SCHEMA {SCHEMA} IS {sql.literal(MARK)}")


async def remove_schema(conn: Connection) -> None:
    """Drop it, with what is in it; nothing where it is gone."""
    await conn.execute(f"SET client_min_messages = warning; DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")
