"""Random nestings of operations against a plain model: the same rows, the same error, and no message more."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from hypothesis import given
from hypothesis import strategies as st

from dbop_raw import (
    Operation,
    RetriesExhausted,
    RetryPolicy,
    TransactionAborted,
    retry,
    savepoint,
    timeout,
)
from dbop_raw.pipeline.operation import to_operation
from tests.support.fakepostgres import (
    DUPLICATE,
    LOCKED,
    FakePostgres,
)
from tests.support.scripts import engine_over

P = RetryPolicy(attempts=3, first_delay=1e-6, max_delay=1e-6)


@dataclass(frozen=True)
class Say:
    """A statement: a row, or an error of this code for the first so many starts; perhaps swallowed."""

    row: str
    code: str | None = None
    times: int = 0
    swallow: bool = False


@dataclass(frozen=True)
class Wrap:
    how: str
    inner: Node


@dataclass(frozen=True)
class Both:
    """A body that calls others in order, and may catch what they raise."""

    parts: tuple[tuple[Node, bool], ...]


Node = Say | Wrap | Both


def trees(*wrappers: str, swallow: bool) -> st.SearchStrategy[Node]:
    says_ = st.builds(
        Say,
        row=st.uuids().map(lambda u: u.hex[:8]),
        code=st.sampled_from([None, None, LOCKED, DUPLICATE]),
        times=st.integers(1, 4),
        swallow=st.booleans() if swallow else st.just(False),  # noqa: FBT003
    )
    return st.recursive(
        says_,
        lambda inner: (
            st.builds(Wrap, how=st.sampled_from(wrappers), inner=inner)
            | st.builds(Both, st.lists(st.tuples(inner, st.booleans()), min_size=1, max_size=3).map(tuple))
        ),
        max_leaves=8,
    )


nodes = trees("savepoint", "retry", "timeout", swallow=False) | trees("savepoint", "retry", swallow=True)


@dataclass
class Plain:
    """The same tree by the book: a name of its own for each savepoint, and one message for each statement."""

    conn: FakePostgres
    starts: dict[int, int] = field(default_factory=dict)
    names: Callable[[], int] = field(default_factory=lambda: itertools.count().__next__)

    async def run(self, node: Node) -> None:
        if isinstance(node, Say):
            await speak(self.conn, node, self.starts)
        elif isinstance(node, Both):
            for part, catch in node.parts:
                try:
                    await self.run(part)
                except (asyncpg.PostgresError, RetriesExhausted):
                    if not catch:
                        raise
        elif node.how == "timeout":
            # The limit itself is of no account here: the two messages are what it costs by the book.
            await self.conn.execute("SET LOCAL plain_limit = 1")
            await self.run(node.inner)
            await self.conn.execute("SET LOCAL plain_limit = 2")
        else:
            await self.behind_a_savepoint(node.inner, P.attempts if node.how == "retry" else 1)

    async def behind_a_savepoint(self, inner: Node, attempts: int) -> None:
        name = f"plain_{self.names()}"
        await self.conn.execute(f"SAVEPOINT {name}")
        for start in range(1, attempts + 1):
            try:
                await self.run(inner)
                await self.conn.execute(f"RELEASE SAVEPOINT {name}")
            except (asyncpg.PostgresError, RetriesExhausted) as exc:
                await self.conn.execute(f"ROLLBACK TO SAVEPOINT {name}")
                again = isinstance(exc, asyncpg.PostgresError) and exc.sqlstate == LOCKED
                if again and start < attempts:
                    continue
                await self.conn.execute(f"RELEASE SAVEPOINT {name}")
                if again and attempts > 1:
                    raise RetriesExhausted(attempts=start, elapsed=0, reason="attempts") from exc
                raise
            return


async def speak(conn: FakePostgres, say: Say, starts: dict[int, int]) -> None:
    number = starts[id(say)] = starts.get(id(say), 0) + 1
    failing = say.code is not None and number <= say.times
    try:
        await conn.execute(f"fail {say.code}" if failing else f"insert {say.row}")
    except asyncpg.PostgresError:
        if not say.swallow:
            raise


def build(node: Node, starts: dict[int, int]) -> Operation[None]:
    if isinstance(node, Say):
        say = node
        return to_operation(lambda conn: speak(conn, say, starts))
    if isinstance(node, Wrap):
        wrappers: dict[str, Any] = {"savepoint": savepoint, "retry": retry(P), "timeout": timeout(60)}
        made: Operation[None] = wrappers[node.how](build(node.inner, starts))
        return made
    parts = [(build(part, starts), catch) for part, catch in node.parts]

    async def body(conn: Any) -> None:
        for part, catch in parts:
            try:
                await part(conn)
            except (asyncpg.PostgresError, RetriesExhausted):
                if not catch:
                    raise

    return to_operation(body)


def outcome(run: Callable[[], Awaitable[Any]]) -> str:
    try:
        asyncio.run(_awaited(run))
    except TransactionAborted:
        return "25P02"  # a swallowed error too, and noticed later
    except asyncpg.PostgresError as exc:
        return str(exc.sqlstate)
    except RetriesExhausted:
        return "exhausted"
    return "done"


async def _awaited(run: Callable[[], Awaitable[Any]]) -> None:
    await run()


@given(nodes)
def test_any_nesting_does_what_plain_savepoints_do(node: Node) -> None:
    """The same rows are committed, the same error comes out, and it costs no message more."""
    node = Both(((node, False),))
    plain = FakePostgres()

    async def by_the_book() -> None:
        await plain.execute("BEGIN")
        try:
            await Plain(plain).run(node)
        except BaseException:
            await plain.execute("ROLLBACK")
            raise
        if await plain.execute("COMMIT") != "COMMIT":
            raise TransactionAborted

    expected = outcome(by_the_book)
    fused = FakePostgres()
    assert outcome(lambda: engine_over(fused).run(build(node, {}))) == expected
    assert fused.committed == plain.committed
    assert fused.state == "idle"
    assert not fused.terminated
    if expected == "done":
        assert len(fused.sent) <= len(plain.sent)


@given(nodes)
def test_savepoints_are_well_nested_and_the_depth_is_zero_again(node: Node) -> None:
    """Called by a body that goes on after it, whatever became of it."""
    conn = FakePostgres()
    depths: list[int] = []

    async def body(c: FakePostgres) -> None:
        op = build(node, {})
        try:
            await savepoint(op)(c)
        except (asyncpg.PostgresError, RetriesExhausted):
            assert c.state == "open", "the transaction is not usable after its savepoint was rolled back"
        depths.append(len(c.stack))
        await c.execute("insert last")

    assert outcome(lambda: engine_over(conn).run(body)) == "done"
    assert depths == [0]
    assert conn.committed[-1] == "last"
