"""Errors on demand: made as the protocol brings them, or raised by a real server under any code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

__all__ = ["lost_line", "raise_sql", "raising", "server_error"]


def server_error(code: str, severity: str = "ERROR", **fields: str) -> asyncpg.PostgresError:
    """Return an error as asyncpg makes it of the protocol's; a new one each time.

    Its severity and message are in another language, as they may be: only V (untranslated) and C count.

    Args:
        code: SQLSTATE.
        severity: ERROR, FATAL or PANIC.
        fields: More fields of the ErrorResponse, by their letter.

    """
    return asyncpg.PostgresError.new({"S": "ФАТАЛ", "V": severity, "C": code, "M": "сообщение", **fields})


def lost_line(cause: BaseException | None = None) -> asyncpg.PostgresError:
    """Return what asyncpg raises when the line goes in the middle of a command.

    Args:
        cause: The server's last words, if it had any.

    """
    error = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
    error.__cause__ = cause
    return error


def raise_sql(code: str) -> str:
    """Return a statement that a server refuses with this SQLSTATE, on a connection that is well."""
    return f"DO $$ BEGIN RAISE EXCEPTION 'of the test' USING ERRCODE = '{code}'; END $$"


def raising(code: str) -> Callable[[Any], Awaitable[None]]:
    """Return an operation whose one statement the server refuses with this SQLSTATE."""

    async def raises(conn: Any) -> None:
        await conn.execute(raise_sql(code))

    return raises
