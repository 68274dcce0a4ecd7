"""What is an operation: how it is made, named and shown, and that it really runs where it is told to."""

from __future__ import annotations

import functools
import inspect
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from dbop_raw import (
    RetryPolicy,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from dbop_raw.pipeline.operation import to_operation
from dbop_raw.session.scope import name_of
from tests.support.fakepostgres import (
    FakePostgres,
)
from tests.support.scripts import engine_over

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]

P = RetryPolicy(attempts=3, first_delay=1e-6, max_delay=1e-6)


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


def rows(_: Any) -> Any:
    yield 1


async def more_rows(_: Any) -> Any:
    yield 1


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
    async def test_every_kind_is_named_and_really_runs_inside_the_scope_it_is_given(
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
    def test_an_object_that_can_not_be_called_with_a_connection_is_refused_at_once(self, op: Any) -> None:
        with pytest.raises(TypeError, match="not an operation"):
            pipe(op)

    def test_a_coroutine_that_runs_already_is_refused_and_closed(self) -> None:
        """It could run only once; and nothing warns that it was never awaited."""
        coroutine = Repository().add(None)
        with pytest.raises(TypeError, match="lambda conn"):
            retry(P)(coroutine)  # type: ignore[arg-type]

    @pytest.mark.parametrize("function", [rows, more_rows])
    def test_a_generator_is_refused(self, function: Any) -> None:
        with pytest.raises(TypeError, match="generator"):
            to_operation(function)

    async def test_a_function_that_returns_no_awaitable_is_told_so(self) -> None:
        conn = FakePostgres()
        wrong: Any = lambda conn: 3  # noqa: E731, ARG005
        with pytest.raises(TypeError, match="returned int, which can't be awaited"):
            await engine_over(conn).run(wrong)
        assert conn.state == "idle"

    def test_an_operation_can_not_be_changed(self) -> None:
        with pytest.raises(FrozenInstanceError):
            add("x").name = "y"  # type: ignore[misc]

    async def test_an_operation_runs_as_often_as_it_is_called(self) -> None:
        conn, op = FakePostgres(), add("x")
        engine = engine_over(conn)
        await engine.run(op)
        await engine.run(op)
        assert conn.committed == ["x", "x"]


class TestOperationDecorator:
    @pytest.mark.parametrize(
        ("arguments", "options", "named"),
        [((), {}, "event"), (("x", "y"), {}, "too many"), (("x",), {"nonsense": 1}, "nonsense")],
    )
    def test_arguments_are_checked_where_the_operation_is_made(
        self, arguments: tuple[str, ...], options: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(TypeError, match=named):
            add(*arguments, **options)

    def test_a_decorated_function_keeps_its_name_and_shows_its_signature_without_the_connection(self) -> None:
        assert add.__name__ == "add"
        assert list(inspect.signature(add).parameters) == ["event", "source"]
        assert inspect.signature(add).parameters["source"].default == "web"

    def test_repr_never_shows_an_argument(self) -> None:
        secret = add("s3cret", source="hidden")
        assert repr(pipe(secret, timeout(1), retry(P))) == "retry(attempts=3)(timeout(1)(add))"
