"""Transactions that a crash or a fail-over loses: the table that shows it, and how their ids come to lie.

What was not flushed, or not sent to the standby, is lost; the server then gives the same transaction ids to
others, and ``pg_xact_status`` of a lost transaction says "committed". A look-up must not believe it.
"""

from __future__ import annotations

from typing import Any

from dbop_raw import CommitTokens, operation
from dbop_raw.testing.server import run_sql

__all__ = ["OURS", "TOKENS", "insert", "make_tables", "use_up"]

TOKENS = CommitTokens()
OURS = "who = 'ours'"
"""The rows that a test has written itself, for :func:`rows_of`."""


def make_tables(dsn: str) -> None:
    """Create table ``t`` and the table of commit tokens, on disk before anything can be lost."""
    run_sql(dsn, "CREATE TABLE t (id integer NOT NULL, who text NOT NULL)")
    run_sql(dsn, f"CREATE TABLE {TOKENS.table} (token uuid PRIMARY KEY, at timestamptz DEFAULT now())")
    run_sql(dsn, "CHECKPOINT")


@operation
async def insert(conn: Any, number: int) -> int:
    """Write a row of ours, and return its number."""
    result: int = await conn.fetchval("INSERT INTO t VALUES ($1, 'ours') RETURNING id", number)
    return result


def use_up(dsn: str, xid: int) -> None:
    """Commit transactions of others until one of them had the transaction id `xid`."""
    run_sql(
        dsn,
        "DO $$BEGIN FOR i IN 1..10000 LOOP INSERT INTO t VALUES (i, 'theirs'); COMMIT; "
        f"IF pg_snapshot_xmax(pg_current_snapshot()) > '{xid + 3}'::xid8 THEN RETURN; END IF; "
        "END LOOP; RAISE 'never got there'; END$$",
    )
