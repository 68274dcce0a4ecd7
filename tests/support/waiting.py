"""Waiting for what has no event: asked again and again, and bounded, so that a hang is a failure."""

# ruff: noqa: ASYNC110 - only asking again can tell

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import anyio
import asyncpg

__all__ = ["Together", "until", "until_gone", "until_in_thread"]


async def until(happened: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until `happened()` is true; at most `seconds`, for what ought to take no time.

    Raises:
        TimeoutError: It did not happen.

    """
    with anyio.fail_after(seconds):
        while not happened():
            await anyio.sleep(0.002)


def until_in_thread(happened: Callable[[], Any], seconds: float = 20.0) -> None:
    """Block until `happened()` is true, for a test without an event loop.

    Raises:
        TimeoutError: It did not happen.

    """
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not happen within {seconds:g} s")
        time.sleep(0.01)


async def until_gone(dsn: str, pid: int) -> None:
    """Wait until the server has no such process."""
    conn = await asyncpg.connect(dsn)
    try:
        with anyio.fail_after(5):
            while await conn.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid):
                await anyio.sleep(0.005)
    finally:
        await conn.close()


class Together:
    """A barrier that is passed once: nobody goes on before `count` are here; afterwards nobody waits."""

    def __init__(self, count: int) -> None:
        self._missing = count
        self._all_here = anyio.Event()

    async def __call__(self) -> None:
        self._missing -= 1
        if self._missing <= 0:
            self._all_here.set()
        await self._all_here.wait()
