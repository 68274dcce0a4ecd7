"""A command that starts before anybody waits for it, and work that is done while it is under way."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from dbop_raw.driver.underway import EagerCall, now, overlap

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]


async def answer(future: asyncio.Future[str], log: list[str]) -> str:
    log.append("started")
    try:
        return await future
    except asyncio.CancelledError:
        log.append("cancelled")
        raise


async def at_once(value: str) -> str:
    return value


def later(value: str, seconds: float = 0.01) -> asyncio.Future[str]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[str] = loop.create_future()
    loop.call_later(seconds, future.set_result, value)
    return future


def never() -> asyncio.Future[str]:
    return asyncio.get_running_loop().create_future()


async def test_a_command_that_needs_no_waiting_is_done_when_it_is_made() -> None:
    command = EagerCall(at_once("yes"))
    assert command.done
    assert command.result() == "yes"
    assert await command == "yes"


async def test_a_command_starts_before_anybody_waits() -> None:
    log: list[str] = []
    command = EagerCall(answer(later("yes"), log))
    assert log == ["started"]
    assert not command.done
    with pytest.raises(asyncio.InvalidStateError):
        command.result()
    assert await command == "yes"


async def test_an_error_of_a_command_is_raised_for_whoever_asks() -> None:
    async def fails() -> str:
        await asyncio.sleep(0)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await EagerCall(fails())
    command = EagerCall(fails())
    await command.wait(None)
    with pytest.raises(ValueError, match="no"):
        command.result()


async def test_a_command_that_yields_to_the_loop_goes_on() -> None:
    async def patient() -> str:
        for _ in range(3):
            await asyncio.sleep(0)
        return await later("yes")

    assert await EagerCall(patient()) == "yes"
    command = EagerCall(patient())
    await command.wait(1)
    assert command.result() == "yes"


async def test_awaiting_hands_a_cancellation_to_the_command() -> None:
    log: list[str] = []
    with anyio.move_on_after(0.01) as scope:
        await EagerCall(answer(never(), log))
    assert scope.cancelled_caught
    assert log == ["started", "cancelled"]


async def test_waiting_keeps_a_cancellation_from_the_command() -> None:
    log: list[str] = []
    future = never()
    command = EagerCall(answer(future, log))
    with anyio.move_on_after(0.01) as scope:
        await command.wait(None)
    assert scope.cancelled_caught
    assert not command.done
    future.set_result("yes")
    await command.wait(1)
    assert command.result() == "yes"
    assert log == ["started"]


async def test_waiting_keeps_a_cancellation_of_asyncios_from_the_command_too() -> None:
    log: list[str] = []
    command = EagerCall(answer(later("yes"), log))
    task = asyncio.ensure_future(command.wait(None))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await command.wait(1)
    assert command.result() == "yes"
    assert log == ["started"]


async def test_waiting_for_a_command_is_bounded() -> None:
    command = EagerCall(answer(never(), []))
    started = now()
    await command.wait(0.01)
    assert not command.done
    # uvloop's clock has whole milliseconds.
    assert round(now() - started, 6) >= 0.01
    command.abandon()


async def test_abandoning_a_command_ends_it_as_a_cancellation_does() -> None:
    log: list[str] = []
    command = EagerCall(answer(never(), log))
    command.abandon()
    assert command.done
    assert log == ["started", "cancelled"]
    with pytest.raises(asyncio.CancelledError):
        command.result()


async def test_a_command_may_answer_a_cancellation_with_a_result() -> None:
    async def stubborn() -> str:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            return "cleaned up"
        return "slept"

    command = EagerCall(stubborn())
    command.abandon()
    assert command.result() == "cleaned up"


async def test_work_is_done_in_the_time_that_a_command_takes() -> None:
    log: list[str] = []

    def work() -> int:
        log.append("worked")
        return 7

    assert await overlap(answer(later("yes"), log), work) == ("yes", 7)
    assert log == ["started", "worked"]


async def test_a_command_is_waited_for_whatever_the_work_raises() -> None:
    answered: list[str] = []

    async def command() -> None:
        answered.append(await later("yes"))

    def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await overlap(command(), work)
    assert answered == ["yes"]


async def test_an_error_of_the_command_counts_more_than_one_of_the_work() -> None:
    async def command() -> None:
        await later("")
        raise ConnectionError("lost")

    def work() -> None:
        raise ValueError("no")

    with pytest.raises(ConnectionError, match="lost") as raised:
        await overlap(command(), work)
    assert isinstance(raised.value.__context__, ValueError)


async def test_now_is_the_time_that_deadlines_go_by() -> None:
    assert abs(now() - anyio.current_time()) < 0.1
