"""What is in a test's table, seen from outside of the engine and the proxy under test."""

from __future__ import annotations

from collections import Counter

import asyncpg

__all__ = ["rows_of"]


async def rows_of(dsn: str, where: str = "true") -> Counter[int]:
    """Return how often each `id` is in table ``t``.

    Args:
        dsn: Past any proxy.
        where: SQL; which rows count.

    """
    connection = await asyncpg.connect(dsn, ssl=False)
    try:
        return Counter(row["id"] for row in await connection.fetch(f"SELECT id FROM t WHERE {where}"))
    finally:
        await connection.close()
