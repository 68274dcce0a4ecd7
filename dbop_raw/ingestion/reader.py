"""The reader: cuts a source into numbered chunks, one caller at a time.

Workers ask it for their next chunk, so a source is never read further ahead than the workers can take. An
async source may also be cut by the clock (`linger`), so that items of a slow stream do not wait for a full
chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio

from dbop_raw.failure.errors import PolicyError

__all__ = ["Chunk", "Reader"]

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Chunk(Generic[Item]):
    """Items of the source that are written in one transaction."""

    number: int
    """From 0, in the order of the source."""
    indexes: Sequence[int]
    """The places of its items in the source, from 0."""
    items: Sequence[Item]


class Reader(Generic[Item]):
    """Cuts a source into chunks."""

    def __init__(self, source: Iterable[Item] | AsyncIterable[Item], size: int, linger: float | None) -> None:
        """Take hold of the source; nothing is read yet.

        Args:
            source: Any iterable or async iterable of items.
            size: Items in a chunk.
            linger: Seconds from its first item after which a chunk that is not full is given; None: never.

        Raises:
            PolicyError: The source is no iterable, or `linger` is given for one that is not async.

        """
        self._size = size
        self._linger = linger
        self._lock = anyio.Lock()
        self._number = 0
        self._read = 0
        self._over = False
        self._sync: Iterator[Item] | None = None
        self._async: AsyncIterator[Item] | None = None
        # The next item, asked for and not there yet: kept over a chunk that lingered out.
        self._coming: asyncio.Future[Item] | None = None
        if isinstance(source, AsyncIterable):
            self._async = aiter(source)
        elif isinstance(source, Iterable) and not isinstance(source, (str, bytes)):
            self._sync = iter(source)
            if linger is not None:
                raise PolicyError(
                    "linger needs an async source: a plain iterable gives its next item at once or blocks "
                    "the event loop"
                )
        else:
            raise PolicyError(
                f"the source is a {type(source).__name__}: give an iterable or an async iterable of items"
            )

    async def next(self) -> Chunk[Item] | None:
        """Give the next chunk, or None at the source's end."""
        async with self._lock:
            if self._over:
                return None
            items = await self._items()
            if not items:
                self._over = True
                return None
            chunk = Chunk(self._number, range(self._read, self._read + len(items)), items)
            self._number += 1
            self._read += len(items)
            return chunk

    async def _items(self) -> list[Item]:
        if self._sync is not None:
            return list(itertools.islice(self._sync, self._size))
        if self._linger is not None:
            return await self._items_in_time(self._linger)
        items: list[Item] = []
        if self._async is not None:
            async for item in self._async:
                items.append(item)
                if len(items) == self._size:
                    return items
        self._over = True
        return items

    async def _items_in_time(self, linger: float) -> list[Item]:
        """Give as many items as come within `linger` seconds of the first.

        The next one is awaited in a task of its own: so it is not lost when the time is over, and is the
        first of the next chunk.
        """
        items: list[Item] = []
        deadline: float | None = None
        while len(items) < self._size and await self._wait(deadline):
            coming, self._coming = self._coming, None
            if coming is None:
                break
            try:
                items.append(coming.result())
            except StopAsyncIteration:
                self._over = True
                break
            if deadline is None:
                deadline = anyio.current_time() + linger
        return items

    async def _wait(self, deadline: float | None) -> bool:
        """Wait for the next item; False when `deadline` came first."""
        if self._coming is None and self._async is not None:
            self._coming = asyncio.ensure_future(_anext(self._async))
        if self._coming is None:
            return False
        timeout = None if deadline is None else max(0.0, deadline - anyio.current_time())
        done, _ = await asyncio.wait({self._coming}, timeout=timeout)
        return bool(done)

    async def close(self) -> None:
        """Let go of the source."""
        coming, self._coming = self._coming, None
        with anyio.CancelScope(shield=True), contextlib.suppress(Exception, asyncio.CancelledError):
            if coming is not None:
                coming.cancel()
                await asyncio.wait({coming})
                if not coming.cancelled():
                    coming.exception()
            close: Any = getattr(self._async, "aclose", None)
            if close is not None:
                await close()


async def _anext(iterator: AsyncIterator[Item]) -> Item:
    return await anext(iterator)
