"""What each layer costs on a connection that answers at once: only Python is left to measure."""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.cost.instant import instant_pool
from bench.figures import Figures, rotated
from dbop_raw import Engine, Event, RetryPolicy, pipe, retry, savepoint, timeout
from dbop_raw.pipeline.operation import Wrapper

__all__ = ["DEPTHS", "Layer", "measure_layers"]

Call = Callable[[], Awaitable[object]]
DEPTHS = (0, 1, 2, 4, 8)
_POLICY = RetryPolicy(attempts=4)


@dataclass(slots=True)
class Layer:
    """One way to run one operation."""

    name: str
    call: Call
    cpu: Figures = field(default_factory=Figures)
    """Seconds of processor time a call."""
    peak: float = 0.0
    """Bytes: how much more memory was in use at one moment of a call than before it."""
    kept: float = 0.0
    """Memory blocks a call that are still in use after many of them: a leak, if it is not about 0."""


async def _op(conn: Any) -> Any:
    return await conn.execute("INSERT")


def _by_hand(pool: Any) -> Call:
    async def call() -> None:
        conn = await pool.acquire()
        try:
            await conn.execute("BEGIN")
            await _op(conn)
            await conn.execute("COMMIT")
        finally:
            await pool.release(conn)

    return call


def _ignored(event: Event) -> None:
    """An observer that does nothing."""


def _layers() -> list[Layer]:
    pool = instant_pool()
    engine, observed = Engine(pool), Engine(pool, observer=_ignored)
    both = pipe(_op, timeout(1.5), retry(_POLICY))
    calls: Mapping[str, Call] = {
        "by hand: acquire, BEGIN, op, COMMIT, release": _by_hand(pool),
        "run, autocommit": lambda: engine.run(_op, autocommit=True),
        "run": lambda: engine.run(_op),
        "run, observer on": lambda: observed.run(_op),
        "run + retry": lambda: engine.run(pipe(_op, retry(_POLICY))),
        "run + timeout": lambda: engine.run(pipe(_op, timeout(1.5))),
        "run + timeout + retry": lambda: engine.run(both),
        "run + timeout + retry, pipe made for each call": lambda: engine.run(
            pipe(_op, timeout(1.5), retry(_POLICY))
        ),
        "run + timeout + retry, observer on": lambda: observed.run(both),
        "run + timeout + retry, deadline": lambda: engine.run(both, deadline=3.0),
    }
    return [Layer(name, call) for name, call in calls.items()]


def _deep(engine: Engine, depth: int) -> Layer:
    wrappers: list[Wrapper] = [timeout(1.5), retry(_POLICY), savepoint]
    op = pipe(_op, *(wrappers[place % 3] for place in range(depth)))
    return Layer(f"{depth} wrappers", lambda: engine.run(op))


async def measure_layers(*, rounds: int, calls: int) -> tuple[list[Layer], list[Layer]]:
    """The layers, and pipelines of growing depth. `calls`: how often each is called a round."""
    engine = Engine(instant_pool())
    layers, depths = _layers(), [_deep(engine, depth) for depth in DEPTHS]
    for turn in range(rounds):
        for layer in rotated(layers + depths, turn):
            layer.cpu.samples.append(await _processor_time(layer.call, calls))
    for layer in layers + depths:
        layer.peak = await _peak(layer.call)
        layer.kept = await _kept(layer.call, calls)
    return layers, depths


async def _processor_time(call: Call, calls: int) -> float:
    for _ in range(20):
        await call()
    gc.collect()
    started = time.process_time()
    for _ in range(calls):
        await call()
    return (time.process_time() - started) / calls


async def _peak(call: Call) -> float:
    for _ in range(5):
        await call()
    gc.collect()
    tracemalloc.start()
    try:
        await call()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        await call()
        return float(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


async def _kept(call: Call, calls: int) -> float:
    for _ in range(20):
        await call()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(calls):
        await call()
    gc.collect()
    return (sys.getallocatedblocks() - before) / calls
