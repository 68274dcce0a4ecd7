"""Which errors refuse a COMMIT for sure, so that nothing is committed: a list, with its reasons.

An error in answer to COMMIT is not yet a no. PostgreSQL alone aborts a transaction on any ERROR that it
raises before the commit record is written, and raises none after that. But extensions, and servers built on
PostgreSQL, commit on *other* nodes from within the COMMIT: postgres_fdw and Citus in a callback before the
local commit record, others by protocols of their own. When such a step fails, its error comes after some node
may have committed. Citus was seen to answer XX000 to a COMMIT whose row was in.

So only those errors count as a refusal that the transaction's own checks and triggers raise. PostgreSQL runs
these before any such callback (`CommitTransaction` in xact.c: AfterTriggerFireDeferred, then the callbacks).
All others leave the outcome open, and it has to be looked up. The price is paid on a plain server too: a
COMMIT that is cancelled (57014) or runs out of memory (53200) counts as in doubt, though nothing is
committed. (postgres_fdw with *several* foreign servers promises no atomic COMMIT, whatever the error.)

This is no matter of verdicts: no row of a user's table turns a doubt into a no.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import asyncpg

from dbop_raw.failure.sqlstate import CONDITIONS

__all__ = ["REFUSALS", "refuses_commit"]

REFUSALS: Mapping[str, str] = MappingProxyType(
    {
        "00": "raised by a deferred trigger on purpose: only a RAISE makes an error of this code",
        "01": "raised by a deferred trigger on purpose: only a RAISE makes an error of a warning's code",
        "02": "raised by a deferred trigger on purpose: only a RAISE makes an error of this code",
        "09": "raised by a deferred trigger",
        "21": "raised by a statement of a deferred trigger",
        "22": "raised by a statement of a deferred trigger: a value is not allowed",
        "23": "a deferred constraint is violated, or a deferred trigger's statement violates one",
        "27": "raised by a deferred trigger: it changed the row that set it off",
        "2F": "raised by a function that a deferred trigger runs",
        "38": "raised by a function, in another language, that a deferred trigger runs",
        "39": "raised by a function, in another language, that a deferred trigger runs",
        "40000": "the code says it: the transaction was rolled back",
        # PostgreSQL's check for serializable transactions comes after the callbacks. But a distributed server
        # that answers with this code says by it that the transaction has to be done again.
        "40001": "a conflict with a concurrent transaction was found: this one was rolled back",
        "40002": "the code says it: rolled back, because an integrity constraint is violated",
        "40P01": "a deferred trigger or constraint waited for a lock in a deadlock, and was chosen to lose",
        "42": "a deferred trigger's statement is wrong, or not allowed to the role",
        "44": "raised by a statement of a deferred trigger: a row does not fit a view",
        "55P03": "a deferred trigger or constraint did not get a lock in time",
        "P0": "raised by a deferred trigger in PL/pgSQL, on purpose",
    }
)
"""By code or by class (two characters): why nothing can be committed when COMMIT is answered with it."""

# PostgreSQL's function for RAISE in PL/pgSQL: with a code that PostgreSQL does not list, the code is the
# user's own, and not that of a distributed server.
_RAISE = "exec_stmt_raise"


def refuses_commit(exc: BaseException) -> bool:
    """Return whether an error in answer to COMMIT makes sure that nothing is committed.

    False leaves it open: the transaction may be committed or not.

    Args:
        exc: What the driver raised. A server's error is a refusal if its severity is ERROR and its code is in
            `REFUSALS`, or is unknown to PostgreSQL and comes from a RAISE in PL/pgSQL. FATAL and PANIC are
            not: the session may have been ended while it waited for a standby, after the commit. asyncpg's
            `InterfaceError` is one: it says that nothing was sent.
    """
    code = getattr(exc, "sqlstate", None)
    if code is None:
        return isinstance(exc, asyncpg.InterfaceError)
    # By the fields, not the class: asyncpg makes a warning's class of an ERROR with a code of class 01 or 02.
    if getattr(exc, "severity_en", None) != "ERROR":
        return False
    if code in REFUSALS or code[:2] in REFUSALS:
        return True
    return code not in CONDITIONS and getattr(exc, "server_source_function", None) == _RAISE
