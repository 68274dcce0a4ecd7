"""`ingest`: a stream of items, as many transactions as it takes.

Workers pull chunks from one reader, so nothing is read ahead of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import anyio
import asyncpg

from dbop_raw.batching.result import BatchResult, Failed
from dbop_raw.engine.engine import Engine
from dbop_raw.events import ChunkFinished, IngestFinished, notify
from dbop_raw.failure.errors import PolicyError, SkipLimitExceeded
from dbop_raw.failure.policy import RetryPolicy, positive_seconds
from dbop_raw.ingestion import ledger as ledgers
from dbop_raw.ingestion.ledger import Ledger
from dbop_raw.ingestion.rejects import Reject, RejectSink
from dbop_raw.pipeline.operation import Operation, to_operation
from dbop_raw.pipeline.retry import check_policy
from dbop_raw.session.frame import Frame
from dbop_raw.session.scope import Scope
from dbop_raw.session.session import Session

__all__ = ["RETRY", "IngestReport", "ingest"]

Item = TypeVar("Item")

RETRY = RetryPolicy(attempts=6, first_delay=0.05, max_delay=5.0)
"""How an ingest retries a chunk unless told otherwise: a restart of the server is survived."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestReport:
    """What an ingest did; the same type is handed to `progress` on the way."""

    read: int
    """Items taken from the source, in chunks that were finished or found in the ledger."""
    written: int
    rejected: int
    by_sqlstate: Mapping[str, int]
    """Rejected items by SQLSTATE, or by the Python exception's name where the client found them."""
    retries: int
    chunks: int
    """Chunks committed by this call."""
    skipped: int
    """Chunks that the ledger had already."""
    rolled_back: int
    """Chunks that were in flight when the ingest was stopped, and are not in."""
    seconds: float
    finished: bool
    """Was the whole source read and written?"""

    @property
    def rows_per_second(self) -> float:
        """Items written or rejected a second."""
        return (self.written + self.rejected) / self.seconds if self.seconds > 0 else 0.0


@dataclass(slots=True)
class _Tally:
    """What is counted on the way; only the event loop's thread touches it."""

    since: float
    read: int = 0
    written: int = 0
    rejected: int = 0
    by_sqlstate: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    chunks: int = 0
    skipped: int = 0
    in_flight: int = 0
    finished: bool = False

    def report(self) -> IngestReport:
        return IngestReport(
            read=self.read,
            written=self.written,
            rejected=self.rejected,
            by_sqlstate=dict(self.by_sqlstate),
            retries=self.retries,
            chunks=self.chunks,
            skipped=self.skipped,
            rolled_back=0 if self.finished else self.in_flight,
            seconds=anyio.current_time() - self.since,
            finished=self.finished,
        )


@dataclass(frozen=True, slots=True)
class _Chunk(Generic[Item]):
    number: int
    indexes: Sequence[int]
    items: Sequence[Item]


class _Reader(Generic[Item]):
    """Cuts a source into numbered chunks, one caller at a time."""

    def __init__(self, source: Iterable[Item] | AsyncIterable[Item], size: int, linger: float | None) -> None:
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
                message = (
                    "linger needs an async source: a plain iterable gives its next item at once or blocks "
                    "the event loop"
                )
                raise PolicyError(message)
        else:
            message = (
                f"the source is a {type(source).__name__}: give an iterable or an async iterable of items"
            )
            raise PolicyError(message)

    async def next(self) -> _Chunk[Item] | None:
        """The next chunk; None at the end."""
        async with self._lock:
            if self._over:
                return None
            items = await self._items()
            if not items:
                self._over = True
                return None
            chunk = _Chunk(self._number, range(self._read, self._read + len(items)), items)
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
        """As many as come within `linger` seconds of the first. The next one is awaited in a task of its own.

        So it is not lost when the time is over, and is the first of the next chunk.
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
            close = getattr(self._async, "aclose", None)
            if close is not None:
                await close()


async def _anext(iterator: AsyncIterator[Item]) -> Item:
    return await anext(iterator)


async def ingest(
    engine: Engine,
    source: Iterable[Item] | AsyncIterable[Item],
    write: Callable[[Sequence[Item]], Operation[BatchResult[Any, Any]]],
    *,
    size: int = 1000,
    linger: float | None = None,
    workers: int = 4,
    retry: RetryPolicy = RETRY,
    rejects: RejectSink | None = None,
    skip_limit: int | None = None,
    order_by: Callable[[Item], Any] | None = None,
    ledger: Ledger | None = None,
    progress: Callable[[IngestReport], None] | None = None,
) -> IngestReport:
    """Write a stream of items in chunks, each chunk one transaction.

    `source`: any iterable or async iterable. It is read one chunk at a time, by a worker that is free: never
    further ahead than the workers can take.
    `write`: what `batch(…)` gives.
    `size`: items a chunk. `linger`: seconds after which a chunk that is not full goes out (async sources).
    `workers`: chunks in flight at a time.
    `retry`: a chunk is started again whole; its COMMIT, if in doubt, is looked up.
    `rejects`: gets the items that could not be written. Without a ledger, after their chunk's COMMIT; with
    one, before, so that after a crash one may stand twice, with the same index, but none is missing.
    `skip_limit`: how many items may be rejected in all; the chunk that goes above it is rolled back, and
    `SkipLimitExceeded` raised.
    `order_by`: a key that sorts each chunk, so that upserts of several workers lock rows in one order and
    don't deadlock.
    `ledger`: run again after a stop, the same source goes on where it stopped.
    `progress`: called with a report after each chunk, and once more at the end, also when the ingest is
    stopped or fails.

    A cancellation stops it in order: no chunk is begun, those in flight are rolled back, or finish if their
    COMMIT is on its way; the last call of `progress` says how many. Any other error that a chunk raises stops
    it likewise, and is raised unchanged. Raises `PolicyError` for options that don't fit.
    """
    for name, value in (("size", size), ("workers", workers)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            message = f"{name}={value!r} is not allowed: give a whole number of at least 1"
            raise PolicyError(message)
    if skip_limit is not None and (
        isinstance(skip_limit, bool) or not isinstance(skip_limit, int) or skip_limit < 0
    ):
        message = f"skip_limit={skip_limit!r} is not allowed: give a whole number of at least 0, or None"
        raise PolicyError(message)
    if linger is not None:
        positive_seconds("linger", linger)
        if ledger is not None:
            message = (
                "linger and ledger don't go together: the ledger needs the same chunks again, and linger "
                "cuts them by the clock"
            )
            raise PolicyError(message)
    check_policy(retry)
    if not callable(write):
        message = (
            f"write= is an object of type {type(write).__name__}, which can't be called: give what batch(…) "
            "makes"
        )
        raise PolicyError(message)
    reader = _Reader(source, size, linger)
    job = _Ingest(
        engine=engine,
        reader=reader,
        write=write,
        size=size,
        retry=retry,
        rejects=rejects,
        skip_limit=skip_limit,
        order_by=order_by,
        ledger=ledger,
        progress=progress,
    )
    try:
        return await job.run(workers)
    finally:
        await reader.close()


@dataclass(slots=True, kw_only=True)
class _Ingest(Generic[Item]):
    """One ingest on its way; the options are those of `ingest`."""

    engine: Engine
    reader: _Reader[Item]
    write: Callable[[Sequence[Item]], Operation[BatchResult[Any, Any]]]
    size: int
    retry: RetryPolicy
    rejects: RejectSink | None
    skip_limit: int | None
    order_by: Callable[[Item], Any] | None
    ledger: Ledger | None
    progress: Callable[[IngestReport], None] | None
    sink_lock: anyio.Lock = field(default_factory=anyio.Lock)
    done: dict[int, int] = field(default_factory=dict)
    # Rejects of chunks that are not committed yet: they count for the skip limit of all.
    failing: dict[int, int] = field(default_factory=dict)
    tally: _Tally = field(default_factory=lambda: _Tally(since=anyio.current_time()))

    async def run(self, workers: int) -> IngestReport:
        """All of it; the error of a chunk is raised as it is, not in a group."""
        error: Exception | None = None
        try:
            if self.ledger is not None:
                await self._open_ledger(self.ledger)
            async with anyio.create_task_group() as group:

                async def work() -> None:
                    nonlocal error
                    try:
                        await self._work()
                    except Exception as exc:  # noqa: BLE001 - raised below
                        error = error or exc
                        group.cancel_scope.cancel()

                for _ in range(workers):
                    group.start_soon(work)
            self.tally.finished = error is None
        finally:
            report = self._tell_end()
        if error is not None:
            raise error
        return report

    def _tell_end(self) -> IngestReport:
        report = self.tally.report()
        observer = self.engine.settings.observer
        if observer is not None:
            event = IngestFinished(
                read=report.read,
                written=report.written,
                rejected=report.rejected,
                chunks=report.chunks,
                seconds=report.seconds,
                stopped=not report.finished,
            )
            notify(observer, event)
        if self.progress is not None:
            self.progress(report)
        return report

    async def _open_ledger(self, ledger: Ledger) -> None:
        await self.engine.run(lambda conn: ledgers.install(ledger, conn), retry=self.retry, autocommit=True)
        self.done = await self.engine.run(
            lambda conn: ledger.done(conn, self.size), retry=self.retry, readonly=True
        )

    async def _work(self) -> None:
        while (chunk := await self.reader.next()) is not None:
            if chunk.number in self.done:
                self._skip(chunk)
                continue
            self.tally.in_flight += 1
            if self.order_by is not None:
                chunk = _sorted(chunk, self.order_by)
            await self._one(chunk)

    def _skip(self, chunk: _Chunk[Item]) -> None:
        known = self.done.get(chunk.number)
        if known is not None and known != len(chunk.items):
            message = (
                f"chunk {chunk.number} has {len(chunk.items)} items now and had {known} when the ledger was "
                "written: the source is not the same; "
                "use another ledger name for it"
            )
            raise PolicyError(message)
        self.tally.skipped += 1
        self.tally.read += len(chunk.items)
        self._finished(chunk, 0, 0, skipped=True)

    async def _one(self, chunk: _Chunk[Item]) -> None:
        """One chunk, to its end."""
        record = None
        if self.ledger is not None:
            record = self.ledger.record(chunk.number, self.size, len(chunk.items))
        told: set[int] = set()
        starts = 0
        last: tuple[Scope, BatchResult[Item, Any]] | None = None

        async def step(scope: Scope, frame: Frame) -> BatchResult[Item, Any]:
            nonlocal starts, last
            starts += 1
            result = await to_operation(self.write(chunk.items)).step(scope, frame)
            self._check_limit(chunk, result)
            if record is not None:
                # Where no item reached the server, the chunk's row must all the same.
                await scope.flush(frame)
                await self._reject(chunk, [f for f in result.failed if f.index not in told])
                told.update(failed.index for failed in result.failed)
            last = scope, result
            return result

        op = Operation(step, "ingest chunk")
        try:
            result = await self.engine.run_recorded(op, record, retry=self.retry)
        except asyncpg.UniqueViolationError as exc:
            if self.ledger is None or exc.table_name != self.ledger.table:
                raise
            # Another process with the same ledger was first, or our own COMMIT of a run before.
            self._landed(chunk)
            self._skip(chunk)
            return
        except asyncio.CancelledError:
            if last is not None and isinstance(last[0], Session) and last[0].committed:
                # The COMMIT was on its way, and came through: the chunk is in, and what it rejected must not
                # be lost.
                await self._settle(chunk, last[1], starts)
            raise
        await self._settle(chunk, result, starts)

    async def _settle(self, chunk: _Chunk[Item], result: BatchResult[Item, Any], starts: int) -> None:
        """A chunk is committed: count it, and keep its rejects."""
        self._landed(chunk)
        self._count(result, starts)
        if self.ledger is None:
            await self._reject(chunk, result.failed)
        self._finished(chunk, result.written, len(result.failed), skipped=False)

    def _landed(self, chunk: _Chunk[Item]) -> None:
        """A chunk is in: by this call, or by another that has the same ledger."""
        self.tally.in_flight -= 1
        self.failing.pop(chunk.number, None)

    def _check_limit(self, chunk: _Chunk[Item], result: BatchResult[Item, Any]) -> None:
        self.failing[chunk.number] = len(result.failed)
        rejected = self.tally.rejected + sum(self.failing.values())
        if self.skip_limit is not None and rejected > self.skip_limit:
            raise SkipLimitExceeded(limit=self.skip_limit, failed=result.failed, total=rejected)

    def _count(self, result: BatchResult[Item, Any], starts: int) -> None:
        tally = self.tally
        tally.chunks += 1
        tally.read += result.total
        tally.written += result.written
        tally.rejected += len(result.failed)
        tally.retries += result.retries + starts - 1
        tally.by_sqlstate.update(
            failed.verdict.sqlstate or failed.verdict.condition for failed in result.failed
        )

    async def _reject(self, chunk: _Chunk[Item], failed: Sequence[Failed[Item]]) -> None:
        if self.rejects is None or not failed:
            return
        rejects = [
            Reject(
                index=chunk.indexes[one.index],
                item=one.item,
                sqlstate=one.verdict.sqlstate,
                condition=one.verdict.condition,
                message=str(one.error),
                constraint=getattr(one.error, "constraint_name", None),
            )
            for one in failed
        ]
        rejects.sort(key=lambda reject: reject.index)
        # Their chunk may be committed already: a cancellation must not lose them.
        with anyio.CancelScope(shield=self.ledger is None):
            async with self.sink_lock:
                await self.rejects.write(rejects)

    def _finished(self, chunk: _Chunk[Item], written: int, rejected: int, *, skipped: bool) -> None:
        observer = self.engine.settings.observer
        if observer is not None:
            event = ChunkFinished(
                chunk=chunk.number, read=len(chunk.items), written=written, rejected=rejected, skipped=skipped
            )
            notify(observer, event)
        if self.progress is not None:
            self.progress(self.tally.report())


def _sorted(chunk: _Chunk[Item], key: Callable[[Item], Any]) -> _Chunk[Item]:
    pairs = sorted(zip(chunk.indexes, chunk.items, strict=True), key=lambda pair: key(pair[1]))
    return _Chunk(chunk.number, [index for index, _ in pairs], [item for _, item in pairs])


Source = Iterable[Item] | AsyncIterable[Item]
"""What `ingest` reads from."""
