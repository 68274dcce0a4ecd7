"""Engines over scripted connections, for what no server does on demand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dbop_raw import Engine, operation
from dbop_raw.testing import ScriptedConnection, ScriptedPool, Step
from tests.support.settings import with_bounds

__all__ = [
    "BEGIN",
    "COMMIT",
    "INSERT",
    "NEVER",
    "ROLLBACK",
    "SHORT",
    "Played",
    "engine_over",
    "fails",
    "insert",
]

BEGIN = Step("BEGIN")
INSERT = Step("INSERT")
COMMIT = Step("COMMIT")
ROLLBACK = Step("ROLLBACK")
NEVER = math.inf
"""The delay of a step that is never answered."""


@operation
async def insert(conn: Any) -> str:
    """Send one statement."""
    tag: str = await conn.execute("INSERT")
    return tag


async def fails(conn: Any) -> None:
    """Send one statement, and fail by itself."""
    await conn.execute("INSERT")
    raise LookupError("of the body")


def engine_over(*connections: ScriptedConnection, max_size: int | None = None, **options: Any) -> Engine:
    """Return an engine over these connections, taken one after another."""
    pool: Any = ScriptedPool(connections, max_size=max_size)
    return Engine(pool, **options)


SHORT = {"cleanup": 0.02, "grace": 0.02, "commit": 0.02}
"""Bounds for clean-up, in seconds, that a test can wait for: what is tested is that they hold."""


class Played:
    """An engine over one connection a script, one at a time, taken one after another.

    Args:
        scripts: One for each connection.
        bounds: Others than the engine's own, in seconds.
        options: For the engine.

    Attributes:
        connections: One for each script.
        pool: Over them.
        engine: Over the pool.

    """

    def __init__(
        self, *scripts: list[Step], bounds: Mapping[str, float] | None = None, **options: Any
    ) -> None:
        self.connections = [ScriptedConnection(script) for script in scripts]
        self.pool = ScriptedPool(self.connections, max_size=1)
        pool_for_typing: Any = self.pool
        self.engine = with_bounds(Engine(pool_for_typing, **options), **(bounds or {}))

    def check(self) -> None:
        """Fail unless each script was played to its end, and nothing is held."""
        for conn in self.connections:
            conn.assert_finished()
        assert self.engine.stats().in_use == 0
