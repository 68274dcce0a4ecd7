"""`EagerCall`: a command that has started, and whose rest is waited for as its caller wants.

With it `overlap`, which uses the time, and `now`.

Most acquires never wait, so no scope with a deadline is made for them; and the answer to a COMMIT is waited
for without a task of its own, though no cancellation may reach the command. (A task costs three turns of the
event loop, each a system call; a cancel scope with a deadline, a timer.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, TypeVar, cast

__all__ = ["EagerCall", "now", "overlap"]

T = TypeVar("T")
Done = TypeVar("Done")


def now() -> float:
    """The event loop's time in seconds, by which all deadlines go: `anyio.current_time`, at less cost."""
    return asyncio.get_running_loop().time()


async def _settled(
    loop: asyncio.AbstractEventLoop, pending: asyncio.Future[Any], seconds: float | None
) -> None:
    """Wait until `pending` is done, or `seconds` have passed: `asyncio.wait` for one future.

    The caller waits for a future of its own, so that a cancellation does not cancel `pending`.
    """
    waiter: asyncio.Future[None] = loop.create_future()

    def wake(_: object = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    pending.add_done_callback(wake)
    timer = None if seconds is None else loop.call_later(seconds, wake)
    try:
        await waiter
    finally:
        pending.remove_done_callback(wake)
        if timer is not None:
            timer.cancel()


class EagerCall(Generic[T]):
    """An awaitable that was started: it has run up to the first future that it waits for, or to its end.

    Either await it (a cancellation then reaches the command, as always), or `wait` for it (then none does).
    It stays in the task that made it. What it raises is kept, and raised by `result()`.
    """

    __slots__ = ("_error", "_pending", "_steps", "_value", "done")

    def __init__(self, command: Awaitable[T]) -> None:
        self._steps: Any = command.__await__()
        self._pending: Any = None
        self._value: T | None = None
        self._error: BaseException | None = None
        self.done = False
        """Has it come to its end?"""
        self._go_on()

    def _go_on(self, thrown: BaseException | None = None) -> None:
        """Run up to the next future that is waited for."""
        try:
            self._pending = self._steps.send(None) if thrown is None else self._steps.throw(thrown)
        except StopIteration as stop:
            self._value = stop.value
            self.done = True
        except BaseException as exc:  # noqa: BLE001 - raised by result()
            self._error = exc
            self.done = True

    def __await__(self) -> Generator[Any, Any, T]:
        """Wait for the end; a cancellation goes to the command."""
        while not self.done:
            thrown = None
            try:
                yield self._pending
            except BaseException as exc:  # noqa: BLE001 - handed to the command, whose answer it is to give
                thrown = exc
            self._go_on(thrown)
        return self.result()

    async def wait(self, seconds: float | None) -> None:
        """Wait for the end, at most `seconds`; None: for ever.

        A cancellation is raised here and does not reach the command, which can be waited for again.
        """
        loop = asyncio.get_running_loop()
        until = None if seconds is None else loop.time() + seconds
        while not self.done:
            pending = self._pending
            if not asyncio.isfuture(pending):
                await asyncio.sleep(0)
            elif not pending.done():
                left = None if until is None else max(0.0, until - loop.time())
                await _settled(loop, pending, left)
                if not pending.done():
                    return
            self._go_on()

    def abandon(self) -> None:
        """Let the command end as if it was cancelled: nobody waits for it any more."""
        while not self.done:
            if asyncio.isfuture(self._pending):
                self._pending.cancel()
            self._go_on(asyncio.CancelledError())

    def result(self) -> T:
        """What it returned; raises what it raised.

        Raises `asyncio.InvalidStateError` while it is under way.
        """
        if not self.done:
            raise asyncio.InvalidStateError
        if self._error is not None:
            raise self._error
        return cast("T", self._value)


async def overlap(command: Awaitable[T], work: Callable[[], Done]) -> tuple[T, Done]:
    """Start `command`, do `work` while the server is at it, and wait: what both gave.

    Waits whatever `work` raises, for a connection with a command under way is of no use to anybody.
    """
    underway = EagerCall(command)
    try:
        done = work()
    finally:
        answer = await underway
    return answer, done
