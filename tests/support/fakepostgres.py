"""PostgreSQL as far as an engine's own SQL needs it, without a server.

It follows transactions, savepoints and local settings: for properties over many nestings of operations, and
for what is sent message by message.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from dbop_raw import Operation
from dbop_raw.pipeline.operation import to_operation
from dbop_raw.testing import ScriptedConnection
from tests.support.failures import server_error

__all__ = ["DUPLICATE", "LOCKED", "SERIAL", "FakePostgres", "SlowPostgres", "fails_first", "says"]

LOCKED = "55P03"
"""A savepoint repairs it."""
SERIAL = "40001"
"""Only a new transaction repairs it."""
DUPLICATE = "23505"
"""Nothing repairs it."""


class FakePostgres(ScriptedConnection):
    """A connection that follows transactions, savepoints and settings as PostgreSQL does.

    `insert N` is a write, `fail CODE` an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state = "idle"
        self.rows: list[str] = []
        self.committed: list[str] = []
        self.stack: list[tuple[str, int, dict[str, str]]] = []
        self.limits: dict[str, str] = {}
        self.deepest = 0

    def is_in_transaction(self) -> bool:
        return self.state != "idle"

    @property
    def messages(self) -> list[str]:
        """What was sent, with limits rounded: they are what is left of the time, so a little less."""
        return [
            re.sub(r"(?<== )\d+", lambda found: str(round(int(found[0]), -1)), sent) for sent in self.said
        ]

    @property
    def said(self) -> list[str]:
        """What was sent, with the SQL that lowers a limit written as SET LOCAL, which it means."""
        return [
            "; ".join(
                part
                if not (lowered := lowered_limits(part))
                else "; ".join(f"SET LOCAL {name} = {value}" for name, value in lowered.items())
                for part in message.split("; ")
            )
            for message in self.sent
        ]

    def statements(self) -> list[str]:
        return [part for message in self.said for part in message.split("; ")]

    def __getitem__(self, setting: str) -> str:
        return self.limits.get(setting, "0")

    async def _next(self, sql: str, timeout: float | None) -> Any:  # noqa: ARG002, ASYNC109
        if self.is_closed():
            raise asyncpg.InterfaceError("connection is closed")
        self.sent.append(sql)
        tag: str | None = None
        for statement in sql.split("; "):
            try:
                tag = self._do(statement)
            except asyncpg.PostgresError:
                if self.state != "idle":
                    self.state = "failed"
                raise
        return tag

    def _do(self, statement: str) -> str | None:
        words = statement.split()
        if words[0] == "BEGIN":
            assert self.state == "idle", "a transaction in a transaction"
            self.state = "open"
        elif words[0] in {"COMMIT", "ROLLBACK"} and words[1:2] != ["TO"]:
            return self._end(words[0])
        elif words[:2] == ["ROLLBACK", "TO"]:
            self._back(words[-1])
        elif self.state == "failed":
            raise server_error("25P02")
        elif words[0] == "SAVEPOINT":
            self.stack.append((words[1], len(self.rows), dict(self.limits)))
            self.deepest = max(self.deepest, len(self.stack))
        elif words[0] == "RELEASE":
            del self.stack[self._find(words[-1]) :]
        elif words[0] == "fail":
            raise server_error(words[1])
        elif words[0] == "insert":
            self.rows.append(words[1])
        else:
            self._set(statement)
        return None

    def _end(self, word: str) -> str:
        done = word == "COMMIT" and self.state == "open"
        if done:
            self.committed += self.rows
        self.state, self.rows, self.stack, self.limits = "idle", [], [], {}
        return "COMMIT" if done else "ROLLBACK"

    def _find(self, name: str) -> int:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place][0] == name:
                return place
        raise server_error("3B001")

    def _back(self, name: str) -> None:
        place = self._find(name)
        _, rows, limits = self.stack[place]
        del self.stack[place + 1 :]
        del self.rows[rows:]
        self.limits = dict(limits)
        self.state = "open"

    def _set(self, statement: str) -> None:
        tracked = re.search(r"set_config\('dbop_raw\.base_(\w+)'", statement)
        lowered = lowered_limits(statement)
        if tracked:
            self._follow(tracked[1], lowered.get(tracked[1]))
        elif lowered:
            self.limits |= {name: self._lower(self[name], value) for name, value in lowered.items()}
        else:
            found = re.fullmatch(r"SET LOCAL (\w+) = (\d+)", statement)
            assert found, f"not known here: {statement}"
            self.limits[found[1]] = found[2]

    def _follow(self, name: str, wanted: str | None) -> None:
        base = self.limits[f"base.{name}"] if self[name] == self.limits.get(f"own.{name}") else self[name]
        new = base if wanted is None else self._lower(base, wanted)
        self.limits |= {f"base.{name}": base, name: new, f"own.{name}": new if wanted else ""}

    @staticmethod
    def _lower(base: str, wanted: str) -> str:
        assert wanted != "0", "0 switches the limit off"
        return wanted if base == "0" else str(min(int(base), int(wanted)))


def lowered_limits(statement: str) -> dict[str, str]:
    """The limits that a statement of ours lowers, and to what."""
    return dict(
        re.findall(r"pg_catalog\.set_config\('(\w+)', CASE WHEN [^?]*? THEN '(\d+)' ELSE LEAST", statement)
    )


class SlowPostgres(FakePostgres):
    """A server that answers some statements late, or never."""

    def __init__(self, *, late: str, seconds: float = math.inf) -> None:
        super().__init__()
        self.late, self.seconds = late, seconds

    async def _next(self, sql: str, timeout: float | None) -> Any:  # noqa: ASYNC109
        if self.late in sql:
            self.late = "\0"
            await asyncio.sleep(self.seconds)
        return await super()._next(sql, timeout)


def says(statement: str) -> Operation[Any]:
    """An operation of one statement."""

    async def say(conn: Any) -> Any:
        return await conn.execute(statement)

    return to_operation(say)


def fails_first(times: int, code: str, statement: str = "insert x") -> Callable[[Any], Awaitable[int]]:
    """A body that fails so many times; it gives the number of its start."""
    started = itertools.count(1)

    async def body(conn: Any) -> int:
        number = next(started)
        await conn.execute(f"fail {code}" if number <= times else statement)
        return number

    return body
