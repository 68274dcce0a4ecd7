"""COMMIT in doubt: its answer was lost, so look up what became of it, and never guess.

A *token* row, written by the transaction itself, can't lie: whoever inserts the same token again waits while
the first transaction is open, then gets 23505 (it committed) or succeeds (it did not, and never will). It
survives a crash and a fail-over.

The *transaction id* costs no table, but `pg_xact_status` can lie: an id whose WAL was not flushed is handed
out again after a crash or a fail-over, and is then reported for somebody else's transaction. So its answer
counts only from the same incarnation of the server: system identifier, timeline, start time, and the time at
which the background writer's statistics began (which a crash recovery resets).
"""

from __future__ import annotations

import enum
import uuid
from dataclasses import dataclass
from typing import Protocol

import anyio
import asyncpg

from dbop_raw.driver import sql
from dbop_raw.driver.connection import Connection
from dbop_raw.engine.capacity import Capacity
from dbop_raw.events import CommitResolved
from dbop_raw.failure.classify import classify
from dbop_raw.failure.errors import EngineClosed, PolicyError, TransactionAborted
from dbop_raw.failure.policy import positive_seconds
from dbop_raw.failure.sqlstate import Repair

__all__ = [
    "CommitRecord",
    "CommitTokens",
    "NotCommitted",
    "Resolution",
    "RowRecord",
    "XidRecord",
    "resolve_and_tell",
]

# The pause (seconds) between two look-ups, while the server is not there or the transaction is still open.
_PAUSE = 0.05

# A statement of a look-up waits so long (milliseconds) for the transaction in doubt before its abandoned
# session is ended.
_WAIT_MS = 500


class Resolution(enum.Enum):
    """What became of a COMMIT in doubt."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"


class NotCommitted(TransactionAborted):
    """A COMMIT in doubt was settled: nothing is committed, and nothing can be. The run starts again."""

    def __init__(self) -> None:
        Exception.__init__(
            self, "the answer to COMMIT was lost; the look-up shows that nothing was committed"
        )


class CommitRecord(Protocol):
    """What a transaction leaves behind so that its outcome can be looked up."""

    def opening(self) -> str:
        """SQL for the BEGIN message."""
        ...

    def capture(self, conn: Connection) -> None:
        """Read what the server reported of the opening; called just before COMMIT, with no I/O."""
        ...

    async def look_up(self, conn: Connection) -> Resolution | None:
        """Ask on another connection; None: not known yet, ask again."""
        ...


def _label(text: str) -> str:
    """SQL that names the session, so that a session left hanging can be found."""
    return f"SELECT pg_catalog.set_config('application_name', {text}, true)"


class RowRecord:
    """A row that can be inserted only once: a commit token, or a chunk in a ledger."""

    def __init__(self, insert: str, table: str, schema: str | None) -> None:
        self._insert = insert
        self._table = table
        self._schema = schema
        self._mark = f"dbop_raw:{uuid.uuid4().hex}"

    def opening(self) -> str:
        """Insert the row, in the transaction that it stands for."""
        return sql.join(_label(sql.literal(self._mark)), self._insert)

    def capture(self, conn: Connection) -> None:
        """Nothing to read: the row is known."""

    def is_duplicate(self, exc: BaseException) -> bool:
        """Does `exc` say that the row is there already?"""
        return (
            isinstance(exc, asyncpg.UniqueViolationError)
            and exc.table_name == self._table
            and (self._schema is None or exc.schema_name == self._schema)
        )

    async def look_up(self, conn: Connection) -> Resolution | None:
        """Insert the same row: it waits for the transaction in doubt, then tells."""
        limits = sql.set_limits((2 * _WAIT_MS, _WAIT_MS))
        try:
            await conn.execute(sql.join("BEGIN", limits, self._insert))
        except asyncpg.UniqueViolationError as exc:
            await conn.execute(sql.ROLLBACK)
            return Resolution.COMMITTED if self.is_duplicate(exc) else Resolution.UNKNOWN
        except (asyncpg.QueryCanceledError, asyncpg.LockNotAvailableError):
            await conn.execute(sql.ROLLBACK)
            await conn.execute(
                "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity "
                "WHERE application_name OPERATOR(pg_catalog.=) $1 AND pid OPERATOR(pg_catalog.<>) "
                "pg_catalog.pg_backend_pid()",
                self._mark,
            )
            return None
        await conn.execute(sql.ROLLBACK)
        return Resolution.ABORTED


# One number for the incarnation of a server: equal only as long as its transaction ids mean the same
# transactions.
_INCARNATION = (
    "pg_catalog.hashtextextended(pg_catalog.concat_ws(',', "
    "(SELECT system_identifier FROM pg_catalog.pg_control_system()), "
    "pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8), "
    "pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time()), "
    "(SELECT pg_catalog.date_part('epoch', stats_reset) FROM pg_catalog.pg_stat_bgwriter)), 0)"
)
_PREFIX = "dbop_raw:"


class XidRecord:
    """A transaction's id and its server's incarnation, as the server reports them in `application_name`."""

    def __init__(self) -> None:
        self._incarnation: int | None = None
        self._xid: int | None = None

    def opening(self) -> str:
        """Have the server report both.

        No round trip of its own, and nothing on a standby, which has no ids to give.
        """
        return _label(
            f"CASE WHEN pg_catalog.pg_is_in_recovery() THEN '{_PREFIX}' ELSE pg_catalog.concat_ws(':', "
            f"'dbop_raw', {_INCARNATION}, pg_catalog.pg_current_xact_id()) END"
        )

    def capture(self, conn: Connection) -> None:
        """Read what the server reported."""
        reported = str(getattr(conn.get_settings(), "application_name", "") or "")
        prefix, _, rest = reported.partition(":")
        incarnation, _, xid = rest.partition(":")
        if prefix == "dbop_raw" and incarnation and xid:
            self._incarnation, self._xid = int(incarnation), int(xid)

    async def look_up(self, conn: Connection) -> Resolution | None:
        """Ask `pg_xact_status`, if the server that answers is the one that gave the id."""
        if self._xid is None:
            return Resolution.UNKNOWN
        if await conn.fetchval("SELECT pg_catalog.pg_is_in_recovery()"):
            return None
        row = await conn.fetchrow(
            "SELECT same, CASE WHEN same THEN "
            "pg_catalog.pg_xact_status($2::pg_catalog.text::pg_catalog.xid8) END AS status "
            f"FROM (SELECT {_INCARNATION} OPERATOR(pg_catalog.=) $1 AS same) AS s",
            self._incarnation,
            str(self._xid),
        )
        if not row["same"]:
            return Resolution.UNKNOWN
        if row["status"] == "in progress":
            await conn.execute(
                "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity "
                "WHERE backend_xid::pg_catalog.text OPERATOR(pg_catalog.=) $1",
                str(self._xid % 2**32),
            )
            return None
        return {"committed": Resolution.COMMITTED, "aborted": Resolution.ABORTED}.get(
            row["status"], Resolution.UNKNOWN
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitTokens:
    """A table of tokens, one row for each transaction that is run with `resolve_commit=True`.

    Create it once with `await engine.run(tokens.install)`, and call `await engine.run(tokens.purge)` from
    time to time.
    """

    table: str = "dbop_raw_commits"
    schema: str | None = None
    """None: where the search_path finds it."""
    keep: float = 86_400.0
    """Seconds that `purge` keeps a token: longer than any COMMIT may stay in doubt."""

    def __post_init__(self) -> None:
        sql.relation(self.table, self.schema)
        positive_seconds("keep", self.keep)
        if len(self.table.encode()) > _LONGEST_NAME:
            message = (
                f"table={self.table!r} is longer than PostgreSQL's {_LONGEST_NAME} bytes: it would be cut, "
                "and not be recognised"
            )
            raise PolicyError(message)

    async def install(self, conn: Connection) -> None:
        """Create the table if it is not there: an operation."""
        await conn.execute(
            f"CREATE TABLE IF NOT EXISTS {sql.relation(self.table, self.schema)} "
            "(token uuid PRIMARY KEY, at timestamptz NOT NULL DEFAULT pg_catalog.now())"
        )
        await conn.execute(
            f"CREATE INDEX IF NOT EXISTS {sql.identifier(self.table[:50] + '_at')} ON "
            f"{sql.relation(self.table, self.schema)} (at)"
        )

    async def purge(self, conn: Connection) -> int:
        """Delete the tokens older than `keep` seconds: an operation; gives how many."""
        tag = await conn.execute(
            f"DELETE FROM {sql.relation(self.table, self.schema)} WHERE at "
            "OPERATOR(pg_catalog.<) (pg_catalog.now() OPERATOR(pg_catalog.-) "
            "pg_catalog.make_interval(secs => $1))",
            self.keep,
        )
        return int(tag.rpartition(" ")[2])

    def record(self) -> RowRecord:
        """A new token, for one transaction."""
        relation = sql.relation(self.table, self.schema)
        return RowRecord(f"INSERT INTO {relation} (token) VALUES ('{uuid.uuid4()}')", self.table, self.schema)


# NAMEDATALEN - 1
_LONGEST_NAME = 63


async def resolve_and_tell(
    record: CommitRecord, capacity: Capacity, deadline: float, name: str
) -> Resolution:
    """Look up what became of a COMMIT in doubt, count it, and tell the observer.

    Args:
        record: What the transaction left behind.
        capacity: Where a connection to ask on comes from.
        deadline: The event loop's time at which the run is over; the bound for a look-up may come before.
        name: The operation's, for the event.
    """
    settings, counters = capacity.settings, capacity.counters
    deadline = min(deadline, settings.clock() + settings.bounds.resolve)
    resolution = await _resolve(record, capacity, deadline)
    counters.commits_found_committed += resolution is Resolution.COMMITTED
    counters.commits_found_aborted += resolution is Resolution.ABORTED
    if settings.observer is not None:
        settings.emit(CommitResolved(operation=name, outcome=resolution.value))
    return resolution


async def _resolve(record: CommitRecord, capacity: Capacity, deadline: float) -> Resolution:
    """Ask until there is an answer; a server that is not there yet is asked again.

    Args:
        record: What the transaction left behind.
        capacity: Where a connection to ask on comes from.
        deadline: The event loop's time at which it is given up: then the outcome is unknown.
    """
    with anyio.CancelScope(deadline=deadline):
        while True:
            answer = await _ask(record, capacity, deadline)
            if answer is not None:
                return answer
            await anyio.sleep(_PAUSE)
    return Resolution.UNKNOWN


async def _ask(record: CommitRecord, capacity: Capacity, deadline: float) -> Resolution | None:
    checkout = None
    try:
        # Not shed: the caller has been let in already.
        checkout = await capacity.acquire(shed=False)
        answer = await record.look_up(checkout.conn)
    except BaseException as exc:
        verdict = classify(exc, overrides=capacity.settings.verdicts)
        if checkout is not None:
            await capacity.release(checkout, deadline, error=verdict, lost=True)
        if not isinstance(exc, Exception):
            raise
        if isinstance(exc, EngineClosed):
            # Not raised: it says that nothing was sent, but a COMMIT was.
            return Resolution.UNKNOWN
        # A permanent ERROR of the server (no such table, no such privilege) will not go away; all else may.
        permanent = (
            isinstance(exc, asyncpg.PostgresError) and verdict.repair is Repair.NEVER and not verdict.evict
        )
        return Resolution.UNKNOWN if permanent else None
    await capacity.release(checkout, deadline)
    return answer
