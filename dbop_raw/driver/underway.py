"""`EagerCall`, a command that starts at once and is waited for later; `overlap`, built on it; and `now`.

A coroutine does nothing until it is awaited, and a task starts one turn of the event loop later. An
`EagerCall` runs its command at once, in the calling task, up to the first point where it has to wait. That
serves three purposes:

- Acquiring a connection hardly ever waits. A call that is done at once needs no cancel scope with a deadline,
  and so no timer.
- The answer to a COMMIT has to be awaited out of reach of any cancellation. A task of its own with
  `asyncio.shield` would do that at three turns of the event loop, each a system call; this costs one.
- Work of the client can be done while the server is at its own (`overlap`).

Together with the way in which `@operation` counts plain arguments instead of binding them, this halved what
`Engine.run` costs in Python.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, TypeVar, cast

__all__ = ["EagerCall", "now", "overlap"]

T = TypeVar("T")
Done = TypeVar("Done")


def now() -> float:
    """Return the event loop's time in seconds, by which all deadlines go.

    The same as `anyio.current_time()`, at less cost.
    """
    return asyncio.get_running_loop().time()


async def _settled(
    loop: asyncio.AbstractEventLoop, pending: asyncio.Future[Any], seconds: float | None
) -> None:
    """Wait until `pending` is done or `seconds` have passed: `asyncio.wait` for one future.

    The task waits for a future of its own, so a cancellation of the task does not cancel `pending`.
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
    """An awaitable that starts when it is wrapped, and is waited for afterwards.

    Making one runs the command up to the first future that it waits for, or to its end. Then either await the
    call, and a cancellation reaches the command as usual; or use `wait`, and no cancellation reaches it. An
    error of the command is kept, and raised by `result`, once.

    Use it only in the task that made it: a command may depend on the current task.

    Args:
        command: What to run; a coroutine, for example.
    """

    __slots__ = ("_error", "_pending", "_steps", "_value", "done")

    def __init__(self, command: Awaitable[T]) -> None:
        self._steps: Any = command.__await__()
        self._pending: Any = None
        self._value: T | None = None
        self._error: BaseException | None = None
        self.done = False
        """Whether the command has come to its end."""
        self._go_on()

    def _go_on(self, thrown: BaseException | None = None) -> None:
        """Run the command up to the next future that it waits for, or to its end."""
        try:
            self._pending = self._steps.send(None) if thrown is None else self._steps.throw(thrown)
        except StopIteration as stop:
            self._value = stop.value
            self.done = True
        except BaseException as exc:  # noqa: BLE001 - raised by result()
            self._error = exc
            self.done = True

    def __await__(self) -> Generator[Any, Any, T]:
        """Wait for the end and return the result; a cancellation is passed on to the command."""
        thrown = None
        while not self.done:
            try:
                yield self._pending
            except BaseException as exc:  # noqa: BLE001 - passed on to the command, which decides what follows
                thrown = exc
            self._go_on(thrown)
            thrown = None
        return self.result()

    async def wait(self, seconds: float | None) -> None:
        """Wait until the command has ended or the time is over; look at `done` to see which.

        A cancellation of the caller is raised here and does not reach the command, which can be waited for
        again.

        Args:
            seconds: How long to wait at most; None waits without a limit.
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
        """End the command as if it had been cancelled, for when nobody waits for it any more."""
        while not self.done:
            if asyncio.isfuture(self._pending):
                self._pending.cancel()
            self._go_on(asyncio.CancelledError())

    def result(self) -> T:
        """Return what the command returned, or raise what it raised.

        Raises:
            asyncio.InvalidStateError: The command has not ended yet.
        """
        if not self.done:
            raise asyncio.InvalidStateError
        if self._error is not None:
            # Raised, it holds the frames that hold this call, which must not hold it.
            error, self._error = self._error, asyncio.InvalidStateError("its error was raised before")
            try:
                raise error
            finally:
                del error
        return cast("T", self._value)


async def overlap(command: Awaitable[T], work: Callable[[], Done]) -> tuple[T, Done]:
    """Start a command, do other work while the server is busy with it, then wait for the command.

    The command is waited for even if `work` raises, because a connection can't be used while a command runs
    on it.

    Args:
        command: What to send; it is awaited to its end.
        work: What to do meanwhile; an ordinary function, which must not block for long.

    Returns:
        The command's result, and what `work` returned.
    """
    underway = EagerCall(command)
    try:
        done = work()
    finally:
        answer = await underway
    return answer, done
