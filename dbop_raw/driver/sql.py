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
    "UNLIMITED",
    "Isolation",
    "Limits",
    "begin",
    "identifier",
    "join",
    "limits",
    "literal",
    "relation",
    "release",
    "rollback_to",
    "savepoint",
    "server_milliseconds",
    "set_limits",
    "track_limits",
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


def limits(seconds: float, lock: int | None) -> Limits:
    """Give the server's limits for a statement that has to be done in `seconds`, which may be infinite.

    Args:
        seconds: Until the client stops waiting; the server is told a little less.
        lock: Milliseconds to wait for a lock, or None; never told longer than a statement may take.
    """
    statement = server_milliseconds(seconds)
    if lock is not None and statement is not None:
        lock = min(lock, statement)
    return statement, lock


UNLIMITED: Limits = (None, None)
"""The server's own settings."""

_SETTINGS = ("statement_timeout", "lock_timeout")


def _capped(setting: str, milliseconds: int) -> str:
    """SQL for a setting's text, lowered to `milliseconds` where it is longer or off (0).

    A timeout's text is a number with a unit ('200ms', '5s'), which is how an interval is written too.
    """
    return (
        f"CASE WHEN {setting} OPERATOR(pg_catalog.=) '0' THEN '{milliseconds}' "
        f"ELSE LEAST({milliseconds}, (pg_catalog.date_part('epoch', {setting}::pg_catalog.interval) "
        "OPERATOR(pg_catalog.*) 1000)::pg_catalog.int8)::pg_catalog.text END"
    )


def set_limits(wanted: Limits) -> str:
    """SQL that lowers the settings to what is wanted, up to the transaction's end; empty where nothing is.

    A shorter timeout of the session, the role or the user's own SET LOCAL stays as it is.
    """
    parts = []
    for name, value in zip(_SETTINGS, wanted, strict=True):
        if value is not None:
            new = _capped(f"pg_catalog.current_setting('{name}')", value)
            parts.append(f"pg_catalog.set_config('{name}', {new}, true)")
    return "SELECT " + ", ".join(parts) if parts else ""


def track_limits(wanted: Limits, had: Limits) -> str:
    """`set_limits` for a transaction that goes on: the server keeps what there was, and can put it back.

    Two settings of our own hold, for each timeout, the value before ours (`dbop_raw.base_…`) and ours
    (`dbop_raw.own_…`). Where the value in force is not ours any more, somebody's own SET LOCAL came in
    between: it is the new base, and outlives our limits.

    Args:
        wanted: The limits from now on; None puts back what there was.
        had: The limits of the message before: a setting that is neither wanted nor had is left alone.
    """
    statements = []
    for name, value, before in zip(_SETTINGS, wanted, had, strict=True):
        if value is None and before is None:
            continue
        new = "base" if value is None else _capped("base", value)
        ours = f"pg_catalog.set_config('{name}', {new}, true)"
        if value is None:
            # Put back, so no value in force is ours.
            ours = f"pg_catalog.substr({ours}, 1, 0)"
        statements.append(
            f"SELECT pg_catalog.set_config('dbop_raw.base_{name}', base, true), "
            f"pg_catalog.set_config('dbop_raw.own_{name}', {ours}, true) "
            "FROM (SELECT CASE WHEN now_is OPERATOR(pg_catalog.=) "
            f"pg_catalog.current_setting('dbop_raw.own_{name}', true) "
            f"THEN pg_catalog.current_setting('dbop_raw.base_{name}', true) ELSE now_is END AS base "
            f"FROM (SELECT pg_catalog.current_setting('{name}') AS now_is OFFSET 0) AS s OFFSET 0) AS s"
        )
    return join(*statements)


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
