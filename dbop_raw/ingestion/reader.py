"""The reader: cuts a source into numbered chunks, one caller at a time.

Workers ask it for their next chunk, so a source is never read further ahead than the workers can take. What a
source gave before it raised is a chunk like any other; its error is kept for when that is done.

An async source runs in one task of its own, from its first item to its clean-up. So it may hold a timeout
or a task group open over its items, whichever worker asks for them, and what it awaits to clean up after a
cancellation is awaited: for a bounded time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterable, AsyncIterator, Generator, Iterable, Iterator, Mapping, Sequence
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
        if isinstance(source, AsyncIterable):
            self._source: _Items[Item] | _AsyncItems[Item] = _AsyncItems(aiter(source), linger)
        elif not isinstance(source, Iterable) or isinstance(source, (str, bytes)):
            raise PolicyError(
                f"the source is a {type(source).__name__}: give an iterable or an async iterable of items"
            )
        elif linger is not None:
            raise PolicyError(
                "linger needs an async source: a plain iterable gives its next item at once or blocks the "
                "event loop"
            )
        else:
            self._source = _Items(iter(source))
        self._size = size
        self._lock = anyio.Lock()
        self._read = 0
        self.number = 0
        """Of the next chunk."""
        self.sizes: Mapping[int, int] = {}
        """How many items the chunks have that were cut before, by their number: they are cut so again."""

    @property
    def error(self) -> Exception | None:
        """What the source raised; what it gave before is in the last chunk."""
        return self._source.error

    async def next(self) -> Chunk[Item] | None:
        """Give the next chunk, or None at the source's end, or where it raised."""
        async with self._lock:
            items = await self._source.take(self.sizes.get(self.number, self._size))
            if not items:
                return None
            chunk = Chunk(self.number, range(self._read, self._read + len(items)), items)
            self.number += 1
            self._read += len(items)
            return chunk

    async def close(self, patience: float) -> None:
        """Let go of the source: shielded, and bounded.

        Args:
            patience: Seconds that an async source has for its clean-up. One that takes longer is left, and
                that is reported to the event loop's exception handler.
        """
        with anyio.CancelScope(shield=True):
            await self._source.close(patience)


class _Items(Generic[Item]):
    """A plain iterable, read in the worker that asks."""

    def __init__(self, iterator: Iterator[Item]) -> None:
        self._iterator = iterator
        self.error: Exception | None = None

    async def take(self, number: int) -> list[Item]:
        """Give the next items, fewer at the end."""
        items: list[Item] = []
        if self.error is None:
            try:
                # Not list(islice(…)): what came before an error stays.
                items.extend(itertools.islice(self._iterator, number))
            except Exception as exc:  # noqa: BLE001 - raised when what came before it is written
                self.error = exc
        return items

    async def close(self, patience: float) -> None:
        """Close a generator. Anything else may be a file that its owner reads on."""
        del patience
        if isinstance(self._iterator, Generator):
            try:
                self._iterator.close()
            except Exception as exc:  # noqa: BLE001 - there is an error already, or a cancellation
                _report("failed", exception=exc)


class _AsyncItems(Generic[Item]):
    """An async iterable, read in a task of its own, and only when somebody asks."""

    def __init__(self, iterator: AsyncIterator[Item], linger: float | None) -> None:
        self._iterator = iterator
        self._linger = linger
        self._task: asyncio.Task[None] | None = None
        self._items: list[Item] = []
        # How many items somebody waits for; 0: nobody does.
        self._wanted = 0
        self._asked = asyncio.Event()
        self._arrived = asyncio.Event()
        self._over = False
        self._closing = False
        self.error: Exception | None = None

    async def take(self, number: int) -> list[Item]:
        """Give the next items, fewer at the end or when `linger` seconds have passed since the first."""
        self._wanted = number
        self._asked.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="dbop_raw: source of an ingest")
        try:
            await self._gathered(number)
        finally:
            self._wanted = 0
        items = self._items[:number]
        del self._items[:number]
        return items

    async def _gathered(self, number: int) -> None:
        deadline: float | None = None
        while len(self._items) < number and not self._over:
            if deadline is None and self._items and self._linger is not None:
                deadline = anyio.current_time() + self._linger
            self._arrived.clear()
            with anyio.CancelScope(deadline=deadline if deadline is not None else float("inf")) as limit:
                await self._arrived.wait()
            if limit.cancelled_caught:
                return

    async def _run(self) -> None:
        """Read the source, and clean up after it."""
        try:
            await self._pump()
        except asyncio.CancelledError as exc:
            if not self._closing:
                # Not by us: taken for the source's end it would lose the rest of it in silence.
                self.error = RuntimeError("the source was cancelled by something else than the ingest")
                self.error.__cause__ = exc
            raise
        except Exception as exc:  # noqa: BLE001 - raised when what came before it is written
            self.error = exc
        finally:
            self._over = True
            self._arrived.set()
            await self._clean_up()

    async def _clean_up(self) -> None:
        if (close := getattr(self._iterator, "aclose", None)) is not None:
            await close()

    async def _pump(self) -> None:
        async for item in self._iterator:
            self._items.append(item)
            while len(self._items) >= self._wanted:
                if self._closing:
                    return
                self._arrived.set()
                self._asked.clear()
                await self._asked.wait()
            if self._linger is not None:
                self._arrived.set()

    async def close(self, patience: float) -> None:
        """Stop reading, and wait for the clean-up."""
        self._closing, self._wanted = True, 0
        if self._task is None:
            # Nothing was read; but an iterator of another kind may hold something all the same.
            self._task = asyncio.create_task(self._clean_up())
        elif not self._over:
            self._task.cancel()
        try:
            await asyncio.wait({self._task}, timeout=patience)
        finally:
            if not self._task.done():
                self._task.cancel()
                _report(f"did not end within {patience:g} s, and is left", task=self._task)
        with contextlib.suppress(asyncio.CancelledError, asyncio.InvalidStateError):
            if (failed := self._task.exception()) is not None:
                _report("failed", exception=failed)


def _report(what: str, **context: Any) -> None:
    """Tell the event loop of a clean-up: the caller has another error to hear of."""
    message = f"dbop_raw: the source's clean-up {what}"
    asyncio.get_running_loop().call_exception_handler({"message": message, **context})
