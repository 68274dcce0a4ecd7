"""A connection: what it is to us, whether it is gone, how it is thrown away."""

from __future__ import annotations

import contextlib
from typing import Any, TypeAlias

import asyncpg

__all__ = ["Connection", "discard", "is_customised", "is_gone"]

Connection: TypeAlias = Any
"""What a body is given: an `asyncpg.Connection`, or the proxy that asyncpg's pool hands out for one."""


def is_gone(conn: Connection) -> bool:
    """Is the connection closed? A pool's proxy can't be asked once the pool has taken a lost one back."""
    try:
        return bool(conn.is_closed())
    except asyncpg.InterfaceError:
        return True


def discard(conn: Connection) -> None:
    """Throw the connection away, at once; nothing where that has happened already."""
    with contextlib.suppress(asyncpg.InterfaceError):
        conn.terminate()


def is_customised(conn: Connection) -> bool:
    """Is it of a class of the user's own (`connection_class=`) that sends statements its own way?"""
    kind = type(getattr(conn, "_con", conn))
    return issubclass(kind, asyncpg.Connection) and kind.execute is not asyncpg.Connection.execute
