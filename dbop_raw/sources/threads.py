"""Reading in a thread, for an input that may make its reader wait: a pipe, a terminal.

The event loop goes on meanwhile, so no transaction is left hanging while a slow writer at the other end of a
pipe makes up its mind.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any, TypeVar

__all__ = ["in_thread", "items_in_thread"]

T = TypeVar("T")

# How many items a thread reads at a time: handing one over costs more than reading it.
_ITEMS_AT_A_TIME = 500


async def items_in_thread(items: Iterator[T], at_a_time: int) -> AsyncIterator[T]:
    """Give the same items, read in a thread.

    Args:
        items: What may block its caller.
        at_a_time: How many are read before they are handed over; 500 at most.

    Yields:
        Each item, in order.
    """
    read = partial(_some, items, min(at_a_time, _ITEMS_AT_A_TIME))
    while batch := await in_thread(read):
        for item in batch:
            yield item


def _some(items: Iterator[T], number: int) -> list[T]:
    return list(itertools.islice(items, number))


async def in_thread(call: Callable[[], T]) -> T:
    """Call it in a thread of its own, which a cancellation and the end of the process leave behind.

    Nobody can end a read of a pipe from outside, and the threads of a pool would be waited for.

    Args:
        call: What may block.

    Returns:
        What it returned; what it raised is raised here.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def hand_over(set_it: Callable[[Any], None], value: object) -> None:
        if not future.done():
            set_it(value)

    def work() -> None:
        try:
            outcome: tuple[Callable[[Any], None], object] = future.set_result, call()
        except BaseException as exc:  # noqa: BLE001 - carried to the caller
            outcome = future.set_exception, exc
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(hand_over, *outcome)

    threading.Thread(target=work, name="dbop-raw-read", daemon=True).start()
    return await future
