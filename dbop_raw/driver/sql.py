"""Builds control SQL as text: BEGIN, SET LOCAL, SAVEPOINT, and quoted names and literals.

Pure: nothing here sends anything. The statements are joined into one message by `join`, so that several cost
one round trip. Functions and operators are named with their schema, so that no `search_path` can put another
function in their place.

Sources: PostgreSQL's pages on BEGIN, SET TRANSACTION, SAVEPOINT and SET; for quoting, "Lexical Structure".
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
"""An isolation level of PostgreSQL; it treats READ UNCOMMITTED as READ COMMITTED, so that one is left out."""
ISOLATION_LEVELS: tuple[Isolation, ...] = ("read committed", "repeatable read", "serializable")

COMMIT = "COMMIT"
ROLLBACK = "ROLLBACK"
CHECK_DEFERRED = "SET CONSTRAINTS ALL IMMEDIATE"
"""Checks all deferred constraints now, and from here on each at the end of its statement."""

Limits = tuple[int | None, int | None]
"""`statement_timeout` and `lock_timeout` in milliseconds; None leaves the setting as it is."""

# PostgreSQL keeps both settings in a 32-bit integer of milliseconds.
_LARGEST_MS = 2**31 - 1
# The server is told this share less than the client, within these bounds (seconds), so that its answer is
# here before the client gives up.
_MARGIN, _LEAST_MARGIN, _LARGEST_MARGIN = 0.05, 0.01, 0.25


def join(*statements: str) -> str:
    """Join statements into one message of the simple query protocol, which costs one round trip."""
    return "; ".join(statements)


def savepoint(depth: int) -> str:
    """Build SAVEPOINT with a name made of its depth.

    A name a depth, rather than a unique one each time: then pg_stat_statements sees few statements. And
    rather than one name for all: where a SAVEPOINT was not set or a RELEASE was not done (a body swallowed an
    error, a message was cancelled), ROLLBACK TO must fail instead of undoing the work of an outer savepoint.

    Args:
        depth: How many savepoints are open with this one; 1 is the outermost.
    """
    return f"SAVEPOINT dbop_raw_{depth}"


def rollback_to(depth: int) -> str:
    """Build ROLLBACK TO the savepoint of that depth, which stays open; those inside it are destroyed."""
    return f"ROLLBACK TO SAVEPOINT dbop_raw_{depth}"


def release(depth: int) -> str:
    """Build RELEASE of the savepoint of that depth, and of those inside it."""
    return f"RELEASE SAVEPOINT dbop_raw_{depth}"


def begin(isolation: Isolation | None = None, *, readonly: bool = False, deferrable: bool = False) -> str:
    """Build BEGIN with its modes.

    Args:
        isolation: The isolation level; None leaves the session's default.
        readonly: Begin READ ONLY.
        deferrable: Begin DEFERRABLE: the transaction may wait for a snapshot with which it can neither fail
            nor make others fail to serialize.

    Raises:
        PolicyError: The isolation level is unknown, or `deferrable` is asked for a transaction that is not
            both serializable and read-only, where PostgreSQL ignores it ("SET TRANSACTION").
    """
    if isolation is not None and isolation not in ISOLATION_LEVELS:
        known = ", ".join(map(repr, ISOLATION_LEVELS))
        raise PolicyError(f"isolation={isolation!r} is not known: use one of {known}, or None")
    if deferrable and not (readonly and isolation == "serializable"):
        raise PolicyError(
            "deferrable=True needs isolation='serializable' and readonly=True, or PostgreSQL ignores it"
        )
    words = ["BEGIN"]
    if isolation is not None:
        words.append(f"ISOLATION LEVEL {isolation.upper()}")
    if readonly:
        words.append("READ ONLY")
    if deferrable:
        words.append("DEFERRABLE")
    return " ".join(words)


def server_milliseconds(seconds: float) -> int | None:
    """Convert a client's timeout to the one that the server is told.

    The server is told a little less (5 %, at least 10 ms and at most 250 ms less), so that its answer arrives
    before the client gives up and the connection stays usable. Never 0, which would switch the timeout off.

    Args:
        seconds: How long the client waits; infinity for no limit.

    Returns:
        Whole milliseconds of at least 1, or None for no limit.
    """
    if math.isinf(seconds) and seconds > 0:
        return None
    margin = min(max(seconds * _MARGIN, _LEAST_MARGIN), _LARGEST_MARGIN)
    milliseconds = (seconds - margin) * 1000
    return int(min(max(milliseconds, 1), _LARGEST_MS))


def limits(seconds: float, lock: int | None) -> Limits:
    """Work out the server's timeouts for a statement.

    Args:
        seconds: How long the client waits for it; infinity for no limit. The server is told a little less,
            see `server_milliseconds`.
        lock: Milliseconds to wait for a lock; None for no limit of ours. Lowered to the statement's timeout
            where it is longer than that.
    """
    statement = server_milliseconds(seconds)
    if lock is not None and statement is not None:
        lock = min(lock, statement)
    return statement, lock


UNLIMITED: Limits = (None, None)
"""No limits of ours: both settings are left as they are."""

_SETTINGS = ("statement_timeout", "lock_timeout")


def _capped(setting: str, milliseconds: int) -> str:
    """Build an SQL expression that lowers a timeout.

    Args:
        setting: SQL that gives the setting's text: a number with a unit ('200ms', '5s'), which can also be
            read as an interval, or '0' for no timeout.
        milliseconds: The longest timeout that the expression gives.
    """
    return (
        f"CASE WHEN {setting} OPERATOR(pg_catalog.=) '0' THEN '{milliseconds}' "
        f"ELSE LEAST({milliseconds}, (pg_catalog.date_part('epoch', {setting}::pg_catalog.interval) "
        "OPERATOR(pg_catalog.*) 1000)::pg_catalog.int8)::pg_catalog.text END"
    )


def set_limits(wanted: Limits) -> str:
    """Build SQL that lowers both timeouts to the given limits until the transaction ends.

    A shorter timeout that the session, the role or a SET LOCAL of the user has set already stays as it is.

    Args:
        wanted: The limits.

    Returns:
        One statement, or an empty string where no limit is given.
    """
    parts = []
    for name, value in zip(_SETTINGS, wanted, strict=True):
        if value is not None:
            new = _capped(f"pg_catalog.current_setting('{name}')", value)
            parts.append(f"pg_catalog.set_config('{name}', {new}, true)")
    return "SELECT " + ", ".join(parts) if parts else ""


def track_limits(wanted: Limits, had: Limits) -> str:
    """Build SQL like that of `set_limits`, for a transaction that goes on after the limits have ended.

    Two settings of our own hold, for each timeout, the value before ours (`dbop_raw.base_…`) and ours
    (`dbop_raw.own_…`). Where the value in force is not ours any more, somebody's own SET LOCAL came in
    between: it is the new base, and outlives our limits.

    Args:
        wanted: The limits from now on; None puts back the value from before ours.
        had: The limits that the message before has set; a setting that neither has is left alone.

    Returns:
        One statement for each setting that changes; an empty string where none does.
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
    """Quote one identifier. It is taken literally: `a.b` is one name with a dot in it.

    Args:
        name: The name as it stands in the catalog, without quotes.

    Raises:
        PolicyError: The name is empty, is no string, or contains a NUL, which PostgreSQL can't store.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise PolicyError(
            f"{name!r} is not an SQL identifier: give a non-empty string without a NUL character"
        )
    return '"' + name.replace('"', '""') + '"'


def relation(table: str, schema: str | None = None) -> str:
    """Quote a table's name, with its schema where one is given.

    Args:
        table: The table's name, without quotes.
        schema: The schema's name; None leaves it to the session's `search_path`.

    Raises:
        PolicyError: One of the names is not an identifier; see `identifier`.
    """
    return identifier(table) if schema is None else f"{identifier(schema)}.{identifier(table)}"


def literal(text: str) -> str:
    """Quote a string literal that means `text` whatever `standard_conforming_strings` is set to.

    Args:
        text: The value.

    Raises:
        PolicyError: The text contains a NUL, which no PostgreSQL string can hold.
    """
    if "\0" in text:
        raise PolicyError(f"{text!r} has a NUL character, which no PostgreSQL string can hold")
    doubled = text.replace("'", "''")
    if "\\" in text:
        escaped = doubled.replace("\\", "\\\\")
        return f" E'{escaped}'"
    return f"'{doubled}'"
