"""The load of a measurement and the pool that it meets, in time that passes only when all are waiting."""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
from random import Random

import pytest

from dbop_raw import EngineOverloaded
from dbop_raw.sizing.load import Load, Window, arrivals, burst, closed_loop, open_loop
from tests.support.virtual_time import VirtualLoop, run


class OneByOne:
    """A server that serves one request at a time, 1 ms each, and stands still for a second at `stall`."""

    def __init__(self, stall: float) -> None:
        self._lock = asyncio.Lock()
        self._stall = stall

    async def __call__(self) -> None:
        async with self._lock:
            stalled = asyncio.get_running_loop().time() >= self._stall
            await asyncio.sleep(1.0 if stalled else 0.001)
            if stalled:
                self._stall = math.inf


def test_arrivals_have_the_right_mean_and_come_by_chance() -> None:
    moments = list(itertools.islice(arrivals(50.0, Random(1), 3.0), 20_000))
    gaps = [later - earlier for earlier, later in itertools.pairwise([3.0, *moments])]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.03)
    # Of an exponential distribution the standard deviation is the mean.
    assert statistics.pstdev(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert min(gaps) >= 0


def test_an_open_loop_sees_all_that_a_stall_keeps_waiting() -> None:
    async def measure() -> Load:
        return await open_loop(OneByOne(5.0), Window(0.0, 10.0), rate=100.0, rng=Random(1))

    load = run(measure())
    late = sum(latency > 0.5 for latency in load.latencies)
    assert 30 <= late <= 70
    assert max(load.latencies) >= 0.95


def test_a_closed_loop_of_one_sees_the_same_stall_once() -> None:
    async def measure() -> Load:
        return await closed_loop(OneByOne(5.0), Window(0.0, 10.0), clients=1)

    load = run(measure())
    assert sum(latency > 0.5 for latency in load.latencies) == 1


def test_latency_counts_from_the_intended_start_when_the_client_itself_was_late() -> None:
    async def measure() -> Load:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        frozen = False

        async def send() -> None:
            nonlocal frozen
            if not frozen and loop.now >= 1.0:
                # The client's own loop stands still: nothing can be sent meanwhile.
                frozen = True
                loop.now += 0.5

        return await open_loop(send, Window(0.0, 2.0), rate=200.0, rng=Random(2))

    load = run(measure())
    late = [latency for latency in load.latencies if latency > 0.1]
    assert 50 <= len(late) <= 120
    assert max(late) <= 0.51


def test_only_what_starts_in_the_window_counts_and_only_what_ends_in_it_is_throughput() -> None:
    async def measure() -> Load:
        return await closed_loop(lambda: asyncio.sleep(0.3), Window(1.0, 2.0), clients=1)

    load = run(measure())
    # Starts at 0, 0.3, … 1.8; those from 1.2 on count, and the last of them ends after the window.
    assert len(load.latencies) == 3
    assert load.completed == 3
    assert load.latencies[0] == pytest.approx(0.3)


def test_failures_sheds_and_what_never_ends_are_counted_apart() -> None:
    turns = itertools.count()

    async def send() -> None:
        turn = next(turns) % 4
        await asyncio.sleep(0.01)
        if turn == 1:
            raise EngineOverloaded(waiting=1, max_waiting=0, max_size=1)
        if turn == 2:
            raise TimeoutError
        if turn == 3:
            await asyncio.sleep(1000)

    async def measure() -> Load:
        return await open_loop(send, Window(0.0, 4.0), rate=100.0, rng=Random(3), drain=1.0)

    load = run(measure())
    count = len(load.latencies)
    assert 80 <= count <= 120
    assert load.shed == pytest.approx(count, abs=1)
    assert load.unfinished == pytest.approx(count, abs=1)
    assert load.errors == {"TimeoutError": pytest.approx(count, abs=1)}
    assert load.failed == load.shed + load.unfinished + load.errors["TimeoutError"]


def test_callers_that_are_shed_at_once_leave_the_others_their_turn() -> None:
    async def measure() -> Load:
        busy = False

        async def send() -> None:
            nonlocal busy
            if busy:
                raise EngineOverloaded(waiting=0, max_waiting=0, max_size=1)
            busy = True
            await asyncio.sleep(0.1)
            busy = False

        return await closed_loop(send, Window(0.0, 1.0), clients=5)

    load = run(measure())
    assert len(load.latencies) >= 8
    assert load.shed <= 5 * 100


def test_a_burst_starts_all_at_once_and_ends_with_its_last_request() -> None:
    async def measure() -> Load:
        await asyncio.sleep(1.0)
        return await burst([lambda: asyncio.sleep(0.2), lambda: asyncio.sleep(0.5), OneByOne(0.0)])

    load = run(measure())
    assert list(load.latencies) == pytest.approx([0.2, 0.5, 1.0])
    assert (load.completed, load.window.start, load.window.end) == pytest.approx((3, 1.0, 2.0))
