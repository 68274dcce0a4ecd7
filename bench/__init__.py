"""Benchmarks, each beside its baseline: `python -m bench --help`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

ROOT = Path(__file__).resolve().parent.parent


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[Any]:
    """A connection of asyncpg, closed at the end."""
    conn = await asyncpg.connect(dsn)
    try:
        yield conn
    finally:
        await conn.close()
