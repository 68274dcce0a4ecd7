"""A pool whose connection answers at once: what is left to measure is Python."""

from __future__ import annotations

from typing import Any, cast

import asyncpg

__all__ = ["InstantConnection", "InstantPool", "instant_pool"]


class InstantConnection:
    """As much of a connection as an operation needs: it knows BEGIN and COMMIT, and runs nothing."""

    def __init__(self) -> None:
        self._in_transaction = False

    async def execute(self, query: str, *args: object) -> str:
        """The tag of the last command."""
        del args
        if query.startswith("BEGIN"):
            self._in_transaction = True
        elif query in {"COMMIT", "ROLLBACK"}:
            self._in_transaction = False
        return query

    def is_in_transaction(self) -> bool:
        """Between BEGIN and COMMIT."""
        return self._in_transaction

    def is_closed(self) -> bool:
        """Never."""
        return False

    def terminate(self) -> None:
        """Nothing to do."""


class InstantPool:
    """A pool of one connection, always free."""

    def __init__(self) -> None:
        self._conn = InstantConnection()

    async def acquire(self) -> InstantConnection:
        """The connection."""
        return self._conn

    async def release(self, connection: InstantConnection, *, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Nothing to do."""

    async def expire_connections(self) -> None:
        """Nothing to do."""

    def get_size(self) -> int:
        """One."""
        return 1

    def get_idle_size(self) -> int:
        """One."""
        return 1

    def get_max_size(self) -> int:
        """One."""
        return 1


def instant_pool() -> asyncpg.Pool[Any]:
    """An `InstantPool`, as an engine takes it."""
    return cast("asyncpg.Pool[Any]", InstantPool())
