"""The ledger: which chunks of a source are in, what they were, and what became of them.

It is a table, with a row for each chunk that is inserted in the chunk's own transaction. So a row stands or
falls with its chunk; two processes at the same chunk meet at its key, and only one of them goes on; a COMMIT
in doubt is looked up by the row; and what the rows say of written and rejected items is what is in the
target.

A row also knows what was ingested: target, columns, size of a chunk, and a digest of the chunk's items.
Another source or target under the same name is refused; without that, it would pass for done. What is not
known (of a row that an earlier version wrote, or where a writer can't say what it writes to) is NULL, and is
not compared.

A source is cut where the ledger's chunks were cut. So one that has grown since is taken up at its growth: its
last chunk, which was shorter then, is cut as short again, and what follows it are new chunks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dbop_raw.driver import sql
from dbop_raw.driver.connection import Connection
from dbop_raw.engine.commit import RowRecord, make_reference_table
from dbop_raw.failure.errors import LedgerMismatch, PolicyError
from dbop_raw.ingestion.digest import digest

__all__ = ["Book", "ChunkRecord", "Entry", "Ledger", "Target", "read_book"]

# Each column and its type. What came after version 0.1 may be NULL, in the rows that are older.
_COLUMNS = {
    "name": "text NOT NULL",
    "chunk": "bigint NOT NULL",
    "size": "integer NOT NULL",
    "items": "integer NOT NULL",
    "at": "timestamptz NOT NULL DEFAULT pg_catalog.now()",
    "part": "text NOT NULL DEFAULT ''",
    "digest": "bytea",
    "target": "text",
    "columns": "text[]",
    "written": "integer",
    "rejected": "integer",
    "by_sqlstate": "jsonb",
}
_KEY = "PRIMARY KEY (name, part, chunk)"


@dataclass(frozen=True, slots=True)
class Ledger:
    """Lets an ingest go on where it stopped: nothing is written twice, and nothing is lost.

    Run the same source again with the same `size`, target and ledger's name. A source that has grown goes on
    at its growth; another source, target or size is a `LedgerMismatch`.

    The table is made when it is not there; a role that may not make it needs SELECT, INSERT and UPDATE on one
    that `install` has made. To do a job from the start again, delete the ledger's rows (`DELETE FROM
    dbop_raw_ledger WHERE name = '…'`) and what they stand for. To go on with another statement or function
    that does the same work, set the target of its rows to NULL: it is not compared then.
    """

    name: str
    """One ledger for each source and target."""
    table: str = "dbop_raw_ledger"
    schema: str | None = None
    """None: where the search_path finds it."""
    reference: bool = field(default=False, kw_only=True)
    """Make it a reference table of Citus: a row that is local there does not stand or fall with a chunk."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or "\0" in self.name:
            raise PolicyError(
                f"Ledger(name={self.name!r}): give a name for this source, such as 'events-2026-11'"
            )
        sql.relation(self.table, self.schema)

    @property
    def relation(self) -> str:
        """The table's name, quoted."""
        return sql.relation(self.table, self.schema)

    async def install(self, conn: Connection) -> None:
        """Create the table, or bring one of an earlier version up to date: an operation.

        Changes nothing, and needs no privilege for it, where that is done already.

        Raises:
            PolicyError: `reference` is asked for, and the server has no Citus.
        """
        if not await _has_columns(conn, self.relation):
            # In one message, and one process at a time: IF NOT EXISTS does not see what another transaction
            # is making now.
            lock = hashlib.blake2b(self.relation.encode(), digest_size=8).digest()
            alone = f"SELECT pg_catalog.pg_advisory_xact_lock({int.from_bytes(lock, signed=True)})"
            columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
            create = f"CREATE TABLE IF NOT EXISTS {self.relation} ({columns}, {_KEY})"
            await conn.execute(sql.join(alone, create, *await _changes(conn, self.relation)))
        if self.reference:
            await make_reference_table(conn, self.relation)


@dataclass(frozen=True, slots=True)
class Target:
    """What chunks are written to, as far as that can be told."""

    name: str | None = None
    """A table's, quoted and with its schema; or a statement's digest, for its text may hold secrets."""
    columns: tuple[str, ...] | None = None

    @classmethod
    def of(cls, write: object) -> Target:
        """Ask what a batch writes to; of a function of the user's own nothing is known.

        Args:
            write: What `ingest` was given.
        """
        writer = getattr(write, "writer", None)
        if (table := getattr(writer, "target", None)) is not None:
            return cls(table.relation, table.columns)
        if isinstance(statement := getattr(writer, "sql", None), str):
            text = " ".join(statement.split())
            return cls(f"statement {hashlib.sha256(text.encode()).hexdigest()[:16]}")
        return cls()

    async def resolved(self, conn: Connection) -> Target:
        """Give the same with its table's schema, whatever the search_path is next time: an operation."""
        if self.columns is None:
            return self
        rows = await _read(
            conn,
            "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n "
            "ON n.oid OPERATOR(pg_catalog.=) c.relnamespace WHERE c.oid OPERATOR(pg_catalog.=) "
            f"pg_catalog.to_regclass({sql.literal(self.name or '')})::pg_catalog.oid",
        )
        # One that is not there is an error of the first chunk.
        return replace(self, name=sql.relation(rows[0]["relname"], rows[0]["nspname"])) if rows else self


@dataclass(frozen=True, slots=True)
class Entry:
    """What the ledger knows of a chunk that is in."""

    items: int
    digest: bytes | None
    """None: an earlier version wrote it."""

    def is_of(self, items: Sequence[Any]) -> bool:
        """Are these the items of that chunk?"""
        return len(items) == self.items and self.digest in {None, digest(items)}


@dataclass(frozen=True, slots=True)
class Book:
    """The ledger of one job: what it knew when the job began, and how it is told of more."""

    ledger: Ledger
    target: Target
    size: int
    entries: Mapping[int, Entry]
    """By the chunk's number."""

    @property
    def last(self) -> int:
        """The highest number of a chunk that is in; -1 where none is."""
        return max(self.entries, default=-1)

    def check(self, number: int, items: Sequence[Any], entry: Entry) -> None:
        """Make sure that a chunk is the one that the ledger has.

        Args:
            number: The chunk's.
            items: What the source gives for it now; none where it ends before.
            entry: What the ledger has.

        Raises:
            LedgerMismatch: It is another one.
        """
        if entry.is_of(items):
            return
        grown = len(items) > entry.items and entry.is_of(items[: entry.items])
        field = "growth" if grown else "items"
        raise LedgerMismatch(
            ledger=self.ledger.name, field=field, was=entry.items, now=len(items), chunk=number
        )

    async def find(self, conn: Connection, number: int) -> Entry | None:
        """Look up one chunk as it is now, which another process may have written: an operation."""
        ledger = self.ledger
        rows = await _read(
            conn,
            f"SELECT size, target, columns, items, {_DIGEST} {_of(ledger)} "
            f"AND chunk OPERATOR(pg_catalog.=) {number:d}",
        )
        if not rows:
            return None
        _check_job(ledger, rows[0], self.target, self.size)
        return _entry(rows[0])

    def record(self, number: int, items: Sequence[Any]) -> ChunkRecord:
        """Make the row of a chunk that is to be written.

        Args:
            number: The chunk's.
            items: As the source gave them.
        """
        return ChunkRecord(self, number, items)


async def read_book(ledger: Ledger, conn: Connection, target: Target, size: int) -> Book | None:
    """Read what a ledger knows of a job: an operation.

    Args:
        ledger: The ledger.
        conn: The operation's connection.
        target: What is written to.
        size: Items in a chunk.

    Returns:
        The job's book, or None where `install` has to come first.

    Raises:
        LedgerMismatch: The ledger was written for another target, other columns, or with another size.
    """
    relation = ledger.relation
    if not await _has_columns(conn, relation):
        return None
    target = await target.resolved(conn)
    for row in await _read(conn, f"SELECT DISTINCT size, target, columns {_of(ledger)}"):
        _check_job(ledger, row, target, size)
    rows = await _read(conn, f"SELECT chunk, items, {_DIGEST} {_of(ledger)}")
    return Book(ledger, target, size, {row["chunk"]: _entry(row) for row in rows})


_DIGEST = "pg_catalog.encode(digest, 'hex') AS digest"


def _of(ledger: Ledger) -> str:
    """SQL for the rows of one ledger."""
    return (
        f"FROM {ledger.relation} WHERE name OPERATOR(pg_catalog.=) {sql.literal(ledger.name)} "
        "AND part OPERATOR(pg_catalog.=) ''"
    )


def _entry(row: Mapping[str, Any]) -> Entry:
    return Entry(row["items"], None if row["digest"] is None else bytes.fromhex(row["digest"]))


async def _read(conn: Connection, query: str) -> list[dict[str, Any]]:
    """Fetch rows past whatever codecs the user has set: as one piece of JSON, in bytes."""
    found: bytes = await conn.fetchval(
        "SELECT pg_catalog.convert_to(COALESCE(pg_catalog.json_agg(q)::pg_catalog.text, '[]'), 'UTF8') "
        f"FROM ({query}) AS q"
    )
    rows: list[dict[str, Any]] = json.loads(found)
    return rows


def _check_job(ledger: Ledger, row: Mapping[str, Any], target: Target, size: int) -> None:
    """Raise `LedgerMismatch` for a row of another job; what is not known of either is not compared."""
    columns = None if row["columns"] is None else tuple(row["columns"])
    for name, was, now in (
        ("size", row["size"], size),
        ("target", row["target"], target.name),
        ("columns", columns, target.columns),
    ):
        if was is not None and now is not None and was != now:
            raise LedgerMismatch(ledger=ledger.name, field=name, was=was, now=now)


async def _has_columns(conn: Connection, relation: str) -> bool:
    """Is the table there, and of this version?"""
    found = await _read(
        conn,
        "SELECT attname FROM pg_catalog.pg_attribute WHERE attrelid OPERATOR(pg_catalog.=) "
        f"pg_catalog.to_regclass({sql.literal(relation)})::pg_catalog.oid AND NOT attisdropped",
    )
    return {row["attname"] for row in found}.issuperset(_COLUMNS)


async def _changes(conn: Connection, relation: str) -> list[str]:
    """Say what brings a table of an earlier version up to date; it can be done twice."""
    keys = await _read(
        conn,
        "SELECT conname FROM pg_catalog.pg_constraint WHERE conrelid OPERATOR(pg_catalog.=) "
        f"pg_catalog.to_regclass({sql.literal(relation)})::pg_catalog.oid "
        "AND contype OPERATOR(pg_catalog.=) 'p'::\"char\"",
    )
    if not keys:
        return []
    key = keys[0]["conname"]
    columns = ", ".join(f"ADD COLUMN IF NOT EXISTS {name} {kind}" for name, kind in _COLUMNS.items())
    return [
        f"ALTER TABLE {relation} {columns}",
        f"ALTER TABLE {relation} DROP CONSTRAINT IF EXISTS {sql.identifier(key)}, ADD {_KEY}",
    ]


class ChunkRecord(RowRecord):
    """The row of one chunk: inserted as its transaction begins, as if no item will be rejected."""

    def __init__(self, book: Book, number: int, items: Sequence[Any]) -> None:
        ledger, target = book.ledger, book.target
        columns = target.columns and ", ".join(map(sql.literal, target.columns))
        values = {
            "name": sql.literal(ledger.name),
            "chunk": f"{number:d}",
            "size": f"{book.size:d}",
            "items": f"{len(items):d}",
            "digest": f"pg_catalog.decode('{digest(items).hex()}', 'hex')",
            "target": "NULL" if target.name is None else sql.literal(target.name),
            "columns": f"ARRAY[{columns}]::text[]" if columns else "NULL",
            "written": f"{len(items):d}",
            "rejected": "0",
            "by_sqlstate": "'{}'",
        }
        super().__init__(
            f"INSERT INTO {ledger.relation} ({', '.join(values)}) VALUES ({', '.join(values.values())})"
        )
        self._of_this = (
            f"name OPERATOR(pg_catalog.=) {values['name']} AND part OPERATOR(pg_catalog.=) '' "
            f"AND chunk OPERATOR(pg_catalog.=) {number:d}"
        )
        self._relation = ledger.relation

    def outcome(self, written: int, by_sqlstate: Mapping[str, int]) -> str:
        """Give the SQL that tells what became of the chunk's items.

        Args:
            written: How many are in the target.
            by_sqlstate: How many were rejected, by SQLSTATE or the exception's name.
        """
        rejected = sum(by_sqlstate.values())
        return (
            f"UPDATE {self._relation} SET written = {written:d}, rejected = {rejected:d}, "
            f"by_sqlstate = {sql.literal(json.dumps(by_sqlstate))} WHERE {self._of_this}"
        )
