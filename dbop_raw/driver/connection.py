"""A connection as the rooms above see it: its type, whether it is closed, how it is thrown away."""

from __future__ import annotations

import contextlib
from typing import Any, TypeAlias

import asyncpg

__all__ = ["Connection", "discard", "is_customised", "is_gone"]

Connection: TypeAlias = Any
"""What a body is given: an `asyncpg.Connection`, or the proxy that asyncpg's pool hands out for one."""


def is_gone(conn: Connection) -> bool:
    """Return whether the connection is closed.

    A pool's proxy raises `InterfaceError` once the pool has taken a lost connection back; that counts as
    closed.

    Args:
        conn: A connection, or a pool's proxy for one.
    """
    try:
        return bool(conn.is_closed())
    except asyncpg.InterfaceError:
        return True


def discard(conn: Connection) -> None:
    """Close the connection at once, without a message to the server and without waiting.

    The server rolls back whatever was open. Does nothing when the connection is closed already.

    Args:
        conn: A connection, or a pool's proxy for one.
    """
    with contextlib.suppress(asyncpg.InterfaceError):
        conn.terminate()


def is_customised(conn: Connection) -> bool:
    """Is it of a class of the user's own (`connection_class=`) that sends statements its own way?"""
    kind = type(getattr(conn, "_con", conn))
    return issubclass(kind, asyncpg.Connection) and kind.execute is not asyncpg.Connection.execute
