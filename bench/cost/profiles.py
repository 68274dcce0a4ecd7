"""A profile to work from: which functions the layer's own time goes to."""

from __future__ import annotations

import cProfile
import io
import pstats
import re
from collections.abc import Awaitable, Callable

from bench.cost.instant import instant_pool
from dbop_raw import Engine, RetryPolicy, batch, each, operation, pipe, retry, timeout

__all__ = ["profiles"]

_LINES = 25


@operation
async def _insert(conn: object, item: int) -> None:
    del conn, item


async def _op(conn: object) -> None:
    del conn


async def profiles(calls: int) -> str:
    """The 25 functions with the most time of their own, of `run` and of a batch, on an instant connection."""
    engine = Engine(instant_pool())
    safe = pipe(_op, timeout(1.5), retry(RetryPolicy(attempts=4)))
    write, rows = batch(each(_insert)), range(1000)
    return "\n".join(
        (
            await _profile(f"{calls} times run + timeout + retry", lambda: engine.run(safe), calls),
            await _profile("batch(each(op)), 1,000 items", lambda: engine.run(write(rows)), calls // 100 + 1),
        )
    )


async def _profile(title: str, call: Callable[[], Awaitable[object]], calls: int) -> str:
    for _ in range(3):
        await call()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        await call()
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(_LINES)
    # Where Python and the packages are installed is nobody's business.
    shown = re.sub(r"\S*/(site-packages|lib/python[\d.]+|dbop_raw|bench)/", r"\1/", text.getvalue())
    return f"{title}\n{'=' * len(title)}\n{shown}"
