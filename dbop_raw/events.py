"""What an engine tells an observer: frozen events with flat fields, named `area.what_happened`.

An observer is any callable that takes an event. It runs on the event loop, between two awaits: it must be
quick and must not block. An error that it raises never reaches the work: it goes to the loop's exception
handler. Without an observer no event is made at all.

No event carries SQL, a parameter, a row, a DSN or an error's text (a text may quote a row's values): an error
is told by its SQLSTATE and condition.
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
    """Base of all events; `name` is `area.what_happened`."""

    name: ClassVar[str]


Observer = Callable[[Event], None]


def notify(observer: Observer, event: Event) -> None:
    """Hand `event` over.

    What the observer raises goes to the event loop's exception handler, not into the work.
    """
    try:
        observer(event)
    except Exception as exc:  # noqa: BLE001 - a broken observer must not break a transaction
        asyncio.get_running_loop().call_exception_handler(
            {"message": f"dbop_raw: the observer failed on {event.name}", "exception": exc}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Acquired(Event):
    """A connection was taken from the pool after `waited` seconds."""

    name: ClassVar[str] = "pool.acquired"
    waited: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquireTimedOut(Event):
    """No connection came free within `waited` seconds."""

    name: ClassVar[str] = "pool.acquire_timed_out"
    waited: float
    waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shed(Event):
    """A call was refused at once, because `waiting` others wait already."""

    name: ClassVar[str] = "pool.shed"
    waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evicted(Event):
    """A connection was thrown away instead of going back to the pool."""

    name: ClassVar[str] = "pool.evicted"
    sqlstate: str | None
    condition: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolExpired(Event):
    """All connections of the pool were marked for replacement: their server is not the primary any more."""

    name: ClassVar[str] = "pool.expired"
    sqlstate: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakSuspected(Event):
    """A connection has been held for `held` seconds; `stack` says who took it."""

    name: ClassVar[str] = "pool.leak_suspected"
    held: float
    stack: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(Event):
    """A transaction (or an autocommitted operation) was done, `seconds` after its first try began."""

    name: ClassVar[str] = "transaction.committed"
    operation: str
    attempts: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack(Event):
    """A transaction was rolled back by an error or a cancellation."""

    name: ClassVar[str] = "transaction.rolled_back"
    operation: str
    sqlstate: str | None
    condition: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """A body is to start again after `delay` seconds.

    `level` says from where: "savepoint", "transaction" or "statement".
    """

    name: ClassVar[str] = "retry.scheduled"
    operation: str
    level: str
    attempts: int
    delay: float
    sqlstate: str | None
    condition: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRefused(Event):
    """A transient failure was not retried: `reason` is "attempts", "budget" or "deadline"."""

    name: ClassVar[str] = "retry.refused"
    operation: str
    reason: str
    attempts: int
    sqlstate: str | None
    condition: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitInDoubt(Event):
    """COMMIT was sent and its answer was lost."""

    name: ClassVar[str] = "commit.in_doubt"
    operation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitResolved(Event):
    """A COMMIT in doubt was looked up: `outcome` is "committed", "aborted" or "unknown"."""

    name: ClassVar[str] = "commit.resolved"
    operation: str
    outcome: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemFailed(Event):
    """An item of a batch was set aside."""

    name: ClassVar[str] = "batch.item_failed"
    writer: str
    index: int
    sqlstate: str | None
    condition: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFinished(Event):
    """A batch has written what it could; its transaction is not committed yet."""

    name: ClassVar[str] = "batch.finished"
    writer: str
    total: int
    written: int
    failed: int
    retries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFinished(Event):
    """One chunk of an ingest is committed (or was found in the ledger: `skipped`)."""

    name: ClassVar[str] = "ingest.chunk_finished"
    chunk: int
    read: int
    written: int
    rejected: int
    skipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestFinished(Event):
    """An ingest has ended; `stopped` when it was cancelled or failed before the source's end."""

    name: ClassVar[str] = "ingest.finished"
    read: int
    written: int
    rejected: int
    chunks: int
    seconds: float
    stopped: bool
