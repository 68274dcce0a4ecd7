"""`ingest`: a stream of items, as many transactions as it takes.

Workers pull chunks from one reader, so nothing is read ahead of them. Each chunk is one transaction, retried
whole; what could not be written goes to the rejects, and with a ledger the chunk's row stands or falls with
the chunk.

The first error counts, whoever raised it: the source, a chunk, the sink of the rejects, `progress`. What
comes after it is kept in its notes, and what a cancellation leaves no one to tell of goes to the event
loop's exception handler.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import anyio
import asyncpg

from dbop_raw.batching.result import BatchResult, Failed
from dbop_raw.engine.engine import Engine
from dbop_raw.events import ChunkFinished, IngestFinished, notify
from dbop_raw.failure.errors import CommitUnknown, PolicyError, SkipLimitExceeded
from dbop_raw.failure.policy import RetryPolicy, positive_seconds, whole_number
from dbop_raw.ingestion.ledger import Book, ChunkRecord, Ledger, Target, read_book
from dbop_raw.ingestion.order import in_order
from dbop_raw.ingestion.reader import Chunk, Reader
from dbop_raw.ingestion.rejects import Reject, RejectSink, text_of
from dbop_raw.ingestion.report import IngestReport, Tally, by_sqlstate
from dbop_raw.pipeline.operation import Operation, to_operation
from dbop_raw.pipeline.retry import check_policy
from dbop_raw.session.frame import Frame
from dbop_raw.session.scope import Scope
from dbop_raw.session.session import Session

__all__ = ["RETRY", "Write", "ingest"]

Item = TypeVar("Item")

RETRY = RetryPolicy(attempts=6, first_delay=0.05, max_delay=5.0)
"""How an ingest retries a chunk unless told otherwise: a restart of the server is survived."""

Write = Callable[[Sequence[Item]], Operation[BatchResult[Any, Any]]]
"""What `batch` gives: makes the operation that writes a chunk's items."""


async def ingest(
    engine: Engine,
    source: Iterable[Item] | AsyncIterable[Item],
    write: Write[Item],
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

    A cancellation stops it in order: no chunk is begun, those in flight are rolled back, or finish if their
    COMMIT is on its way; the last call of `progress` says how many. An error of a chunk, of the rejects' sink
    or of `progress` stops it likewise, and is raised unchanged. A source that raises loses nothing that it
    gave
    before: that is written, and then its error is raised.

    Args:
        engine: Its pool should have a connection for each worker; one that has none waits, however long.
        source: Any iterable or async iterable of items. It is read one chunk at a time, for a worker that is
            free: never further ahead than the workers can take. A generator is closed at the end.
        write: What `batch(…)` gives.
        size: Items in a chunk.
        linger: Seconds after which a chunk that is not full goes out; async sources only. None: it waits
            until it is full.
        workers: Chunks in flight at a time.
        retry: How often a chunk is started, each time whole. Its COMMIT, if in doubt, is looked up.
        rejects: Gets the items that could not be written. Without a ledger, after their chunk's COMMIT; with
            one, before, so that after a crash one may stand there twice, with the same index, but none is
            missing.
        skip_limit: How many items may be rejected in all. The chunk that goes above it is rolled back. None:
            any number.
        order_by: A key that sorts each chunk, so that upserts of several workers lock rows in one order and
            don't deadlock. None comes last, also inside of a tuple; unlike types are sorted apart.
        ledger: Remembers which chunks are in: run again after a stop, the same source goes on where it
            stopped, or where it has grown.
        progress: Called with a report after each chunk, and once more at the end, also when the ingest is
            stopped or fails.

    Returns:
        What was read, written and rejected.

    Raises:
        PolicyError: Options that are not allowed or don't fit together.
        LedgerMismatch: The ledger was written for another source, target or size; nothing was written now.
        SkipLimitExceeded: More items were rejected than `skip_limit` allows.
        RetriesExhausted: A chunk's retries gave up; the last error is its cause.
        CommitUnknown: A COMMIT in doubt could not be looked up.
    """
    _check_options(write, size=size, workers=workers, skip_limit=skip_limit, linger=linger, ledger=ledger)
    check_policy(retry)
    reader = Reader(source, size, linger)
    job = _Ingest(
        engine=engine,
        reader=reader,
        write=write,
        retry=retry,
        rejects=rejects,
        skip_limit=skip_limit,
        order_by=order_by,
        progress=progress,
    )
    try:
        return await job.run(workers, ledger, size)
    finally:
        await reader.close(engine.settings.bounds.cleanup)


def _check_options(
    write: object, *, size: int, workers: int, skip_limit: int | None, linger: float | None, ledger: object
) -> None:
    whole_number("size", size, 1)
    whole_number("workers", workers, 1)
    if skip_limit is not None:
        whole_number("skip_limit", skip_limit, 0)
    if linger is not None:
        positive_seconds("linger", linger)
        if ledger is not None:
            raise PolicyError(
                "linger and ledger don't go together: the ledger needs the same chunks again, and linger "
                "cuts them by the clock"
            )
    if not callable(write):
        raise PolicyError(
            f"write= is an object of type {type(write).__name__}, which can't be called: give what batch(…) "
            "makes"
        )


@dataclass(slots=True, kw_only=True)
class _Ingest(Generic[Item]):
    """One ingest on its way; the options are those of `ingest`."""

    engine: Engine
    reader: Reader[Item]
    write: Write[Item]
    retry: RetryPolicy
    rejects: RejectSink | None
    skip_limit: int | None
    order_by: Callable[[Item], Any] | None
    progress: Callable[[IngestReport], None] | None
    book: Book | None = None
    """What the ledger knew at the start; None without one."""
    # Chunks that were read and not begun, because later ones had to be compared with the ledger first.
    held: deque[Chunk[Item]] = field(default_factory=deque)
    # What was raised, in order: the first is what the caller gets.
    errors: list[Exception] = field(default_factory=list)
    # Rejects of chunks that are not committed yet: they count for the skip limit of all.
    failing: dict[int, int] = field(default_factory=dict)
    sink_lock: anyio.Lock = field(default_factory=anyio.Lock)
    tally: Tally = field(default_factory=Tally)

    async def run(self, workers: int, ledger: Ledger | None, size: int) -> IngestReport:
        """All of it; the first error is raised as it is, not in a group."""
        try:
            if ledger is not None:
                self.book = await self._open(ledger, size)
                await self._compare(self.book)
            await self._work_together(workers)
            self._raise_first()
        except BaseException:
            with _told_to_the_loop("progress failed at the end of an ingest"):
                self._tell_end()
            raise
        self.tally.finished = True
        return self._tell_end()

    # --- the ledger, before anything is written

    async def _open(self, ledger: Ledger, size: int) -> Book:
        """Read the ledger; make its table where it is not there."""
        target = Target.of(self.write)
        if ledger.reference:
            await self._install(ledger)
        while True:
            book = await self.engine.run_recorded(
                lambda conn: read_book(ledger, conn, target, size), None, retry=self.retry, readonly=True
            )
            if book is not None:
                return book
            await self._install(ledger)

    async def _install(self, ledger: Ledger) -> None:
        # Where the answer is lost, it is looked at again; and done twice it does no harm.
        with contextlib.suppress(CommitUnknown):
            await self.engine.run_recorded(ledger.install, None, retry=self.retry)

    async def _compare(self, book: Book) -> None:
        """Read what the ledger has, and pass it by when it is the same.

        A stop leaves holes between the chunks that are in: at most one a worker. They are held back until all
        others were compared, so that nothing of another source is written.
        """
        self.reader.sizes = {number: entry.items for number, entry in book.entries.items()}
        while self.reader.number <= book.last:
            number = self.reader.number
            chunk = await self.reader.next()
            if self._source_failed():
                # What was not compared is not written: the ledger takes it up when the source is whole again.
                self.held.clear()
                return
            if chunk is None:
                # The source ends before what the ledger has of it.
                number = min(one for one in book.entries if one >= number)
                book.check(number, (), book.entries[number])
                return
            if (entry := book.entries.get(number)) is None:
                self.held.append(chunk)
            else:
                book.check(number, chunk.items, entry)
                self._skip(chunk)

    def _skip(self, chunk: Chunk[Item]) -> None:
        """Pass by a chunk that is in."""
        self.tally.skip(len(chunk.items))
        self._tell(chunk, 0, 0, skipped=True)

    # --- the workers

    async def _work_together(self, workers: int) -> None:
        """Run all workers, until the source ends or one of them fails."""
        try:
            async with anyio.create_task_group() as group:

                async def work() -> None:
                    try:
                        await self._work()
                    except Exception as exc:  # noqa: BLE001 - raised when all have stopped
                        self.errors.append(exc)
                        group.cancel_scope.cancel()

                for _ in range(workers):
                    group.start_soon(work)
        except asyncio.CancelledError:
            # The caller gets the cancellation. What failed while it stopped must be heard of all the same.
            for error in self.errors:
                _tell_loop("an ingest failed while it was cancelled", error)
            raise

    async def _work(self) -> None:
        """One worker: chunk after chunk, to the source's end."""
        while (chunk := await self._next()) is not None:
            self.tally.in_flight += 1
            await self.write_chunk(chunk)

    async def _next(self) -> Chunk[Item] | None:
        if self.held:
            return self.held.popleft()
        chunk = await self.reader.next()
        self._source_failed()
        return chunk

    def _source_failed(self) -> bool:
        """Note the source's error when it is first seen: what it gave before is written all the same."""
        error = self.reader.error
        if error is not None and not any(error is one for one in self.errors):
            self.errors.append(error)
        return error is not None

    def _raise_first(self) -> None:
        if not self.errors:
            return
        first, *others = self.errors
        for other in others:
            first.add_note(f"dbop_raw: after that, the ingest met {type(other).__name__} as well")
        raise first

    # --- one chunk

    async def write_chunk(self, chunk: Chunk[Item]) -> None:
        """Write one chunk in one transaction, and keep its rejects."""
        book = self.book
        record = None if book is None else book.record(chunk.number, chunk.items)
        ordered = chunk if self.order_by is None else _sorted(chunk, self.order_by)
        attempts = _Attempts(self, ordered, record)
        try:
            result = await self._run(attempts, record)
        except asyncpg.UniqueViolationError:
            # Whose it is, the error need not say; whether the chunk is in, the ledger does.
            if book is None or not await self._is_in(book, chunk):
                raise
            self._landed(chunk)
            self._skip(chunk)
        except asyncio.CancelledError:
            if (committed := attempts.committed()) is not None:
                # The COMMIT was on its way, and came through: the chunk is in, and what it rejected must not
                # be lost.
                await self._conclude(ordered, committed, attempts.count)
            raise
        else:
            await self._conclude(ordered, result, attempts.count)

    async def _run(self, attempts: _Attempts[Item], record: ChunkRecord | None) -> BatchResult[Item, Any]:
        """Run a chunk's transaction until it is committed, or not to be attempted again."""
        op = Operation(attempts.step, "ingest chunk")
        try:
            return await self.engine.run_recorded(op, record, retry=self.retry)
        except _SinkFailed as failed:
            error = failed.error
        # Not in the handler: what is raised carries its own cause, and no trace of our signal.
        raise error

    async def _is_in(self, book: Book, chunk: Chunk[Item]) -> bool:
        """Has another process written this chunk, or an attempt whose answer was lost?"""
        entry = await self.engine.run_recorded(
            lambda conn: book.find(conn, chunk.number), None, retry=self.retry, readonly=True
        )
        if entry is not None:
            book.check(chunk.number, chunk.items, entry)
        return entry is not None

    async def _conclude(self, chunk: Chunk[Item], result: BatchResult[Item, Any], attempts: int) -> None:
        """A chunk is committed: count it, keep its rejects, and tell."""
        self._landed(chunk)
        self.tally.add(result, attempts)
        if self.book is None:
            # They are of what is committed: a cancellation must not lose them.
            with anyio.CancelScope(shield=True):
                await self.reject(chunk, result.failed)
        self._tell(chunk, result.written, len(result.failed), skipped=False)

    def _landed(self, chunk: Chunk[Item]) -> None:
        """A chunk is in: by this call, or by another that has the same ledger."""
        self.tally.in_flight -= 1
        self.failing.pop(chunk.number, None)

    def check_limit(self, chunk: Chunk[Item], result: BatchResult[Item, Any]) -> None:
        """Raise `SkipLimitExceeded` when this chunk's rejects are too many, with those of all others."""
        self.failing[chunk.number] = len(result.failed)
        rejected = self.tally.rejected + sum(self.failing.values())
        if self.skip_limit is not None and rejected > self.skip_limit:
            raise SkipLimitExceeded(limit=self.skip_limit, failed=result.failed, total=rejected)

    async def reject(self, chunk: Chunk[Item], failed: Sequence[Failed[Item]]) -> None:
        """Hand rejects to the sink, one chunk at a time."""
        if self.rejects is None or not failed:
            return
        rejects = [_reject(chunk.indexes[one.index], one) for one in failed]
        rejects.sort(key=lambda reject: reject.index)
        async with self.sink_lock:
            await self.rejects.write(rejects)

    # --- who is told

    def _tell(self, chunk: Chunk[Item], written: int, rejected: int, *, skipped: bool) -> None:
        """Tell the observer and `progress` of a chunk."""
        observer = self.engine.settings.observer
        if observer is not None:
            event = ChunkFinished(
                chunk=chunk.number, read=len(chunk.items), written=written, rejected=rejected, skipped=skipped
            )
            notify(observer, event)
        if self.progress is not None:
            self.progress(self.tally.report())

    def _tell_end(self) -> IngestReport:
        """Tell the observer and `progress` of the end, whatever it was."""
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


class _SinkFailed(Exception):
    """The sink of the rejects raised inside of a chunk's transaction.

    Its error says nothing about that transaction's connection, so the engine must not judge it: it may be a
    full disk, or another server's.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _Attempts(Generic[Item]):
    """The attempts at one chunk: its transaction's body, and what is known when one of them is cancelled."""

    def __init__(self, job: _Ingest[Item], chunk: Chunk[Item], record: ChunkRecord | None) -> None:
        self._job = job
        self._chunk = chunk
        self._record = record
        # With a ledger rejects are handed over before COMMIT, and an attempt after it finds the same again.
        self._told: set[int] = set()
        self._last: tuple[Scope, BatchResult[Item, Any]] | None = None
        self.count = 0
        """How often the body was started."""

    async def step(self, scope: Scope, frame: Frame) -> BatchResult[Item, Any]:
        """All up to COMMIT."""
        self.count += 1
        job, chunk = self._job, self._chunk
        result = await to_operation(job.write(chunk.items)).step(scope, frame)
        job.check_limit(chunk, result)
        if self._record is not None:
            if result.written != result.total:
                scope.control.push(self._record.outcome(result.written, by_sqlstate(result.failed)))
            # Where no item reached the server, the chunk's row must all the same.
            await scope.flush(frame)
            await self._reject([one for one in result.failed if one.index not in self._told])
        self._last = scope, result
        return result

    async def _reject(self, failed: Sequence[Failed[Item]]) -> None:
        try:
            await self._job.reject(self._chunk, failed)
        except Exception as exc:
            raise _SinkFailed(exc) from exc
        self._told.update(one.index for one in failed)

    def committed(self) -> BatchResult[Item, Any] | None:
        """Give the result of the last attempt if its COMMIT came through, though its caller was cancelled."""
        if self._last is None:
            return None
        scope, result = self._last
        return result if isinstance(scope, Session) and scope.committed else None


def _reject(index: int, failed: Failed[Any]) -> Reject:
    return Reject(
        index=index,
        item=failed.item,
        sqlstate=failed.verdict.sqlstate,
        condition=failed.verdict.condition,
        message=text_of(failed.error),
        constraint=getattr(failed.error, "constraint_name", None),
    )


def _sorted(chunk: Chunk[Item], key: Callable[[Item], Any]) -> Chunk[Item]:
    places = in_order([key(item) for item in chunk.items])
    return Chunk(
        chunk.number, [chunk.indexes[place] for place in places], [chunk.items[place] for place in places]
    )


@contextlib.contextmanager
def _told_to_the_loop(what: str) -> Iterator[None]:
    """Keep an error from hiding the one that is raised already."""
    try:
        yield
    except Exception as exc:  # noqa: BLE001 - told
        _tell_loop(what, exc)


def _tell_loop(what: str, error: Exception) -> None:
    asyncio.get_running_loop().call_exception_handler({"message": f"dbop_raw: {what}", "exception": error})
