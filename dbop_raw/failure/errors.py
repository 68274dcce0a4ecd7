"""Every error that dbop_raw raises itself.

    DbopError
    ├── OperationTimeout (TimeoutError)   a timeout or a deadline ran out
    ├── AcquireTimeout (TimeoutError)     no connection came free in time
    ├── EngineOverloaded                  too many callers wait already
    ├── EngineClosed                      the engine was closed
    ├── RetriesExhausted                  a retry gave up; the last error is its cause
    ├── CommitUnknown                     the answer to a COMMIT was lost
    ├── TransactionAborted                COMMIT was answered with ROLLBACK
    ├── TransactionMisuse                 a body touched the transaction that it runs in
    ├── RollbackFailed                    a rollback failed; keeps both errors
    ├── SkipLimitExceeded                 more items failed than are allowed to
    ├── GroupFailed                       an item was given up because another one of its group failed
    ├── LedgerMismatch                    a ledger was written for another source or target
    └── PolicyError (ValueError)          a value that is not allowed

All else is raised as it came: a permanent error of the server or the driver passes unchanged. No message of
ours contains SQL, a DSN, or a value of an item: those may be secret, and messages end in logs.

The errors can be pickled and copied with all their fields, so that they can travel between processes.
`__cause__` travels too, which Python leaves behind; a cause of that cause does where it is an error of ours.
What an error holds (an item, another exception) has to allow pickling by itself.
"""

from __future__ import annotations

from typing import Any, TypeVar

__all__ = [
    "AcquireTimeout",
    "CommitUnknown",
    "DbopError",
    "EngineClosed",
    "EngineOverloaded",
    "GroupFailed",
    "LedgerMismatch",
    "OperationTimeout",
    "PolicyError",
    "RetriesExhausted",
    "RollbackFailed",
    "SkipLimitExceeded",
    "TransactionAborted",
    "TransactionMisuse",
]

E = TypeVar("E", bound="DbopError")


def _rebuild(cls: type[E], args: tuple[Any, ...]) -> E:
    # Not cls(*args): the constructors take data by keyword, and `args` is the message that they made of it.
    error = cls.__new__(cls)
    error.args = args
    return error


class DbopError(Exception):
    """Base of every error that dbop_raw itself raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy by message and data, not by a second call of the constructor."""
        state = self.__dict__.copy()
        if self.__cause__ is not None:
            # Python's own way to set a state sets attributes, and this is one.
            state["__cause__"] = self.__cause__
        return _rebuild, (type(self), self.args), state


class OperationTimeout(DbopError, TimeoutError):
    """A `timeout` or a `deadline` ran out.

    It is raised by the scope that ran out, and by no other: a deadline further out raises its own, and a
    cancellation by the caller stays a cancellation.

    Args:
        seconds: The limit that ran out.
        by_server: Whether the server ended the statement, so that the connection stays usable.
    """

    def __init__(self, *, seconds: float, by_server: bool = False) -> None:
        how = (
            "the server ended the statement, and the connection stays usable"
            if by_server
            else "the client stopped waiting, for the server did not end it"
        )
        super().__init__(
            f"not done within {seconds:g} s: {how}; allow more time, or look for a slow statement or a lock"
        )
        self.seconds = seconds
        """The limit that ran out, in seconds."""
        self.by_server = by_server
        """Whether the server ended the statement (SQLSTATE 57014), so that the connection is usable."""


class AcquireTimeout(DbopError, TimeoutError):
    """No connection came free within `acquire_timeout`. Nothing was sent.

    Args:
        seconds: The `acquire_timeout` that ran out.
        size: Connections that the pool had.
        max_size: Connections that it may have.
        idle: Connections that nobody used.
        waiting: Callers that still waited for one, without this one.
        connecting: Connections that were being opened.
        holding: Connections that the calling task held already.
    """

    def __init__(
        self,
        *,
        seconds: float,
        size: int,
        max_size: int,
        idle: int,
        waiting: int,
        connecting: int = 0,
        holding: int = 0,
    ) -> None:
        if connecting:
            advice = (
                f"{connecting} more are being opened, so connecting is what is slow: wait longer than that "
                "takes, or open them beforehand (min_size)"
            )
        elif holding:
            advice = (
                f"this task holds {holding} of them already and waits for one more, perhaps for itself: call "
                "the inner operation with the connection that it was given, `await op(conn)`"
            )
        else:
            advice = "hold connections for a shorter time, make the pool larger, or wait longer"
        super().__init__(
            f"no connection within acquire_timeout={seconds:g} s: the pool has {size} of at most {max_size} "
            f"connections, {idle} idle, and {waiting} more callers wait; {advice}"
        )
        self.seconds = seconds
        """The `acquire_timeout` that ran out, in seconds."""
        self.size = size
        """Connections that the pool had."""
        self.max_size = max_size
        """Connections that it may have."""
        self.idle = idle
        """Connections that nobody used."""
        self.waiting = waiting
        """Callers that waited for one, without this one."""
        self.connecting = connecting
        """Connections that were being opened."""
        self.holding = holding
        """Connections that the task which waited held already."""


class EngineOverloaded(DbopError):
    """As many callers waited for a connection as `max_waiting` allows, so this one was refused at once.

    Nothing was sent.

    Args:
        waiting: Callers that waited.
        max_waiting: Callers that may wait.
        max_size: Connections that the pool may have.
    """

    def __init__(self, *, waiting: int, max_waiting: int, max_size: int) -> None:
        super().__init__(
            f"{waiting} callers wait for a connection, and max_waiting={max_waiting} allows no more (the "
            f"pool has at most {max_size} connections): send less at a time, or try again later"
        )
        self.waiting = waiting
        """Callers that waited."""
        self.max_waiting = max_waiting
        """Callers that may wait."""
        self.max_size = max_size
        """Connections that the pool may have."""


class EngineClosed(DbopError):
    """The engine was closed, or is closing. Nothing was sent."""

    def __init__(self) -> None:
        super().__init__("the engine is closed: run the work before close(), or open a new engine")


class RetriesExhausted(DbopError):
    """A retry gave up on an error that one more attempt might have repaired. `__cause__` is the last error.

    An outer retry takes it as final, so that layers of retries don't multiply.

    Args:
        attempts: How many times the body was started.
        elapsed: Seconds from the first start to the decision.
        reason: What allowed no more: "attempts", "budget" or "deadline".
    """

    def __init__(self, *, attempts: int, elapsed: float, reason: str) -> None:
        super().__init__(
            f"gave up after {attempts} attempts in {elapsed:.3g} s: {_GAVE_UP.get(reason, reason)}; "
            "the last error is the cause of this one"
        )
        self.attempts = attempts
        """How many times the body was started."""
        self.elapsed = elapsed
        """Seconds from the first start to the decision."""
        self.reason = reason
        """What allowed no more: "attempts" the policy, "budget" the engine's budget, "deadline" the time."""


_GAVE_UP = {
    "attempts": "the policy allows no more",
    "budget": "the engine's retry budget is spent, so too much fails at present",
    "deadline": "the next start would come after the deadline",
}


class CommitUnknown(DbopError):
    """The outcome of a transaction is not known: it may be committed, or not.

    Raised when COMMIT was sent and its answer was lost, or was an error that leaves the outcome open (see
    `dbop_raw.failure.refusal`); and for a statement under autocommit that was lost in the same way. The
    `__cause__` is that error.

    Args:
        looked_up: Whether the outcome was looked up, in vain; None where it can't be (autocommit).
    """

    def __init__(self, *, looked_up: bool | None = False) -> None:
        if looked_up:
            advice = "it was looked up, and the server could not be asked or could not tell"
        elif looked_up is None:
            advice = "in a transaction, run with autocommit left out, it could be looked up"
        else:
            advice = "or run it with resolve_commit=True, which finds out"
        super().__init__(
            "the answer was lost, so the work may be committed or not: look in the database before you do it "
            f"again; {advice}"
        )


class TransactionAborted(DbopError):
    """COMMIT was answered with ROLLBACK: the transaction had failed before, and nothing was written.

    PostgreSQL answers so, without an error, when a statement has failed and the program went on as if it had
    not (PostgreSQL, "COMMIT"; the protocol's transaction status "E").
    """

    def __init__(self) -> None:
        super().__init__(
            "COMMIT was answered with ROLLBACK, nothing was written: an error inside the transaction was "
            "caught and not raised again; let it pass, or put the part that may fail into savepoint(op)"
        )


class TransactionMisuse(DbopError):
    """A body interfered with the transaction that it runs in.

    It called `conn.transaction()`, for example, or sent COMMIT or ROLLBACK in its own SQL. The message names
    the body, and what to use instead.
    """


class RollbackFailed(DbopError):
    """A rollback failed or took too long, so the connection was closed; the server undoes the transaction.

    Args:
        original: The error that made the rollback necessary; None where it was asked for.
        rollback_error: What the rollback failed with.
        savepoint: Whether it was a rollback to a savepoint, in a transaction that might have gone on.
    """

    def __init__(
        self, *, original: BaseException | None, rollback_error: BaseException, savepoint: bool = False
    ) -> None:
        why = "" if original is None else f" after {type(original).__name__}"
        super().__init__(
            f"the rollback{why} failed with {type(rollback_error).__name__}: the connection was thrown away, "
            "and the server undoes the transaction by itself; see .original and .rollback_error"
        )
        self.original = original
        """The error that made the rollback necessary; None where it was asked for."""
        self.rollback_error = rollback_error
        """The error of the rollback itself."""
        self.savepoint = savepoint
        """Whether it was a rollback to a savepoint. A body might have caught `original` and gone on, so the
        transaction may be tried again on another connection, whatever `original` was."""


class SkipLimitExceeded(DbopError):
    """More items failed than `skip_limit` allows, so the whole transaction was rolled back.

    Args:
        limit: The `skip_limit`: how many items may fail.
        failed: The items that failed in this transaction, each with its index, error and verdict.
        total: How many items failed in all, where more than this transaction counts; None: those in `failed`.
    """

    def __init__(self, *, limit: int, failed: tuple[Any, ...], total: int | None = None) -> None:
        count = len(failed) if total is None else total
        super().__init__(
            f"{count} items failed, and skip_limit={limit} allows no more: the transaction was rolled back, "
            "none of its items is written; see .failed for the items and their errors"
        )
        self.limit = limit
        """The `skip_limit`: how many items may fail."""
        self.failed = failed
        """The items that failed in this transaction: `Failed`, with index, item, error and verdict."""


class GroupFailed(DbopError):
    """An item of a batch was not written because another item of its group failed.

    With `batch(…, together=key)`, items with an equal key stand or fall together. The item that was refused
    has its own error, and each of its companions has this one, with that error as its `__cause__`.

    Args:
        index: The position in the batch, from 0, of the item that was refused.
    """

    def __init__(self, *, index: int) -> None:
        super().__init__(
            f"not written, because item {index} of the same group failed: items with an equal key stand or "
            "fall together; the error of that item is the cause of this one"
        )
        self.index = index
        """The position in the batch, from 0, of the item that was refused."""


class LedgerMismatch(DbopError):
    """A ledger was written for another source, target or size of chunks: to go on would lose items silently.

    Raised before anything is written; where two processes use one ledger at the same time, before anything of
    the chunk that differs.

    Args:
        ledger: The ledger's name.
        field: What differs: "target", "columns", "size", or of a chunk its "items" or their "growth".
        was: What the ledger says; of items, how many there were.
        now: What it is now; of items, how many there are.
        chunk: The chunk whose items differ.
    """

    def __init__(
        self, *, ledger: str, field: str, was: object, now: object, chunk: int | None = None
    ) -> None:
        was_written, to_do = _MISMATCH[field]
        differs = was_written.format(was=was, now=now, chunk=chunk)
        super().__init__(f"the ledger {ledger!r} {differs}: {to_do}")
        self.ledger = ledger
        """The ledger's name."""
        self.field = field
        """What differs: "target", "columns", "size", "items" or "growth"."""
        self.was = was
        """What the ledger says; of items, how many the chunk had."""
        self.now = now
        """What it is now; of items, how many the chunk has, 0 where the source ends before it."""
        self.chunk = chunk
        """The chunk whose items differ, from 0; None where it is the job that does."""


_ANOTHER_JOB = (
    "use another ledger name for another job; to do this one from the start again, delete the ledger's rows "
    "and what they stand for"
)
_MISMATCH = {
    "target": ("was written for {was}, and now it is {now}", _ANOTHER_JOB),
    "columns": ("was written for the columns {was}, and now they are {now}", _ANOTHER_JOB),
    "size": ("was written with size={was}, and now size={now}", _ANOTHER_JOB),
    "items": (
        "was written for another source: chunk {chunk} had {was} items, and the {now} now are not the same",
        _ANOTHER_JOB,
    ),
    "growth": (
        "has {was} items of chunk {chunk}, and now there are {now}: it grew while another process read it",
        "run it again, and it goes on from there",
    ),
}


class PolicyError(DbopError, ValueError):
    """A policy, a limit, a name or an option is not allowed; the message names it, and what is allowed."""
