"""Control SQL as text: BEGIN, SET LOCAL, SAVEPOINT and identifiers.

Pure: it builds strings and sends nothing.

Sources: PostgreSQL's pages on BEGIN, SET TRANSACTION, SAVEPOINT, SET, and "Lexical Structure" for the
quoting.
"""

from __future__ import annotations

import math
from typing import Literal

from dbop_raw.failure.errors import PolicyError

__all__ = [
    "CHECK_DEFERRED",
    "COMMIT",
    "ISOLATION_LEVELS",
    "ROLLBACK",
    "Isolation",
    "Limits",
    "begin",
    "identifier",
    "join",
    "literal",
    "relation",
    "release",
    "restore_limits",
    "rollback_to",
    "save_limits",
    "savepoint",
    "server_milliseconds",
    "set_limits",
]

Isolation = Literal["read committed", "repeatable read", "serializable"]
ISOLATION_LEVELS: tuple[Isolation, ...] = ("read committed", "repeatable read", "serializable")

COMMIT = "COMMIT"
ROLLBACK = "ROLLBACK"
CHECK_DEFERRED = "SET CONSTRAINTS ALL IMMEDIATE"

Limits = tuple[int | None, int | None]
"""`statement_timeout` and `lock_timeout` in milliseconds; None leaves the server's own."""

# PostgreSQL keeps both settings in a 32-bit integer of milliseconds.
_LARGEST_MS = 2**31 - 1
# The server is told this share less than the client, within these bounds (seconds), so that its answer is
# here before the client gives up.
_MARGIN, _LEAST_MARGIN, _LARGEST_MARGIN = 0.05, 0.01, 0.25


def join(*statements: str) -> str:
    """Several statements as one message of the simple protocol: one round trip."""
    return "; ".join(statements)


def savepoint(depth: int) -> str:
    """SAVEPOINT, named by its depth: few names, so pg_stat_statements sees few statements.

    Not one name for all: where a SAVEPOINT was not set or a RELEASE not done (a failed transaction, a
    cancelled message), ROLLBACK TO must fail, and not undo the work of one further out.
    """
    return f"SAVEPOINT dbop_raw_{depth}"


def rollback_to(depth: int) -> str:
    """ROLLBACK TO the savepoint of that depth, which stays open; those inside of it are gone."""
    return f"ROLLBACK TO SAVEPOINT dbop_raw_{depth}"


def release(depth: int) -> str:
    """RELEASE the savepoint of that depth, and those inside of it."""
    return f"RELEASE SAVEPOINT dbop_raw_{depth}"


def begin(isolation: Isolation | None = None, *, readonly: bool = False, deferrable: bool = False) -> str:
    """BEGIN with its modes; None leaves the session's default isolation.

    `deferrable` means something only for a serializable read-only transaction (PostgreSQL, "SET
    TRANSACTION"), so anything else is a `PolicyError`.
    """
    if isolation is not None and isolation not in ISOLATION_LEVELS:
        message = (
            f"isolation={isolation!r} is not known: use one of {', '.join(map(repr, ISOLATION_LEVELS))}, or "
            "None"
        )
        raise PolicyError(message)
    if deferrable and not (readonly and isolation == "serializable"):
        message = (
            "deferrable=True needs isolation='serializable' and readonly=True: PostgreSQL ignores it "
            "elsewhere"
        )
        raise PolicyError(message)
    words = ["BEGIN"]
    if isolation is not None:
        words.append(f"ISOLATION LEVEL {isolation.upper()}")
    if readonly:
        words.append("READ ONLY")
    if deferrable:
        words.append("DEFERRABLE")
    return " ".join(words)


def server_milliseconds(seconds: float) -> int | None:
    """What to tell the server when the client stops waiting in `seconds`.

    A little less, whole milliseconds, never 0.

    0 would switch the timeout off (which is how a rounded-down half second waits for ever). None for an
    infinite wait.
    """
    if math.isinf(seconds) and seconds > 0:
        return None
    margin = min(max(seconds * _MARGIN, _LEAST_MARGIN), _LARGEST_MARGIN)
    milliseconds = (seconds - margin) * 1000
    return int(min(max(milliseconds, 1), _LARGEST_MS))


def set_limits(limits: Limits) -> str:
    """SET LOCAL for the limits that are given; empty when none is."""
    statement, lock = limits
    parts = []
    if statement is not None:
        parts.append(f"SET LOCAL statement_timeout = {statement}")
    if lock is not None:
        parts.append(f"SET LOCAL lock_timeout = {lock}")
    return join(*parts)


def save_limits() -> str:
    """Keep the two settings as they are now, for `restore_limits` later in the same transaction."""
    return (
        "SELECT pg_catalog.set_config('dbop_raw.' OPERATOR(pg_catalog.||) n, "
        "pg_catalog.current_setting(n), true) "
        "FROM pg_catalog.unnest('{statement_timeout,lock_timeout}'::pg_catalog.text[]) AS n"
    )


def restore_limits() -> str:
    """Put back what `save_limits` kept."""
    return (
        "SELECT pg_catalog.set_config(n, "
        "pg_catalog.current_setting('dbop_raw.' OPERATOR(pg_catalog.||) n), true) "
        "FROM pg_catalog.unnest('{statement_timeout,lock_timeout}'::pg_catalog.text[]) AS n"
    )


def identifier(name: str) -> str:
    """One identifier, quoted: taken literally, so that `a.b` is one name with a dot in it.

    Raises `PolicyError` for an empty name or one with a NUL, which PostgreSQL has no way to write.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        message = f"{name!r} is not an SQL identifier: give a non-empty string without a NUL character"
        raise PolicyError(message)
    return '"' + name.replace('"', '""') + '"'


def relation(table: str, schema: str | None = None) -> str:
    """A table's name, quoted, with its schema where one is given."""
    return identifier(table) if schema is None else f"{identifier(schema)}.{identifier(table)}"


def literal(text: str) -> str:
    """A string literal that means `text` whatever `standard_conforming_strings` says."""
    if "\0" in text:
        message = f"{text!r} has a NUL character, which no PostgreSQL string can hold"
        raise PolicyError(message)
    doubled = text.replace("'", "''")
    if "\\" in text:
        escaped = doubled.replace("\\", "\\\\")
        return f" E'{escaped}'"
    return f"'{doubled}'"
