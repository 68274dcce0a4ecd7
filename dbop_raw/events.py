"""What an engine tells an observer: frozen events with flat fields, named `area.what_happened`.

An observer is any callable that takes an event. It is called on the event loop, between two awaits, so it
must be quick and must not block. An error that it raises does not reach the work: it goes to the event loop's
exception handler. Without an observer no event is made at all.

No event carries SQL, a parameter, a row, a DSN or the text of an error, which may quote a row's values: an
error is described by its SQLSTATE and condition. All times are seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "AcquireTimedOut",
    "Acquired",
    "BatchFinished",
    "ChunkFinished",
    "CommitInDoubt",
    "CommitResolved",
    "Committed",
    "Event",
    "Evicted",
    "IngestFinished",
    "ItemFailed",
    "LeakSuspected",
    "Observer",
    "PoolExpired",
    "Retried",
    "RetryRefused",
    "RolledBack",
    "Shed",
    "notify",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events."""

    name: ClassVar[str]
    """`area.what_happened`, the same for all events of a class."""


Observer = Callable[[Event], None]
"""What an engine calls with each event."""


def notify(observer: Observer, event: Event) -> None:
    """Give an event to an observer.

    What the observer raises goes to the event loop's exception handler, so that it can't break a transaction.

    Args:
        observer: Whom to call.
        event: What has happened.
    """
    try:
        observer(event)
    except Exception as exc:  # noqa: BLE001 - a broken observer must not break a transaction
        asyncio.get_running_loop().call_exception_handler(
            {"message": f"dbop_raw: the observer failed on {event.name}", "exception": exc}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Acquired(Event):
    """A connection was taken from the pool."""

    name: ClassVar[str] = "pool.acquired"
    waited: float
    """Seconds from the call to the connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquireTimedOut(Event):
    """A call got no connection within `acquire_timeout`; it raised `AcquireTimeout`."""

    name: ClassVar[str] = "pool.acquire_timed_out"
    waited: float
    """Seconds that it waited."""
    waiting: int
    """Other calls that still waited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shed(Event):
    """A call was refused at once with `EngineOverloaded`: `max_waiting` others were waiting already."""

    name: ClassVar[str] = "pool.shed"
    waiting: int
    """Calls that were waiting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evicted(Event):
    """A connection was closed instead of going back to the pool, because of an error."""

    name: ClassVar[str] = "pool.evicted"
    sqlstate: str | None
    """The error's SQLSTATE; None where it has none."""
    condition: str
    """PostgreSQL's name for that code, or the class of an error without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolExpired(Event):
    """All connections of the pool were marked for replacement: their server is no longer the primary."""

    name: ClassVar[str] = "pool.expired"
    sqlstate: str | None
    """The SQLSTATE that showed it: 25006 or 57P02."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakSuspected(Event):
    """A connection has been held for longer than `leak_after`."""

    name: ClassVar[str] = "pool.leak_suspected"
    held: float
    """Seconds: the engine's `leak_after`."""
    stack: str
    """Where it was taken: files, line numbers and functions, without source code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(Event):
    """A transaction was committed, or an autocommitted operation was done."""

    name: ClassVar[str] = "transaction.committed"
    operation: str
    """The operation's name."""
    attempts: int
    """How many times its body was started, whatever the level that started it."""
    seconds: float
    """Seconds from the call to the answer to COMMIT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack(Event):
    """A transaction was rolled back, because of an error or a cancellation."""

    name: ClassVar[str] = "transaction.rolled_back"
    operation: str
    """The operation's name."""
    sqlstate: str | None
    """The error's SQLSTATE; None where it has none."""
    condition: str
    """PostgreSQL's name for that code, or the class of an error without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """A body is to be started again after a pause."""

    name: ClassVar[str] = "retry.scheduled"
    operation: str
    """The operation's name."""
    level: str
    """From where: "savepoint", "transaction", or "statement" (outside of a transaction)."""
    attempts: int
    """How many times the body was started so far."""
    delay: float
    """Seconds until the next start."""
    sqlstate: str | None
    """The SQLSTATE of the error that is retried; None where it has none."""
    condition: str
    """PostgreSQL's name for that code, or the class of an error without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRefused(Event):
    """A transient failure was not retried any more; `RetriesExhausted` was raised."""

    name: ClassVar[str] = "retry.refused"
    operation: str
    """The operation's name."""
    reason: str
    """What allowed no more: "attempts" (the policy), "budget" (the engine's budget) or "deadline"."""
    attempts: int
    """How many times the body was started."""
    sqlstate: str | None
    """The last error's SQLSTATE; None where it has none."""
    condition: str
    """PostgreSQL's name for that code, or the class of an error without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitInDoubt(Event):
    """COMMIT was sent and its answer was lost, so the outcome is not known."""

    name: ClassVar[str] = "commit.in_doubt"
    operation: str
    """The operation's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitResolved(Event):
    """A COMMIT in doubt was looked up in the database."""

    name: ClassVar[str] = "commit.resolved"
    operation: str
    """The operation's name."""
    outcome: str
    """What was found: "committed", "aborted", or "unknown" where it could not be known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemFailed(Event):
    """An item of a batch was set aside; the others go on."""

    name: ClassVar[str] = "batch.item_failed"
    writer: str
    """The name of the batch's writer."""
    index: int
    """The item's position in the batch, from 0."""
    sqlstate: str | None
    """The SQLSTATE of the item's error; None where it has none."""
    condition: str
    """PostgreSQL's name for that code, or the class of an error without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFinished(Event):
    """A batch has written what could be written; its transaction is not committed yet."""

    name: ClassVar[str] = "batch.finished"
    writer: str
    """The name of the batch's writer."""
    total: int
    """Items that the batch was given."""
    written: int
    """Items that are written."""
    failed: int
    """Items that were set aside."""
    retries: int
    """Starts after the first, of any item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFinished(Event):
    """A chunk of an ingest was committed, or the ledger showed that it had been committed earlier."""

    name: ClassVar[str] = "ingest.chunk_finished"
    chunk: int
    """The chunk's number, from 0."""
    read: int
    """Items in it."""
    written: int
    """Items that were written."""
    rejected: int
    """Items that were rejected."""
    skipped: bool
    """True: the ledger had it already, and nothing was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestFinished(Event):
    """An ingest has ended."""

    name: ClassVar[str] = "ingest.finished"
    read: int
    """Items that were read from the source."""
    written: int
    """Items that were written."""
    rejected: int
    """Items that were rejected."""
    chunks: int
    """Chunks that were committed."""
    seconds: float
    """Seconds that it took in all."""
    stopped: bool
    """True: it was cancelled, or failed, before the end of the source."""
