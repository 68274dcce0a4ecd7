"""Handing a connection from one user of a pool to the next, as the pool would, without going through it.

asyncpg's pool serves its callers out of order (its issue 1247), and giving back and taking again costs both
sides. What the pool does at that point is done here: it resets the session, and gives out a new proxy, so
that whoever kept the old one can't touch what is not his any more.

These are the driver's private names, which it may change: where one is missing nothing is handed over, and
the pool does it its own way. `tests/integration/driver/test_handover.py` holds them against the driver.
"""

from __future__ import annotations

from typing import Any

__all__ = ["can_hand_over", "hand_over"]


def can_hand_over(pool: Any) -> bool:
    """Does the pool do no more between two users than resetting the session in the driver's own way?

    A pool with a `setup=` or a `reset=` of its user's own does: it has to be asked.

    Args:
        pool: An asyncpg pool.
    """
    return getattr(pool, "_setup", _MISSING) is None and getattr(pool, "_reset", _MISSING) is None


_MISSING = object()


def _is_to_be_closed(holder: Any) -> bool:
    """Would the pool close it now, since it was expired or the pool is closing?"""
    pool = getattr(holder, "_pool", None)
    if pool is None or pool.is_closing():
        return True
    generation: Any = getattr(holder, "_generation", _MISSING)
    return generation is _MISSING or generation != getattr(pool, "_generation", None)


async def hand_over(conn: Any, seconds: float) -> Any:
    """Reset the session of `conn`, and give the same connection behind a new proxy.

    Args:
        conn: What the pool gave out; useless from now on.
        seconds: The longest that it may take.

    Returns:
        The connection for the next user; None where the pool has to do it, which still can.

    Raises:
        Exception: The session could not be reset. The connection has to be thrown away.
    """
    holder: Any = getattr(conn, "_holder", None)
    connection: Any = getattr(conn, "_con", None)
    if holder is None or not hasattr(connection, "_on_release") or not hasattr(conn, "_detach"):
        return None
    current: Any = getattr(holder, "_proxy", None)
    if current is not conn or _is_to_be_closed(holder):
        return None
    # Warns of listeners that were left, and invalidates cursors and prepared statements that were kept.
    connection._on_release()  # noqa: SLF001 - see the module
    await connection.reset(timeout=seconds)
    # That may have come meanwhile.
    if _is_to_be_closed(holder) or conn._detach() is None:  # noqa: SLF001
        return None
    holder._proxy = proxy = type(conn)(holder, connection)  # noqa: SLF001
    return proxy
