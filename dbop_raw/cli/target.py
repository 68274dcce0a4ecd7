"""Where an ingest writes to: the server by its DSN, the table and its columns; and what is wrong with them.

No message here shows a password, nor any part of a DSN that may be one.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import asyncpg

from dbop_raw.driver import sql
from dbop_raw.driver.connection import Connection
from dbop_raw.driver.dsn import UNREADABLE
from dbop_raw.engine.engine import Engine

__all__ = ["Target", "TargetError", "connect", "near", "server_name"]

# Seconds to wait for a server to answer, and for a connection that all workers wait for.
CONNECT_SECONDS = 15.0
DSN_VARIABLE = "DATABASE_URL"
# How many names a message lists.
_MANY = 30


class TargetError(Exception):
    """The server, the table or a column is not there; the message is one sentence for a person."""


@dataclass(frozen=True, slots=True)
class Target:
    """A table, as the server knows it."""

    table: str
    schema: str | None
    columns: tuple[str, ...]
    """What can be written."""
    generated: frozenset[str]
    """What the server computes by itself."""

    @property
    def name(self) -> str:
        """As SQL writes it."""
        return sql.relation(self.table, self.schema)

    @staticmethod
    async def find(conn: Connection, table: str, schema: str | None) -> Target:
        """Look a table up: an operation.

        Args:
            conn: The operation's connection.
            table: Its name, as it is.
            schema: Its schema; None: by the search_path.

        Raises:
            TargetError: There is none; the message has near names.
        """
        oid = await conn.fetchval(
            "SELECT pg_catalog.to_regclass($1)::pg_catalog.oid", sql.relation(table, schema)
        )
        if oid is None:
            raise TargetError(await _no_table(conn, table, schema))
        rows = await conn.fetch(
            "SELECT attname, attgenerated <> ''::\"char\" AS generated FROM pg_catalog.pg_attribute "
            "WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            oid,
        )
        columns = tuple(row["attname"] for row in rows if not row["generated"])
        return Target(table, schema, columns, frozenset(row["attname"] for row in rows if row["generated"]))

    def check(self, columns: Sequence[str]) -> None:
        """Make sure that columns can be written.

        Args:
            columns: Their names.

        Raises:
            TargetError: One is not there, is generated, or is named twice.
        """
        for name in columns:
            if name in self.generated:
                raise TargetError(
                    f"column {name!r} of {self.name} is generated, so it can't be written: "
                    "name the others with --columns"
                )
            if name not in self.columns:
                raise TargetError(
                    f"table {self.name} has no column {name!r}{near(name, self.columns)}; its columns: "
                    f"{', '.join(self.columns)}"
                )
            if columns.count(name) > 1:
                raise TargetError(f"column {name!r} is named twice")


async def _no_table(conn: Connection, table: str, schema: str | None) -> str:
    rows = await conn.fetch(
        "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n "
        "ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p', 'v', 'f') "
        "AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_' ORDER BY 1, 2"
    )
    pairs = [(row["nspname"], row["relname"]) for row in rows]
    message = f"there is no table {sql.relation(table, schema)}"
    for its_schema, its_table in pairs:
        # A name with a dot, or the right name in a schema that the search_path does not have.
        if f"{its_schema}.{its_table}" == table or (its_table == table and its_schema != schema):
            return f"{message}: did you mean --schema {its_schema} --table {its_table}?"
    names = sorted({name for _, name in pairs})
    found = near(table, names)
    if found or not names:
        return f"{message}{found or ', nor any other in this database'}"
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return f"{message}; the tables here: {', '.join(names[:_MANY])}{more}"


def near(name: str, names: Sequence[str]) -> str:
    """Give ` (did you mean 'x'?)` where some of `names` are like `name`, else nothing."""
    lower = {other.lower(): other for other in names}
    found = difflib.get_close_matches(name.lower(), lower, n=3)
    return f" (did you mean {' or '.join(repr(lower[one]) for one in found)}?)" if found else ""


def server_name(dsn: str | None) -> str:
    """Give what a message may say of a server: user, host, port and database, and never a password."""
    if dsn is None:
        named = f"{os.environ.get('PGHOST', 'this machine')}, port {os.environ.get('PGPORT', '5432')}"
        return f"{named} (there is no --dsn and no {DSN_VARIABLE}, so by PGHOST and PGPORT or as usual)"
    try:
        parts = urlsplit(dsn)
        place = (parts.hostname or "") + (f":{parts.port}" if parts.port else "")
    except ValueError:
        return "the server of the DSN"
    if parts.scheme not in {"postgresql", "postgres"}:
        return "the server of the DSN"
    # A password with a slash, "?" or "#" ends up behind the host, with the "@" that should have ended it.
    if "@" in parts.path + parts.query + parts.fragment:
        return "the server of the DSN"
    user = f"{parts.username}@" if parts.username else ""
    return f"{parts.scheme}://{user}{place}{parts.path}"


@contextlib.asynccontextmanager
async def connect(dsn: str | None, *, connections: int) -> AsyncIterator[Engine]:
    """Open an engine.

    Args:
        dsn: Where to; None: the environment's DATABASE_URL, else libpq's PG* variables.
        connections: How many it may open.

    Yields:
        The engine.

    Raises:
        TargetError: It can't connect.
    """
    dsn = dsn or os.environ.get(DSN_VARIABLE) or None
    async with contextlib.AsyncExitStack() as stack:
        try:
            engine = await stack.enter_async_context(
                Engine.open(
                    dsn,
                    acquire_timeout=CONNECT_SECONDS,
                    min_size=1,
                    max_size=connections,
                    timeout=CONNECT_SECONDS,
                    server_settings={"application_name": "dbop-raw"},
                )
            )
        except (OSError, OverflowError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as exc:
            raise TargetError(_cannot_connect(dsn, exc)) from None
        yield engine


def _cannot_connect(dsn: str | None, exc: Exception) -> str:
    if dsn and isinstance(exc, ValueError) and not isinstance(exc, (asyncpg.InterfaceError, UnicodeError)):
        # Whatever found it: its own text may quote a part of the password.
        return UNREADABLE
    if isinstance(exc, TimeoutError):
        return f"no connection to {server_name(dsn)}: no answer within {CONNECT_SECONDS:g} s"
    what = str(exc).partition("\n")[0] or type(exc).__name__
    return f"no connection to {server_name(dsn)}: {what}"
