"""`Operation`, and how operations are joined: `operation`, `pipe`, `chain`.

An operation is a step: a function of the `Scope` it runs in, which is the connection with its transaction,
and of a `Frame`, which is what it has to keep. A combinator makes a step around a step. It sends nothing: it
leaves its SQL with the scope, which sends what has gathered as *one* message just before the next body runs,
and hands a narrower frame to the step inside.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeAlias, TypeVar

from dbop_raw.driver.connection import Connection
from dbop_raw.failure.policy import RetryPolicy
from dbop_raw.session.frame import Frame
from dbop_raw.session.scope import Scope, name_of, register, scope_of, unregister

__all__ = [
    "AnyOperation",
    "Operation",
    "Wrapper",
    "chain",
    "operation",
    "pipe",
    "to_operation",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")

AnyOperation: TypeAlias = Callable[[Any], Awaitable[T]]
"""An `Operation[T]`, or anything else that is called with a connection and gives an awaitable of T."""


@dataclass(frozen=True, slots=True, repr=False)
class Operation(Generic[T_co]):
    """A piece of database work that waits for a connection: immutable, and run as often as it is called.

    Give it to `Engine.run`, or call it with a connection inside another operation: `await op(conn)` joins the
    transaction that the connection is in.
    """

    step: Callable[[Scope, Frame], Awaitable[T_co]] = field(repr=False)
    """How it runs in a scope: for the combinators, not for callers."""
    name: str
    """The body's name, for events and messages."""
    policy: RetryPolicy | None = None
    """The outermost retry policy of the pipeline: `Engine.run` uses it when it was given none."""
    text: str = ""
    """The pipeline as nested calls; empty: the name."""
    key: object = None
    """What the starts of the outermost `retry` are counted under."""
    limit: float | None = None
    """Seconds: the tightest timeout around the outermost `retry`, which all its starts together have."""

    def __repr__(self) -> str:
        """The nesting, outermost first; never an argument's value."""
        return self.text or self.name

    async def __call__(self, conn: Connection) -> T_co:
        """Run with `conn`: in the transaction it is in, if any; else each statement is its own."""
        scope = scope_of(conn)
        if scope is not None:
            return await scope.call(self.step)
        if not hasattr(conn, "is_in_transaction"):
            raise TypeError(_not_a_connection(self.name, conn))
        scope = Scope(conn)
        register(scope)
        try:
            return await scope.call(self.step)
        finally:
            unregister(scope)


class Wrapper(Protocol):
    """What `pipe` and `chain` take: makes an operation from an operation, and keeps its result's type."""

    def __call__(self, op: AnyOperation[T], /) -> Operation[T]:
        """Wrap `op`."""
        ...


def _kind(thing: object) -> str:
    """What a message says of a thing that is not what it should be: it may be an item, or hold a secret."""
    return (
        f"the class {thing.__qualname__}"
        if isinstance(thing, type)
        else f"an object of type {type(thing).__name__}"
    )


def to_operation(op: AnyOperation[T]) -> Operation[T]:
    """`op` itself if it is an `Operation`, else one whose body is `op`.

    Raises `TypeError` at once for what can't be called with a connection, such as a coroutine that was made
    already.
    """
    if isinstance(op, Operation):
        return op
    if type(op) is not FunctionType or op.__code__.co_flags & _GENERATORS:
        _check_callable(op)
    function = op

    async def step(scope: Scope, frame: Frame) -> T:
        return await scope.body(function, frame)

    return Operation(step, name_of(function))


def _not_a_connection(name: str, thing: object) -> str:
    kind = type(thing).__name__
    if hasattr(thing, "run") and hasattr(thing, "transaction"):
        return (
            f"{name} was called with an {kind}, and takes a connection: write `await engine.run({name}(…))`"
        )
    if hasattr(thing, "acquire"):
        return (
            f"{name} was called with a {kind}, and takes a connection: make an Engine of the pool, and write "
            f"`await engine.run({name}(…))`"
        )
    return (
        f"{name} was called with {_kind(thing)}, and takes a connection: the one that a body was given, or "
        "that engine.transaction() or pool.acquire() gave"
    )


_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def _check_callable(op: object) -> None:
    """Raise `TypeError` for what can't be called with a connection."""
    if inspect.isawaitable(op):
        if inspect.iscoroutine(op):
            op.close()
        raise TypeError(
            f"{_kind(op)} is an awaitable that exists already and can run only once: give the function "
            "itself, or `lambda conn: f(conn, …)`, so that it can be called with a connection, and again for "
            "a retry"
        )
    if isinstance(op, _Maker):
        raise TypeError(
            f"{name_of(op)} is an operation that was not called: give {name_of(op)}(…), with its arguments "
            "and without the connection"
        )
    if isinstance(op, type) or not callable(op):
        raise TypeError(
            f"{_kind(op)} is not an operation: give an async function that takes a connection, or what "
            "@operation makes"
        )
    if inspect.isgeneratorfunction(op) or inspect.isasyncgenfunction(op):
        raise TypeError(
            f"{name_of(op)} is a generator function: an operation returns one result; collect the rows and "
            "return them"
        )


def _plain_arguments(signature: inspect.Signature) -> tuple[int, int]:
    """How many positional arguments, beside the connection, surely fit; (1, 0) where that can't be said."""
    plain = [
        p for p in signature.parameters.values() if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}
    ]
    needed = [p for p in plain if p.default is p.empty]
    keywords = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    return (1, 0) if keywords or not needed else (len(needed) - 1, len(plain) - 1)


class _Maker(Generic[P, T]):
    """What `operation` makes of a function: called with its arguments, it gives an operation.

    Got from an instance it is bound to it, as a method is: the function then takes `self` before `conn`.
    """

    def __init__(
        self, function: Callable[Concatenate[Any, P], Awaitable[T]], owner: tuple[Any, ...] = ()
    ) -> None:
        functools.update_wrapper(self, function)
        # update_wrapper() leaves the signature with the connection; what is called has none.
        del self.__wrapped__  # type: ignore[attr-defined]
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        self.__signature__ = signature.replace(parameters=parameters[len(owner) + 1 :])
        self._function: Callable[..., Awaitable[T]] = function
        self._owner = owner
        self._signature = signature
        self._name = name_of(function)
        least, most = _plain_arguments(signature)
        self._least, self._most = max(0, least - len(owner)), most - len(owner)

    def __repr__(self) -> str:
        """With the function's name."""
        return f"<operation {self._name}>"

    def __get__(self, instance: object, owner: type | None = None) -> _Maker[P, T]:
        """Bind to `instance`."""
        return self if instance is None else _Maker(self._function, (instance,))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Operation[T]:
        function, owner = self._function, self._owner
        if kwargs or not self._least <= len(args) <= self._most:
            self._signature.bind(*owner, None, *args, **kwargs)

        async def step(scope: Scope, frame: Frame) -> T:
            return await scope.body(call, frame)

        def call(conn: Connection) -> Awaitable[T]:
            return function(*owner, conn, *args, **kwargs)

        call.__qualname__ = name = self._name
        return Operation(step, name)


def operation(function: Callable[Concatenate[Any, P], Awaitable[T]]) -> Callable[P, Operation[T]]:
    """Make `async def f(conn, *args) -> T` into `f(*args) -> Operation[T]`.

    A method is made one too: `async def f(self, conn, *args)`, called as `thing.f(*args)`. The arguments are
    checked against the function's signature when the operation is made, not when it runs: a missing one is a
    `TypeError` at the line that forgot it.

    Args:
        function: An async function whose first parameter (of a method, the one after `self`) is the
            connection.
    """
    return _Maker(function)


@dataclass(frozen=True, slots=True)
class Chain:
    """Wrappers in the order they are applied, inner to outer."""

    wrappers: tuple[Wrapper, ...]

    def __call__(self, op: AnyOperation[T], /) -> Operation[T]:
        """Apply them all."""
        return pipe(op, *self.wrappers)


def pipe(op: AnyOperation[T], *wrappers: Wrapper) -> Operation[T]:
    """`op` in its wrappers, inner to outer.

    `pipe(op, timeout(1.5), retry(P))` is `retry(P)(timeout(1.5)(op))`, 1.5 s a try.

    Raises `TypeError` when one of them is not a wrapper.
    """
    result = to_operation(op)
    for wrapper in wrappers:
        wrapped = wrapper(result) if callable(wrapper) else None
        if not isinstance(wrapped, Operation):
            raise TypeError(
                f"{_kind(wrapper)} is not a wrapper: use timeout(…), retry(…), savepoint, or chain(…)"
            )
        result = wrapped
    return result


def chain(*wrappers: Wrapper) -> Chain:
    """Name a list of wrappers, to use it again; it is applied as `pipe` applies them."""
    for wrapper in wrappers:
        if not callable(wrapper):
            raise TypeError(
                f"{_kind(wrapper)} is not a wrapper: use timeout(…), retry(…), savepoint, or chain(…)"
            )
    return Chain(wrappers)
