"""The ways that a batch can take, and the judge over them: each row written by itself.

The judge writes one row after another with bare asyncpg, each in a savepoint of its own, by what the writer
does for a single row: COPY of that row, or `execute`. What a batch stores and whom it blames must be the
same, whatever way it took; and which way that is depends on what it learned before. So each batch runs in
each of `WAYS`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

import asyncpg

from dbop_raw import Batch, Engine, classify
from tests.support.batching import insert_of

__all__ = [
    "WAYS",
    "Blamed",
    "Engines",
    "Init",
    "Row",
    "Way",
    "engines_on",
    "name_of",
    "one_by_one",
    "teach",
    "write_alone",
]

Row = Sequence[Any]
Init = Callable[[Any], Awaitable[None]]

Way = Literal["nothing known", "many were bad", "few were bad", "nothing temporary"]
WAYS: tuple[Way, ...] = ("nothing known", "many were bad", "few were bad", "nothing temporary")
"""What a batch has seen before, and `nothing temporary`.

A role without the TEMP privilege, for which only spans are left.
"""


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


# --- the ways


async def teach(engine: Engine, write: Batch[Any, Any], way: Way, row: Callable[[int, bool], Row]) -> None:
    """Let the batch learn what decides its way.

    There is no switch for that: it goes by what it measured. `row(n, good)` gives a row for it.
    """
    for bad_one_in, count in {"many were bad": [(2, 64)] * 2, "few were bad": [(100, 600)]}.get(way, []):
        await engine.run(write([row(n, n % bad_one_in != 1) for n in range(count)]))


class Engines:
    """An engine for each way of making connections; made when it is asked for."""

    def __init__(self, dsn: str, stack: AsyncExitStack, no_temp: str) -> None:
        self._dsn = dsn
        self._stack = stack
        self._no_temp = no_temp
        self._made: dict[tuple[Init | None, bool], Engine] = {}

    async def get(self, way: Way, init: Init | None = None) -> Engine:
        """The engine for a way; `init` prepares its connections (codecs)."""
        temporary = way != "nothing temporary"
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
