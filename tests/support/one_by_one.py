"""The judge over batches, which writes each row by itself; and the histories that decide a batch's way.

The judge writes one row after another with bare asyncpg, each in a savepoint of its own, by what the writer
does for a single row: COPY of that row, or `execute`. What a batch stores and whom it blames must be the
same, whatever way it took. Which way that is depends on what the batch has measured before, so each batch
runs with each of `HISTORIES`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

import asyncpg

from dbop_raw import Batch, Engine, classify
from tests.support.batching import insert_of

__all__ = [
    "HISTORIES",
    "Blamed",
    "Engines",
    "History",
    "Init",
    "Row",
    "engines_on",
    "name_of",
    "one_by_one",
    "teach",
    "write_alone",
]

Row = Sequence[Any]
Init = Callable[[Any], Awaitable[None]]

History = Literal["nothing known", "many were bad", "few were bad", "nothing temporary"]
HISTORIES: tuple[History, ...] = ("nothing known", "many were bad", "few were bad", "nothing temporary")
"""What a batch has seen before; with "nothing temporary" its role has no TEMP privilege, so that only spans
are left."""


# --- what a writer does for one row

_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def _line(row: Row) -> bytes:
    if not all(value is None or isinstance(value, str) for value in row):
        raise TypeError(row)
    return ("\t".join("\\N" if v is None else v.translate(_ESCAPES) for v in row) + "\n").encode()


async def write_alone(conn: Any, writer: str, table: str, columns: Sequence[str], row: Row) -> None:
    """What the writer does for a single row, by the driver alone."""
    if writer == "execute_many":
        await conn.execute(insert_of(table, columns), *row)
    elif writer == "copy_into":
        await conn.copy_records_to_table(table, columns=columns, records=[row])
    else:
        await conn.copy_to_table(table, columns=columns, source=memoryview(_line(row)), encoding="UTF8")


# --- the judge

Blamed = list[tuple[int, str]]
"""Which rows failed, and by what: the SQLSTATE, or the exception's name where the client found it."""


def name_of(error: Exception) -> str:
    """As a failure is compared."""
    return classify(error).sqlstate or type(error).__name__


async def one_by_one(
    conn: Any, writer: str, table: str, columns: Sequence[str], rows: Sequence[Row]
) -> Blamed:
    """Write each row in a savepoint of its own, in order."""
    blamed: Blamed = []
    async with conn.transaction():
        await conn.execute("SAVEPOINT judge")
        for index, row in enumerate(rows):
            try:
                await write_alone(conn, writer, table, columns, row)
            except Exception as exc:  # noqa: BLE001 - whatever it is, it is what this row gets
                blamed.append((index, name_of(exc)))
                await conn.execute("ROLLBACK TO SAVEPOINT judge")
            else:
                await conn.execute("RELEASE SAVEPOINT judge; SAVEPOINT judge")
    return blamed


# --- the histories


async def teach(
    engine: Engine, write: Batch[Any, Any], history: History, row: Callable[[int, bool], Row]
) -> None:
    """Let the batch measure what will decide its way.

    Args:
        engine: Where it writes what it learns from.
        write: The batch.
        history: What it is to have seen.
        row: Gives the row of a number, good or bad.
    """
    for bad_one_in, count in {"many were bad": [(2, 64)] * 2, "few were bad": [(100, 600)]}.get(history, []):
        await engine.run(write([row(n, n % bad_one_in != 1) for n in range(count)]))


class Engines:
    """An engine for each role and each `init`, made when it is first asked for."""

    def __init__(self, dsn: str, stack: AsyncExitStack, no_temp: str) -> None:
        self._dsn = dsn
        self._stack = stack
        self._no_temp = no_temp
        self._made: dict[tuple[Init | None, bool], Engine] = {}

    async def get(self, history: History, init: Init | None = None) -> Engine:
        """Return the engine for a history; `init` prepares its connections (codecs)."""
        temporary = history != "nothing temporary"
        engine = self._made.get((init, temporary))
        if engine is None:
            settings = {} if temporary else {"role": self._no_temp}
            opening = Engine.open(self._dsn, min_size=0, max_size=2, init=init, server_settings=settings)
            engine = self._made[init, temporary] = await self._stack.enter_async_context(opening)
        return engine


@asynccontextmanager
async def engines_on(dsn: str) -> AsyncIterator[Engines]:
    """Engines on one database, and a role there that may make nothing temporary."""
    role = "no_temp_of_" + dsn.rpartition("/")[2]
    conn = await asyncpg.connect(dsn)
    try:
        await conn.execute(
            f"CREATE ROLE {role}; REVOKE TEMP ON DATABASE {dsn.rpartition('/')[2]} FROM PUBLIC"
        )
        await conn.execute(f"GRANT ALL ON SCHEMA public TO {role}")
        await conn.execute(f"ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {role}")
        await conn.execute(f"ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO {role}")
        async with AsyncExitStack() as stack:
            yield Engines(dsn, stack, role)
        await conn.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    finally:
        await conn.close()
