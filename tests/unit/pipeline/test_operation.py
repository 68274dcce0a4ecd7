"""Operations and combinators: how they are made, named and nested, and what SQL a scope sends for them."""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import re
from collections.abc import Awaitable, Callable
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

import anyio
import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbop_raw import (
    Engine,
    Operation,
    OperationTimeout,
    RetriesExhausted,
    RetryPolicy,
    TransactionAborted,
    TransactionMisuse,
    chain,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from dbop_raw.pipeline.operation import to_operation
from dbop_raw.session.frame import OUTERMOST
from dbop_raw.session.scope import Scope, name_of
from dbop_raw.testing import ScriptedConnection, ScriptedPool

pytestmark = pytest.mark.anyio

P = RetryPolicy(attempts=3, first_delay=1e-6, max_delay=1e-6)
LOCKED = "55P03"  # a savepoint repairs it
SERIAL = "40001"  # only a new transaction does
DUPLICATE = "23505"  # nothing does


def error(code: str) -> asyncpg.PostgresError:
    made = asyncpg.PostgresError.new({"S": "ERROR", "V": "ERROR", "C": code, "M": "as asked"})
    assert isinstance(made, asyncpg.PostgresError)
    return made


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
            raise error("25P02")
        elif words[0] == "SAVEPOINT":
            self.stack.append((words[1], len(self.rows), dict(self.limits)))
            self.deepest = max(self.deepest, len(self.stack))
        elif words[0] == "RELEASE":
            del self.stack[self._find(words[-1]) :]
        elif words[0] == "fail":
            raise error(words[1])
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
        raise error("3B001")

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


def engine_over(*connections: ScriptedConnection) -> Engine:
    pool: Any = ScriptedPool(connections)
    return Engine(pool)


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


@operation
async def add(conn: Any, event: str, *, source: str = "web") -> str:
    await conn.execute(f"insert {event}")
    return f"{event} from {source}"


class Repository:
    async def add(self, conn: Any) -> str:
        await conn.execute("insert x")
        return "bound"

    async def __call__(self, conn: Any) -> str:
        await conn.execute("insert x")
        return "called"


# ------------------------------------------------------------------------------------- made, named, nested


class TestWhatIsAnOperation:
    @pytest.mark.parametrize(
        ("op", "name", "result"),
        [
            (add("x"), "add", "x from web"),
            (lambda conn: Repository.add(Repository(), conn), "<lambda>", "bound"),
            (Repository().add, "Repository.add", "bound"),
            (functools.partial(Repository.add, Repository()), "Repository.add", "bound"),
            (functools.partial(functools.partial(Repository.add), Repository()), "Repository.add", "bound"),
            (Repository(), "Repository", "called"),
        ],
        ids=["@operation", "lambda", "bound method", "partial", "partial of partial", "callable object"],
    )
    async def test_it_is_named_and_really_runs_inside_the_scope_it_is_given(
        self, op: Any, name: str, result: str
    ) -> None:
        assert name_of(op) == name or name_of(op).endswith(name)
        conn = FakePostgres()
        assert await engine_over(conn).run(pipe(op, timeout(1), savepoint)) == result
        assert conn.messages == [
            "BEGIN; SAVEPOINT dbop_raw_1; SET LOCAL statement_timeout = 950",
            "insert x",
            "COMMIT",
        ]

    async def test_a_plain_async_def_is_an_operation(self) -> None:
        async def body(conn: Any) -> int:
            await conn.execute("insert x")
            return 1

        assert await engine_over(FakePostgres()).run(body) == 1
        assert repr(to_operation(body)).endswith("body")

    @pytest.mark.parametrize("op", [None, 3, "SELECT 1", [], Repository], ids=repr)
    def test_what_can_not_be_called_with_a_connection_is_refused_at_once(self, op: Any) -> None:
        with pytest.raises(TypeError, match="not an operation"):
            pipe(op)

    def test_a_coroutine_that_runs_already_is_refused_and_closed(self) -> None:
        """It could run only once; and nothing warns that it was never awaited."""
        coroutine = Repository().add(None)
        with pytest.raises(TypeError, match="lambda conn"):
            retry(P)(coroutine)  # type: ignore[arg-type]

    def test_generators_are_refused(self) -> None:
        def rows(_: Any) -> Any:
            yield 1

        async def more(_: Any) -> Any:
            yield 1

        for function in (rows, more):
            with pytest.raises(TypeError, match="generator"):
                to_operation(function)

    async def test_a_function_that_returns_no_awaitable_is_told_so(self) -> None:
        conn = FakePostgres()
        wrong: Any = lambda conn: 3  # noqa: E731, ARG005
        with pytest.raises(TypeError, match="returned int, which can't be awaited"):
            await engine_over(conn).run(wrong)
        assert conn.state == "idle"

    def test_it_can_not_be_changed(self) -> None:
        with pytest.raises(FrozenInstanceError):
            add("x").name = "y"  # type: ignore[misc]

    async def test_it_runs_as_often_as_it_is_called(self) -> None:
        conn, op = FakePostgres(), add("x")
        engine = engine_over(conn)
        await engine.run(op)
        await engine.run(op)
        assert conn.committed == ["x", "x"]


class TestOperationDecorator:
    def test_arguments_are_checked_where_the_operation_is_made(self) -> None:
        with pytest.raises(TypeError, match="event"):
            add()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="too many"):
            add("x", "y")  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="nonsense"):
            add("x", nonsense=1)  # type: ignore[call-arg]

    def test_it_keeps_name_and_docs_and_shows_the_signature_without_the_connection(self) -> None:
        import inspect  # noqa: PLC0415

        assert add.__name__ == "add"
        assert list(inspect.signature(add).parameters) == ["event", "source"]
        assert inspect.signature(add).parameters["source"].default == "web"

    def test_repr_never_shows_an_argument(self) -> None:
        secret = add("s3cret", source="hidden")
        assert repr(pipe(secret, timeout(1), retry(P))) == "retry(attempts=3)(timeout(1)(add))"


class TestPipeAndChain:
    def test_pipe_reads_inner_to_outer(self) -> None:
        op = add("x")
        assert repr(pipe(op, timeout(1.5), retry(P))) == repr(retry(P)(timeout(1.5)(op)))
        assert repr(pipe(op, timeout(1.5), retry(P))) == "retry(attempts=3)(timeout(1.5)(add))"
        assert (
            repr(pipe(op, retry(P), timeout(5, lock=0.5))) == "timeout(5, lock=0.5)(retry(attempts=3)(add))"
        )
        assert repr(pipe(op, savepoint)) == "savepoint(add)"

    def test_pipe_of_nothing_is_the_operation(self) -> None:
        op = add("x")
        assert pipe(op) is op

    def test_chain_is_the_same_list_named_and_reused(self) -> None:
        standard = chain(timeout(1.5), retry(P))
        assert repr(pipe(add("x"), standard)) == repr(pipe(add("x"), timeout(1.5), retry(P)))
        assert repr(standard(add("x"))) == repr(pipe(add("x"), standard))
        nested = chain(savepoint, chain(timeout(1), chain()))
        assert repr(pipe(add("x"), nested, retry(P))) == "retry(attempts=3)(timeout(1)(savepoint(add)))"

    @pytest.mark.parametrize("wrapper", [None, 3, P, "retry"], ids=repr)
    def test_what_is_no_wrapper_is_named(self, wrapper: Any) -> None:
        with pytest.raises(TypeError, match="is not a wrapper"):
            pipe(add("x"), wrapper)
        with pytest.raises(TypeError, match="is not a wrapper"):
            chain(wrapper)

    def test_a_function_that_makes_no_operation_is_no_wrapper(self) -> None:
        wrong: Any = lambda op: "nonsense"  # noqa: E731, ARG005
        with pytest.raises(TypeError, match="is not a wrapper"):
            pipe(add("x"), wrong)

    def test_the_outermost_policy_is_the_pipelines(self) -> None:
        other = RetryPolicy(attempts=9)
        assert pipe(add("x"), retry(other), timeout(1), retry(P), savepoint).policy is P


# ---------------------------------------------------------------------------------------- what is sent


class TestFusing:
    async def test_begin_savepoint_and_limits_travel_in_one_message(self) -> None:
        conn = FakePostgres()
        await engine_over(conn).run(pipe(says("insert x"), timeout(1.5, lock=0.5), retry(P)), retry=P)
        assert conn.messages == [
            "BEGIN; SAVEPOINT dbop_raw_1; SET LOCAL statement_timeout = 1420; SET LOCAL lock_timeout = 500",
            "insert x",
            "COMMIT",
        ]

    async def test_without_a_wrapper_begin_travels_alone(self) -> None:
        conn = FakePostgres()
        await engine_over(conn).run(says("insert x"))
        assert conn.messages == ["BEGIN", "insert x", "COMMIT"]

    async def test_autocommit_sends_the_body_alone(self) -> None:
        conn = FakePostgres()
        await engine_over(conn).run(pipe(says("insert x"), timeout(1), savepoint), autocommit=True)
        assert conn.messages == ["insert x"]

    async def test_a_retry_goes_back_and_sets_the_limits_again_in_one_message(self) -> None:
        """ROLLBACK TO undoes SET LOCAL."""
        conn = FakePostgres()
        op = pipe(fails_first(1, LOCKED), timeout(1), retry(P))
        assert await engine_over(conn).run(op) == 2
        assert conn.messages == [
            "BEGIN; SAVEPOINT dbop_raw_1; SET LOCAL statement_timeout = 950",
            f"fail {LOCKED}",
            "ROLLBACK TO SAVEPOINT dbop_raw_1; SET LOCAL statement_timeout = 950",
            "insert x",
            "COMMIT",
        ]

    async def test_a_limit_around_a_retry_is_set_again_too(self) -> None:
        conn = FakePostgres()
        op = pipe(fails_first(1, LOCKED), retry(P), timeout(1))
        await engine_over(conn).run(op)
        assert conn.said[0].startswith("BEGIN; SAVEPOINT dbop_raw_1; SET LOCAL statement_timeout = ")
        assert conn.said[2].startswith("ROLLBACK TO SAVEPOINT dbop_raw_1; SET LOCAL statement_timeout = ")

    async def test_what_no_savepoint_repairs_is_not_tried_again_from_one(self) -> None:
        for code, raised in ((DUPLICATE, asyncpg.UniqueViolationError), (SERIAL, RetriesExhausted)):
            conn = FakePostgres()
            with pytest.raises(raised):
                await engine_over(conn).run(pipe(fails_first(9, code), retry(P)))
            assert not [s for s in conn.statements() if s.startswith("ROLLBACK TO")]
            assert conn.state == "idle"

    async def test_a_transaction_that_failed_starts_again_whole(self) -> None:
        conn = FakePostgres()
        assert await engine_over(conn).run(pipe(fails_first(1, SERIAL), retry(P))) == 2
        assert conn.messages == [
            *("BEGIN; SAVEPOINT dbop_raw_1", f"fail {SERIAL}", "ROLLBACK"),
            *("BEGIN; SAVEPOINT dbop_raw_1", "insert x", "COMMIT"),
        ]

    async def test_attempts_counts_starts_at_whatever_level(self) -> None:
        codes = iter([LOCKED, SERIAL, LOCKED, LOCKED])
        starts = 0

        async def body(conn: Any) -> None:
            nonlocal starts
            starts += 1
            await conn.execute(f"fail {next(codes)}")

        with pytest.raises(RetriesExhausted) as raised:
            await engine_over(FakePostgres()).run(pipe(body, retry(P)))
        assert starts == raised.value.attempts == P.attempts

    async def test_a_nested_call_leaves_nothing_unsent(self) -> None:
        """More of the body follows: the savepoint is released before the body goes on."""
        conn = FakePostgres()

        async def body(c: Any) -> None:
            await savepoint(says("insert a"))(c)
            await c.execute("insert b")

        await engine_over(conn).run(body)
        assert conn.messages == [
            *("BEGIN", "SAVEPOINT dbop_raw_1", "insert a", "RELEASE SAVEPOINT dbop_raw_1"),
            *("insert b", "COMMIT"),
        ]

    async def test_a_nested_failure_is_undone_before_the_body_goes_on(self) -> None:
        conn = FakePostgres()

        async def both(c: Any) -> None:
            await c.execute("insert lost")
            await c.execute(f"fail {DUPLICATE}")

        async def body(c: Any) -> None:
            with pytest.raises(asyncpg.UniqueViolationError):
                await savepoint(both)(c)
            await c.execute("insert kept")

        await engine_over(conn).run(body)
        assert "ROLLBACK TO SAVEPOINT dbop_raw_1; RELEASE SAVEPOINT dbop_raw_1" in conn.sent
        assert conn.committed == ["kept"]

    async def test_limits_are_what_they_were_after_a_nested_timeout(self) -> None:
        conn = FakePostgres()
        seen: list[tuple[int, int]] = []

        async def look(c: FakePostgres) -> None:
            await c.execute("insert x")
            seen.append((round(int(c["statement_timeout"]), -1), round(int(c["lock_timeout"]), -1)))

        async def body(c: FakePostgres) -> None:
            await look(c)
            await timeout(1, lock=0.2)(look)(c)
            await look(c)
            await timeout(2)(look)(c)
            await look(c)

        await engine_over(conn).run(body)
        assert seen == [(0, 0), (950, 200), (0, 0), (1900, 0), (0, 0)]

    async def test_an_inner_limit_is_never_longer_than_an_outer_one(self) -> None:
        conn = FakePostgres()
        seen: list[tuple[int, int]] = []

        async def look(c: FakePostgres) -> None:
            await c.execute("insert x")
            seen.append((int(c["statement_timeout"]), int(c["lock_timeout"])))

        await engine_over(conn).run(pipe(look, timeout(60, lock=50), timeout(1, lock=0.3)))
        await engine_over(conn).run(pipe(look, timeout(1, lock=50)))
        assert all(0 < statement <= 950 for statement, _ in seen)
        assert seen[0][1] == 300
        assert seen[1][1] <= 950

    async def test_an_inner_lock_limit_ends_with_its_scope(self) -> None:
        conn = FakePostgres()
        seen: list[str] = []

        async def look(c: FakePostgres) -> None:
            await c.execute("insert x")
            seen.append(c["lock_timeout"])

        async def body(c: FakePostgres) -> None:
            await look(c)
            await timeout(1, lock=0.2)(look)(c)
            await look(c)

        await engine_over(conn).run(pipe(body, timeout(5)))
        assert seen == ["0", "200", "0"]


class TestMisuse:
    async def test_an_error_that_was_swallowed_is_never_committed_in_part(self) -> None:
        """A savepoint of ours that could not be set must not stand for one further out."""
        conn = FakePostgres()

        async def inner(c: Any) -> None:
            await c.execute("insert inner")
            with pytest.raises(asyncpg.PostgresError):
                await c.execute(f"fail {DUPLICATE}")
            with pytest.raises(asyncpg.PostgresError):
                await savepoint(says("insert never"))(c)
            with pytest.raises(asyncpg.PostgresError):
                await c.execute("insert after")

        with pytest.raises((asyncpg.PostgresError, TransactionAborted)):
            await engine_over(conn).run(pipe(inner, savepoint))
        assert conn.committed == []

    async def test_a_scope_whose_inside_swallowed_an_error_is_undone_as_a_whole(self) -> None:
        conn = FakePostgres()

        async def inner(c: Any) -> None:
            await c.execute("insert inner")
            with pytest.raises(asyncpg.PostgresError):
                await c.execute(f"fail {DUPLICATE}")

        async def outer(c: Any) -> None:
            await c.execute("insert outer")
            await savepoint(inner)(c)

        async def body(c: Any) -> None:
            with pytest.raises(asyncpg.InFailedSQLTransactionError):
                await savepoint(outer)(c)
            await c.execute("insert kept")

        await engine_over(conn).run(body)
        assert conn.committed == ["kept"]

    async def test_a_body_that_ends_the_transaction_is_told_so(self) -> None:
        conn = FakePostgres()
        with pytest.raises(TransactionMisuse, match="ended the transaction itself"):
            await engine_over(conn).run(says("COMMIT"))

    async def test_a_swallowed_error_is_told_at_commit(self) -> None:
        conn = FakePostgres()

        async def body(c: Any) -> None:
            with pytest.raises(asyncpg.PostgresError):
                await c.execute(f"fail {DUPLICATE}")

        with pytest.raises(TransactionAborted):
            await engine_over(conn).run(body)


class TestTheSameOperationCalledAgain:
    async def test_each_call_has_its_own_attempts(self) -> None:
        """A loop in a body over one operation: its tenth call may be retried like its first."""
        fails = iter([False, False, False, True, False])

        async def once(conn: Any) -> None:
            await conn.execute(f"fail {LOCKED}" if next(fails) else "insert x")

        op = pipe(once, retry(P))

        async def body(conn: Any) -> None:
            for _ in range(4):
                await op(conn)

        conn = FakePostgres()
        await engine_over(conn).run(body)
        assert conn.committed == ["x"] * 4

    async def test_starts_in_a_new_transaction_count_with_those_before(self) -> None:
        """Layers don't multiply: what a nested retry started in the first transaction, it has started."""
        starts = 0

        async def once(conn: Any) -> None:
            nonlocal starts
            starts += 1
            await conn.execute(f"fail {LOCKED if starts < P.attempts else SERIAL}")

        op = pipe(once, retry(P))

        async def body(conn: Any) -> None:
            await op(conn)

        with pytest.raises(RetriesExhausted):
            await engine_over(FakePostgres()).run(body, retry=RetryPolicy(attempts=2, first_delay=1e-6))
        assert starts == P.attempts + 1


# ------------------------------------------------------------------ random nestings, against a plain model


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


# Not both at once: where a swallowed error is noticed, by a limit or by a savepoint, is not promised.
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


# --------------------------------------------------------------------------------------- time runs out


class Slow(FakePostgres):
    """A server that answers some statements late, or never."""

    def __init__(self, *, late: str, seconds: float = math.inf) -> None:
        super().__init__()
        self.late, self.seconds = late, seconds

    async def _next(self, sql: str, timeout: float | None) -> Any:  # noqa: ASYNC109
        if self.late in sql:
            self.late = "\0"
            await asyncio.sleep(self.seconds)
        return await super()._next(sql, timeout)


class TestTimeRunsOut:
    async def test_only_the_scope_that_ran_out_says_so(self) -> None:
        conn = Slow(late="insert")
        with pytest.raises(OperationTimeout) as raised:
            await engine_over(conn).run(pipe(says("insert x"), timeout(0.02), timeout(60)))
        assert raised.value.seconds == 0.02

    async def test_an_outer_cancellation_stays_a_cancellation(self) -> None:
        conn = Slow(late="insert")
        with anyio.move_on_after(0.02) as scope:
            await engine_over(conn).run(pipe(says("insert x"), timeout(60)))
        assert scope.cancelled_caught
        assert conn.state == "idle"

    async def test_a_savepoint_that_was_never_set_is_not_taken_for_one_further_out(self) -> None:
        """The message that sets it is cut off by the deadline: what was done before must not be undone."""
        conn = Slow(late="SAVEPOINT dbop_raw_2")

        async def outer(c: Any) -> None:
            await c.execute("insert outer")
            with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is, nothing may be half done
                await pipe(says("insert inner"), savepoint, timeout(0.02))(c)
            await c.execute("insert after")

        outcome: BaseException | None = None
        try:
            await engine_over(conn).run(pipe(outer, savepoint))
        except Exception as exc:  # noqa: BLE001
            outcome = exc
        assert conn.committed == ([] if outcome else ["outer", "after"])


def test_a_scope_outside_of_a_transaction_sends_no_control_sql() -> None:
    conn = FakePostgres()

    async def run() -> None:
        scope = Scope(conn)
        await pipe(says("insert x"), savepoint, timeout(1), retry(P)).step(scope, OUTERMOST)

    asyncio.run(run())
    assert conn.sent == ["insert x"]
