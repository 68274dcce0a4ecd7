"""The sessions of a server, seen and ended from outside."""

from __future__ import annotations

from typing import Any

import asyncpg

from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql
from tests.support.bodies import AS_NEW

__all__ = ["as_new", "backend", "is_running", "others", "terminate"]

_OTHERS = (
    "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
    "AND backend_type = 'client backend'"
)


def is_running(server: Server) -> bool:
    """Tell whether a server answers."""
    try:
        run_sql(server.dsn, "SELECT 1", wait=5)
    except OSError:
        return False
    return True


def others(dsn: str) -> int:
    """Count the sessions of a database. The server notices late that a client is gone."""
    found: int = run_sql(dsn, f"SELECT count(*) {_OTHERS}")
    return found


async def as_new(dsn: str) -> None:
    """End the sessions that an earlier test left in a database, and empty its tables (of `bodies`)."""
    conn = await asyncpg.connect(dsn)
    try:
        await conn.execute(f"SELECT pg_terminate_backend(pid, 5000) {_OTHERS}; {AS_NEW}")
    finally:
        await conn.close()


async def terminate(dsn: str, pid: int) -> None:
    """End a session, from another one, and wait until it is gone."""
    conn = await asyncpg.connect(dsn)
    try:
        assert await conn.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)
    finally:
        await conn.close()


async def backend(conn: Any) -> int:
    """An operation: which process of the server has this connection."""
    pid: int = await conn.fetchval("SELECT pg_backend_pid()")
    return pid
