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
    "make_reference_table",
    "resolve_and_tell",
    "still_at_work",
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
        """Give SQL for the BEGIN message."""
        ...

    def capture(self, conn: Connection) -> None:
        """Take what the look-up needs to know; called when the transaction has begun, with no I/O."""
        ...

    async def at_work(self, conn: Connection) -> bool:
        """Ask on another connection: is the transaction's own session still at work on its COMMIT?"""
        ...

    async def look_up(self, conn: Connection) -> Resolution | None:
        """Ask on another connection what became of it; None: not known yet, ask again."""
        ...


async def _make_durable(conn: Connection) -> None:
    """COMMIT with WAL written: answered only when all WAL before it is as durable as the server is set.

    A session that waits for a synchronous standby and is ended makes its rows visible, though a fail-over
    still loses them. WAL is acknowledged in order, so what this COMMIT is told holds for the one in doubt.
    (PostgreSQL, "Synchronous Replication" and `pg_logical_emit_message`.)
    """
    await conn.execute(sql.join("BEGIN", _WAIT_FOR_STANDBY, _WRITE_WAL))
    await conn.execute(sql.COMMIT)


# A body may have asked for a standby though its session does not, so this COMMIT always does; where none is
# configured that means the local disk.
_WAIT_FOR_STANDBY = (
    "SELECT pg_catalog.set_config('synchronous_commit', CASE WHEN pg_catalog.current_setting("
    "'synchronous_commit') OPERATOR(pg_catalog.=) 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)"
)
_WRITE_WAL = "SELECT pg_catalog.pg_logical_emit_message(true, 'dbop_raw', ''::pg_catalog.text)"


# The session that holds the advisory lock of $1, which pg_locks shows in two halves.
_HOLDER = (
    "SELECT l.pid FROM pg_catalog.pg_locks AS l JOIN pg_catalog.pg_stat_activity AS a ON "
    "a.pid OPERATOR(pg_catalog.=) l.pid WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory' AND l.granted "
    "AND l.objsubid OPERATOR(pg_catalog.=) 1 AND ((l.classid::pg_catalog.int8 OPERATOR(pg_catalog.<<) 32) "
    "OPERATOR(pg_catalog.|) l.objid::pg_catalog.int8) OPERATOR(pg_catalog.=) $1::pg_catalog.int8"
)
# The session whose transaction has the id $1.
_WRITER = (
    "SELECT a.pid FROM pg_catalog.pg_stat_activity AS a "
    "WHERE a.backend_xid::pg_catalog.text OPERATOR(pg_catalog.=) $1"
)
_TERMINATE = "SELECT pg_catalog.pg_terminate_backend(found.pid) FROM"


class RowRecord:
    """A row that can be inserted only once: a commit token, or a chunk in a ledger.

    Its session is found by an advisory lock on a random number, which the transaction holds to its end; that
    others see in `pg_locks`, and it hides nothing, as a name for the session would.

    Args:
        insert: The INSERT, without ON CONFLICT.
    """

    def __init__(self, insert: str) -> None:
        self._insert = insert
        self._mark = int.from_bytes(uuid.uuid4().bytes[:8], signed=True)

    def opening(self) -> str:
        """Insert the row, in the transaction that it stands for."""
        return sql.join(f"SELECT pg_catalog.pg_advisory_xact_lock({self._mark})", self._insert)

    def capture(self, conn: Connection) -> None:
        """Nothing to take: the row is known."""

    async def at_work(self, conn: Connection) -> bool:
        """Ask for the session with our lock."""
        return bool(
            await conn.fetchval(
                f"SELECT EXISTS ({_HOLDER} AND a.state OPERATOR(pg_catalog.=) 'active')", self._mark
            )
        )

    async def look_up(self, conn: Connection) -> Resolution | None:
        """Insert the same row: it waits for the transaction in doubt, then tells.

        By ON CONFLICT DO NOTHING, and not by the fields of an error, which a distributed server leaves out.
        """
        limits = sql.set_limits((2 * _WAIT_MS, _WAIT_MS))
        try:
            tag = await conn.execute(sql.join("BEGIN", limits, f"{self._insert} ON CONFLICT DO NOTHING"))
        except (asyncpg.QueryCanceledError, asyncpg.LockNotAvailableError):
            await conn.execute(sql.ROLLBACK)
            await conn.fetch(f"{_TERMINATE} ({_HOLDER}) AS found", self._mark)
            return None
        await conn.execute(sql.ROLLBACK)
        if not tag.endswith(" 0"):
            return Resolution.ABORTED
        await _make_durable(conn)
        return Resolution.COMMITTED


# One number for the incarnation of a server: equal only as long as its transaction ids mean the same
# transactions. Its start, in microseconds, tells one cluster from another (the system identifier would too,
# but not every role may read it); the statistics' start tells of a crash, the timeline of a promotion.
_INCARNATION = (
    "pg_catalog.hashtextextended(pg_catalog.concat_ws(',', "
    "pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8), "
    "pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time()), "
    "(SELECT pg_catalog.date_part('epoch', stats_reset) FROM pg_catalog.pg_stat_bgwriter)), 0)"
)


# A session's name has 63 bytes: so many of the user's own stay in front, for a person who looks at the
# server; behind them are our mark, two numbers of 16 hexadecimal digits at the most, and two separators.
_NAME_KEPT = 19
_PREFIX = " dbop_raw:"


class XidRecord:
    """A transaction's id and its server's incarnation, which the server reports at no round trip.

    They stand behind the session's own name in `application_name` up to the transaction's end: of what a
    server reports by itself, nothing else can be chosen freely.
    """

    def __init__(self) -> None:
        self._incarnation: int | None = None
        self._xid: int | None = None

    def opening(self) -> str:
        """Have the server report both; nothing on a standby, which has no ids to give."""
        mark = (
            f"pg_catalog.concat('{_PREFIX}', pg_catalog.to_hex({_INCARNATION}), ':', "
            "pg_catalog.to_hex(pg_catalog.pg_current_xact_id()::pg_catalog.text::pg_catalog.int8))"
        )
        name = f"pg_catalog.left(pg_catalog.current_setting('application_name'), {_NAME_KEPT})"
        return (
            f"SELECT pg_catalog.set_config('application_name', pg_catalog.concat({name}, {mark}), true) "
            "WHERE NOT pg_catalog.pg_is_in_recovery()"
        )

    def capture(self, conn: Connection) -> None:
        """Read what the server has reported."""
        reported = str(getattr(conn.get_settings(), "application_name", "") or "")
        _, found, numbers = reported.rpartition(_PREFIX)
        incarnation, _, xid = numbers.partition(":")
        self._incarnation = self._xid = None
        if found and incarnation and xid:
            self._xid, unsigned = int(xid, 16), int(incarnation, 16)
            # As the server has it: signed.
            self._incarnation = unsigned - 2**64 if unsigned >= 2**63 else unsigned

    @property
    def _xid_of_pid(self) -> str:
        """As `backend_xid` shows it: without the epoch."""
        return str((self._xid or 0) % 2**32)

    async def at_work(self, conn: Connection) -> bool:
        """Ask for a session with this transaction."""
        if self._xid is None:
            return False
        query = f"SELECT EXISTS ({_WRITER} AND a.state OPERATOR(pg_catalog.=) 'active')"
        return bool(await conn.fetchval(query, self._xid_of_pid))

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
            await conn.fetch(f"{_TERMINATE} ({_WRITER}) AS found", self._xid_of_pid)
            return None
        if row["status"] == "committed":
            await _make_durable(conn)
            return Resolution.COMMITTED
        return Resolution.ABORTED if row["status"] == "aborted" else Resolution.UNKNOWN


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
    reference: bool = False
    """For Citus: `install` makes it a reference table. A transaction on one worker commits there first and
    without two phases, so a token in a local table may say that it did not."""

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
        if self.reference:
            await make_reference_table(conn, sql.relation(self.table, self.schema))

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
        return RowRecord(f"INSERT INTO {relation} (token) VALUES ('{uuid.uuid4()}')")


# NAMEDATALEN - 1
_LONGEST_NAME = 63


async def make_reference_table(conn: Connection, relation: str) -> None:
    """Make `relation` a reference table of Citus, unless it is one; `PolicyError` where there is no Citus."""
    if not await conn.fetchval("SELECT pg_catalog.to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL"):
        raise PolicyError(
            "reference=True needs Citus, which this database has not got: leave it out, or CREATE EXTENSION "
            "citus"
        )
    known = (
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_dist_partition "
        "WHERE logicalrelid OPERATOR(pg_catalog.=) $1::pg_catalog.text::pg_catalog.regclass)"
    )
    if not await conn.fetchval(known, relation):
        await conn.execute("SELECT create_reference_table($1)", relation)


async def still_at_work(record: CommitRecord, capacity: Capacity) -> bool:
    """Is the session seen to be at work on a COMMIT whose answer is late? False where nobody can tell."""
    try:
        checkout = await capacity.acquire(shed=False)
    except Exception:  # noqa: BLE001 - then it counts as lost, and is looked up
        return False
    try:
        found = await record.at_work(checkout.conn)
    except BaseException as exc:
        verdict = classify(exc, overrides=capacity.settings.verdicts)
        await capacity.release(checkout, error=verdict, lost=True)
        if not isinstance(exc, Exception):
            raise
        return False
    await capacity.release(checkout)
    return found


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
