"""A connection: what it is to us, whether it is gone, how it is thrown away, how long clean-up may take."""

from __future__ import annotations

import contextlib
from typing import Any, TypeAlias

import asyncpg

__all__ = ["CLEANUP_SECONDS", "GRACE_SECONDS", "Connection", "discard", "is_gone"]

Connection: TypeAlias = Any
"""What a body is given: an `asyncpg.Connection`, or the proxy that asyncpg's pool hands out for one."""

CLEANUP_SECONDS = 2.0
"""The longest that ROLLBACK, ROLLBACK TO or a release may take before the connection is thrown away."""
GRACE_SECONDS = 0.2
"""The same, once a deadline is over or a server did not keep its own timeout: it hangs, most likely."""


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
