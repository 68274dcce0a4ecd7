"""Is what the driver remembers of the schema why a span failed?

The driver keeps what it has read of statements and types for as long as a connection lives, and encodes
values by it. Where another connection alters a table meanwhile, it refuses good values, or the server refuses
what it sends. So an error that may come from that is looked into before an item is blamed for it, at most
once a run.
"""

from __future__ import annotations

import asyncpg

from dbop_raw.batching.writers.protocol import WriteFailed
from dbop_raw.driver.remembered import kept_statement, types_of
from dbop_raw.session.scope import Scope

__all__ = ["is_stale", "may_be_stale"]

# The server's own types don't change; composites of the user's may, under the same number.
_FIRST_OF_USERS = 16384
# What the server says of a message, or a plan, that is not for the types that it has now: invalid binary
# representation, protocol violation, a cached plan that must not change, a type that is gone.
_CODES = frozenset({"22P03", "08P01", "0A000", "XX000"})


def may_be_stale(failed: WriteFailed) -> bool:
    """May the failure come from what the driver remembers?"""
    if failed.client:
        return True
    sqlstate = getattr(failed.error, "sqlstate", None) or ""
    return isinstance(failed.error, asyncpg.PostgresError) and (
        sqlstate in _CODES or sqlstate.startswith("42")
    )


async def is_stale(scope: Scope, failed: WriteFailed, query: str) -> bool:
    """Compare what the driver keeps of a statement with what the server says of it now.

    Args:
        scope: Where to ask; nothing stays of that.
        failed: Why the span failed.
        query: The statement by whose types the values were encoded.
    """
    kept = kept_statement(scope.conn, query)
    if kept is None or not may_be_stale(failed):
        return False
    before = types_of(kept)
    scope.control.savepoint()
    try:
        await scope.flush()
        now = types_of(await scope.conn.prepare(query))
    except asyncpg.PostgresError:
        # It is not the driver's memory that is wrong: the failure tells more.
        return False
    finally:
        scope.control.abandon()
    return now != before or any(oid >= _FIRST_OF_USERS for types in now for oid in types)
