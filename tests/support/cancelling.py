"""Cancelling work at each of its awaits, in each way that asyncio and anyio know.

A test runs its work again and again, and cancels it one await later each time, until the work comes to its
own end before its cancellation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any

import anyio

__all__ = ["BY_TASK", "MOST_AWAITS", "ONCE", "TWICE", "Awaits", "Canceller", "Outcome"]

MOST_AWAITS = 400
"""More than any work of a test has."""


class Awaits:
    """Awaits `work`; calls `at` with the number of each await that really waits, and what it waits for."""

    def __init__(self, work: Coroutine[Any, Any, Any], at: Callable[[int, Any], None]) -> None:
        self.work = work
        self.at = at

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self.work.__await__()
        thrown: BaseException | None = None
        number = 0
        while True:
            try:
                waits_for = steps.send(None) if thrown is None else steps.throw(thrown)
            except StopIteration as stop:
                return stop.value
            self.at(number, waits_for)
            number += 1
            thrown = None
            try:
                yield waits_for
            except BaseException as exc:  # noqa: BLE001 - goes to the work, as it would without us
                thrown = exc


@dataclass
class Outcome:
    """What became of work that was cancelled at its n-th await.

    Attributes:
        fired: Whether it came so far, and was cancelled.
        cancelled: Whether it ended as cancelled.
        result: What it returned otherwise.

    """

    fired: bool = False
    cancelled: bool = False
    result: Any = None


Canceller = Callable[[Coroutine[Any, Any, Any], int, Outcome], Awaitable[None]]


def _when_it_is_done(waits_for: Any, then: Callable[[], object]) -> None:
    """Before the task that waits learns of it: the answer is there, and is lost."""
    if isinstance(waits_for, asyncio.Future):
        waits_for.add_done_callback(lambda _: then())
    else:
        asyncio.get_running_loop().call_soon(then)


async def _by_task(
    work: Coroutine[Any, Any, Any],
    outcome: Outcome,
    at: Callable[[asyncio.Task[Any], int, Any], bool],
) -> None:
    async def drive() -> Any:
        task = asyncio.current_task()
        assert task is not None

        def each_await(number: int, waits_for: Any) -> None:
            outcome.fired |= at(task, number, waits_for)

        return await Awaits(work, each_await)

    task = asyncio.ensure_future(drive())
    await asyncio.wait({task}, timeout=20)
    assert task.done(), "it does not end"
    outcome.cancelled = task.cancelled()
    if not outcome.cancelled:
        outcome.result = task.result()


async def task_at_once(work: Coroutine[Any, Any, Any], n: int, outcome: Outcome) -> None:
    def at(task: asyncio.Task[Any], number: int, _: Any) -> bool:
        return number == n and task.cancel()

    await _by_task(work, outcome, at)


async def task_as_the_answer_comes(work: Coroutine[Any, Any, Any], n: int, outcome: Outcome) -> None:
    def at(task: asyncio.Task[Any], number: int, waits_for: Any) -> bool:
        if number == n:
            _when_it_is_done(waits_for, task.cancel)
        return number == n

    await _by_task(work, outcome, at)


async def task_twice(work: Coroutine[Any, Any, Any], n: int, outcome: Outcome) -> None:
    def at(task: asyncio.Task[Any], number: int, _: Any) -> bool:
        return number in {n, n + 1} and task.cancel()

    await _by_task(work, outcome, at)


async def task_twice_as_answers_come(work: Coroutine[Any, Any, Any], n: int, outcome: Outcome) -> None:
    def at(task: asyncio.Task[Any], number: int, waits_for: Any) -> bool:
        if number in {n, n + 1}:
            _when_it_is_done(waits_for, task.cancel)
        return number == n

    await _by_task(work, outcome, at)


async def task_again_and_again(work: Coroutine[Any, Any, Any], n: int, outcome: Outcome) -> None:
    def at(task: asyncio.Task[Any], number: int, _: Any) -> bool:
        return number >= n and task.cancel()

    await _by_task(work, outcome, at)


async def scope_at_once(work: Coroutine[Any, Any, Any], n: int, outcome: Outcome) -> None:
    with anyio.CancelScope() as scope:

        def at(number: int, _: Any) -> None:
            if number == n:
                outcome.fired = True
                scope.cancel()

        outcome.result = await Awaits(work, at)
    outcome.cancelled = scope.cancelled_caught


async def scope_as_the_answer_comes(work: Coroutine[Any, Any, Any], n: int, outcome: Outcome) -> None:
    with anyio.CancelScope() as scope:

        def at(number: int, waits_for: Any) -> None:
            if number == n:
                outcome.fired = True
                _when_it_is_done(waits_for, scope.cancel)

        outcome.result = await Awaits(work, at)
    outcome.cancelled = scope.cancelled_caught


ONCE: list[Canceller] = [task_at_once, task_as_the_answer_comes, scope_at_once, scope_as_the_answer_comes]


BY_TASK: list[Canceller] = [task_at_once, task_as_the_answer_comes]


TWICE: list[Canceller] = [task_twice, task_twice_as_answers_come, task_again_and_again]
