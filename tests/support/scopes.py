"""Scopes made by hand, for tests of what stands on one: the one place that knows how a scope is made."""

from __future__ import annotations

from typing import Any

from dbop_raw import Operation
from dbop_raw.session.frame import OUTERMOST
from dbop_raw.session.scope import Scope

__all__ = ["run_in_scope", "scope_over"]


def scope_over(connection: Any) -> Scope:
    """Return a scope over a connection or a double of one, with no engine around it.

    It is in a transaction if the connection says so.
    """
    return Scope(connection)


async def run_in_scope(op: Operation[Any], connection: Any) -> Any:
    """Run an operation's step in a scope of its own, with no deadline."""
    return await op.step(scope_over(connection), OUTERMOST)
