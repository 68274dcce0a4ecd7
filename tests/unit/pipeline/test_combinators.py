"""`pipe` and `chain`: in which order they wrap, and what is no wrapper."""

from __future__ import annotations

from typing import Any

import pytest

from dbop_raw import (
    RetryPolicy,
    chain,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)

P = RetryPolicy(attempts=3, first_delay=1e-6, max_delay=1e-6)


@operation
async def add(conn: Any, event: str, *, source: str = "web") -> str:
    await conn.execute(f"insert {event}")
    return f"{event} from {source}"


@pytest.mark.parametrize(
    ("wrappers", "shown"),
    [
        ((timeout(1.5), retry(P)), "retry(attempts=3)(timeout(1.5)(add))"),
        ((retry(P), timeout(5, lock=0.5)), "timeout(5, lock=0.5)(retry(attempts=3)(add))"),
        ((savepoint,), "savepoint(add)"),
    ],
)
def test_pipe_reads_inner_to_outer(wrappers: tuple[Any, ...], shown: str) -> None:
    assert repr(pipe(add("x"), *wrappers)) == shown


def test_pipe_is_the_same_as_one_wrapper_in_another() -> None:
    op = add("x")
    assert repr(pipe(op, timeout(1.5), retry(P))) == repr(retry(P)(timeout(1.5)(op)))


def test_pipe_of_nothing_is_the_operation() -> None:
    op = add("x")
    assert pipe(op) is op


def test_chain_is_the_same_list_named_and_reused() -> None:
    standard = chain(timeout(1.5), retry(P))
    assert repr(pipe(add("x"), standard)) == repr(pipe(add("x"), timeout(1.5), retry(P)))
    assert repr(standard(add("x"))) == repr(pipe(add("x"), standard))


def test_chains_may_be_nested_and_empty() -> None:
    nested = chain(savepoint, chain(timeout(1), chain()))
    assert repr(pipe(add("x"), nested, retry(P))) == "retry(attempts=3)(timeout(1)(savepoint(add)))"


@pytest.mark.parametrize("wrapper", [None, 3, P, "retry"], ids=repr)
@pytest.mark.parametrize("made", [lambda wrapper: pipe(add("x"), wrapper), chain], ids=["pipe", "chain"])
def test_an_object_that_is_no_wrapper_is_refused(made: Any, wrapper: Any) -> None:
    with pytest.raises(TypeError, match="is not a wrapper"):
        made(wrapper)


def test_a_function_that_makes_no_operation_is_no_wrapper() -> None:
    wrong: Any = lambda op: "nonsense"  # noqa: E731, ARG005
    with pytest.raises(TypeError, match="is not a wrapper"):
        pipe(add("x"), wrong)


def test_the_outermost_policy_is_the_pipelines() -> None:
    other = RetryPolicy(attempts=9)
    assert pipe(add("x"), retry(other), timeout(1), retry(P), savepoint).policy is P
