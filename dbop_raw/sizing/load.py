"""Load on the server: a closed loop of callers, an open one, or a burst.

In a closed loop a slow server gets fewer requests: each caller waits for its answer. In an open loop requests
come at the same rate whatever the server does, and a request's time counts from the moment it was *meant* to
start: what a stall keeps waiting is seen, each request of it (no "coordinated omission").
"""

from __future__ import annotations

import asyncio
import random
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from dbop_raw.failure.errors import EngineOverloaded

__all__ = ["DRAIN", "Load", "Send", "Window", "arrivals", "burst", "closed_loop", "open_loop"]

Send = Callable[[], Awaitable[object]]
"""Makes one request, and runs it to its end."""

# Seconds that a caller of a closed loop pauses after a request that was refused: without it, those that are
# shed at once would ask again in a busy loop, and keep the client from doing anything else.
_PAUSE = 0.01
# After the end, seconds for what is still running; what is not done by then counts as unfinished.
DRAIN = 10.0


@dataclass(frozen=True, slots=True)
class Window:
    """The time that counts, by the loop's clock."""

    start: float
    end: float

    def __contains__(self, moment: float) -> bool:
        return self.start <= moment < self.end

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.start


@dataclass(slots=True)
class Load:
    """What became of the requests that were meant to start within the window."""

    window: Window
    latencies: array[float] = field(default_factory=lambda: array("d"))
    """Seconds of each that succeeded, from its intended start."""
    completed: int = 0
    """Successes within the window, whenever they started: the throughput."""
    errors: Counter[str] = field(default_factory=Counter)
    shed: int = 0
    unfinished: int = 0
    """Not done when the waiting for the last ones was over: their latency is long, and not known."""

    async def one(self, send: Send, intended: float, clock: Callable[[], float]) -> bool:
        """Run one request and note what became of it; True for a success."""
        counts = intended in self.window
        try:
            await send()
        except EngineOverloaded:
            self.shed += counts
        except asyncio.CancelledError:
            self.unfinished += counts
            raise
        except Exception as exc:  # noqa: BLE001 - counted by what it is; the run goes on
            if counts:
                self.errors[getattr(exc, "sqlstate", None) or type(exc).__name__] += 1
        else:
            now = clock()
            self.completed += now in self.window
            if counts:
                self.latencies.append(now - intended)
            return True
        return False

    @property
    def failed(self) -> int:
        """Errors, sheds and what was not finished."""
        return self.errors.total() + self.shed + self.unfinished


def arrivals(rate: float, rng: random.Random, start: float) -> Iterator[float]:
    """When requests are meant to start, without end: a Poisson process of `rate` a second."""
    moment = start
    while True:
        moment += rng.expovariate(rate)
        yield moment


async def closed_loop(send: Send, window: Window, *, clients: int, drain: float = DRAIN) -> Load:
    """As many callers as `clients`, each with one request at a time, from now to the window's end.

    A caller pauses for 10 ms after a request that failed or was shed.
    """
    load, clock = Load(window), asyncio.get_running_loop().time

    async def caller() -> None:
        while (now := clock()) < window.end:
            if not await load.one(send, now, clock):
                await asyncio.sleep(_PAUSE)

    await _finish({asyncio.create_task(caller()) for _ in range(clients)}, window.end + drain)
    return load


async def open_loop(
    send: Send, window: Window, *, rate: float, rng: random.Random, drain: float = DRAIN
) -> Load:
    """Requests that come by chance, `rate` a second, from now to the window's end."""
    load, clock = Load(window), asyncio.get_running_loop().time
    running: set[asyncio.Task[bool]] = set()
    for moment in arrivals(rate, rng, clock()):
        if moment >= window.end:
            break
        if moment > clock():
            await asyncio.sleep(moment - clock())
        task = asyncio.create_task(load.one(send, moment, clock))
        running.add(task)
        task.add_done_callback(running.discard)
    await _finish(running, window.end + drain)
    return load


async def burst(sends: Collection[Send]) -> Load:
    """All of `sends` at once; the window ends when the last is done."""
    clock = asyncio.get_running_loop().time
    load = Load(Window(clock(), float("inf")))
    await asyncio.gather(*(load.one(send, load.window.start, clock) for send in sends))
    load.window = Window(load.window.start, clock())
    return load


async def _finish(tasks: Collection[asyncio.Task[Any]], until: float) -> None:
    """Wait for `tasks` until a time of the loop's clock, then cancel those that are left."""
    tasks = list(tasks)
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=max(0.0, until - asyncio.get_running_loop().time()))
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
