"""The event loops that the core is tested on: asyncio's, the same in debug mode, and uvloop."""

from __future__ import annotations

import pytest

__all__ = ["ASYNCIO", "LOOPS"]

ASYNCIO = "asyncio"

# By anyio's names of backends; asyncpg knows no other framework than asyncio. Only the first runs in --quick.
LOOPS = [
    pytest.param((ASYNCIO, {}), id="asyncio"),
    pytest.param((ASYNCIO, {"debug": True}), id="debug", marks=pytest.mark.slow),
    pytest.param((ASYNCIO, {"use_uvloop": True}), id="uvloop", marks=pytest.mark.slow),
]
