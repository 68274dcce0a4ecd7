"""`CountingConnection`: a connection that counts the statements which are sent through it.

Outside of a transaction each statement commits by itself, so a body of several can't be started again once
one of them was done. The driver tells nobody of a COPY, so the calls themselves are counted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["CountingConnection"]

_STATEMENTS = frozenset(
    {
        "copy_from_query",
        "copy_from_table",
        "copy_records_to_table",
        "copy_to_table",
        "execute",
        "executemany",
        "fetch",
        "fetchmany",
        "fetchrow",
        "fetchval",
    }
)
# What they give sends statements of its own, which pass by here: as many as it wants.
_MANY = frozenset({"cursor", "prepare"})


class CountingConnection:
    """Stands for a connection: the same in all but that `sent` and `done` count."""

    __slots__ = ("_conn", "done", "sent")

    def __init__(self, conn: Any) -> None:
        self._conn = conn
        self.sent = 0
        """How many statements were sent."""
        self.done = 0
        """How many of them came to their end."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # What isinstance() goes by.
        return self._conn.__class__

    def __repr__(self) -> str:
        """As the connection's."""
        return repr(self._conn)

    def __getattr__(self, name: str) -> Any:
        """Give the connection's attribute; a method that sends a statement counts it."""
        found = getattr(self._conn, name)
        if name in _STATEMENTS:
            return self._counted(found)
        if name in _MANY:
            self.sent += 2
        return found

    def _counted(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def send(*args: Any, **kwargs: Any) -> Any:
            self.sent += 1
            result = await method(*args, **kwargs)
            self.done += 1
            return result

        return send
