"""What goes wrong, by a seed: one fault at a time, at a random moment or message."""

from __future__ import annotations

from collections.abc import Callable

import anyio

__all__ = ["until"]


async def until(done: Callable[[], bool], seconds: float = 2.0) -> bool:
    """Wait until `done()`, at most so long; gives what it said last."""
    give_up = anyio.current_time() + seconds
    while not done():
        if anyio.current_time() >= give_up:
            return False
        await anyio.sleep(0.005)
    return True
