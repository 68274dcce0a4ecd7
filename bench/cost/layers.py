"""What each layer costs on a connection that answers at once: what is left to measure is Python."""

from __future__ import annotations

import cProfile
import gc
import io
import pstats
import re
import sys
import tracemalloc
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import asyncpg

from bench.command import Run
from bench.measure import Call, Case, timed
from dbop_raw import Engine, Event, RetryPolicy, batch, each, operation, pipe, retry, savepoint, timeout
from dbop_raw.pipeline.operation import Wrapper

DEPTHS = (0, 1, 2, 4, 8)
_POLICY = RetryPolicy(attempts=4)
_PROFILED = 25
"""Functions of a profile."""


class InstantConnection:
    """As much of a connection as an operation needs: it knows BEGIN and COMMIT, and runs nothing."""

    def __init__(self) -> None:
        self._in_transaction = False

    async def execute(self, query: str, *args: object) -> str:
        del args
        if query.startswith("BEGIN"):
            self._in_transaction = True
        elif query in {"COMMIT", "ROLLBACK"}:
            self._in_transaction = False
        return query

    def is_in_transaction(self) -> bool:
        return self._in_transaction

    def is_closed(self) -> bool:
        return False

    def terminate(self) -> None:
        pass


class InstantPool:
    """A pool of one connection, always free."""

    def __init__(self) -> None:
        self._conn = InstantConnection()

    async def acquire(self) -> InstantConnection:
        return self._conn

    async def release(self, connection: InstantConnection, *, timeout: float | None = None) -> None:  # noqa: ASYNC109
        pass

    async def expire_connections(self) -> None:
        pass

    def get_size(self) -> int:
        return 1

    get_idle_size = get_max_size = get_size


def _instant() -> asyncpg.Pool[Any]:
    return cast("asyncpg.Pool[Any]", InstantPool())


def ignored(event: Event) -> None:
    """An observer that does nothing."""


async def _op(conn: Any) -> Any:
    return await conn.execute("INSERT")


async def _by_hand(pool: Any) -> None:
    conn = await pool.acquire()
    try:
        await conn.execute("BEGIN")
        await _op(conn)
        await conn.execute("COMMIT")
    finally:
        await pool.release(conn)


def layers() -> dict[str, Call]:
    pool = _instant()
    engine, observed = Engine(pool), Engine(pool, observer=ignored)
    both = pipe(_op, timeout(1.5), retry(_POLICY))
    return {
        "by hand: acquire, BEGIN, op, COMMIT, release": partial(_by_hand, pool),
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


def depths() -> dict[str, Call]:
    """Pipelines of growing depth: timeout, retry and savepoint nested in turn."""
    engine = Engine(_instant())
    wrappers: list[Wrapper] = [timeout(1.5), retry(_POLICY), savepoint]
    return {
        f"{depth} wrappers": partial(engine.run, pipe(_op, *(wrappers[place % 3] for place in range(depth))))
        for depth in DEPTHS
    }


async def cost(call: Call, calls: int) -> Mapping[str, float]:
    """What one call costs: processor time, memory at its peak, and blocks still in use after many calls."""

    async def repeated() -> None:
        for _ in range(calls):
            await call()

    for _ in range(20):
        await call()
    found = await timed(repeated)
    gc.collect()
    before = sys.getallocatedblocks()
    await repeated()
    gc.collect()
    kept = sys.getallocatedblocks() - before
    return {"cpu s": found["cpu s"] / calls, "bytes": await _peak(call), "blocks": kept / calls}


async def _peak(call: Call) -> float:
    tracemalloc.start()
    try:
        await call()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        await call()
        return float(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


def layer_cases(run: Run) -> list[Case]:
    def case(name: str, calls: Mapping[str, Call]) -> Case:
        contenders = {one: partial(cost, call, run.sizes.calls) for one, call in calls.items()}
        return Case(name=name, rounds=run.sizes.rounds, open=lambda: nullcontext(contenders), seconds=10)

    return [case("layers", layers()), case("depth", depths())]


# --- the profile


@operation
async def _insert(conn: object, item: int) -> None:
    del conn, item


def profile_case(run: Run) -> list[Case]:
    """The functions with the most time of their own, of `run` and of a batch: what to work on next."""
    calls = run.sizes.calls
    engine = Engine(_instant())
    safe = pipe(_op, timeout(1.5), retry(_POLICY))
    write, rows = batch(each(_insert)), range(1000)

    async def profile() -> Mapping[str, float]:
        texts = [
            await _profile(f"{calls} times run + timeout + retry", lambda: engine.run(safe), calls),
            await _profile("batch(each(op)), 1,000 items", lambda: engine.run(write(rows)), calls // 100 + 1),
        ]
        run.result.files["cost-profile.txt"] = "\n".join(texts)
        return {}

    return [Case(name="profile", rounds=1, open=lambda: nullcontext({"profile": profile}), seconds=10)]


async def _profile(title: str, call: Call, calls: int) -> str:
    for _ in range(3):
        await call()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        await call()
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(_PROFILED)
    # Where Python and the packages are installed is nobody's business.
    shown = re.sub(r"\S*/(site-packages|lib/python[\d.]+|dbop_raw|bench)/", r"\1/", text.getvalue())
    return f"{title}\n{'=' * len(title)}\n{shown}"
