"""Measuring: the contenders of a case take turns, round by round, and what each finds becomes rows."""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bench.header import version
from bench.results import ALL, Result

T = TypeVar("T")
Call = Callable[[], Awaitable[object]]
Contender = Callable[[], Awaitable[Mapping[str, float]]]
"""Does the work once, and gives figures by their units."""
Open = Callable[[], AbstractAsyncContextManager[Mapping[str, Contender]]]


class NotMeasured(Exception):
    """A case or a contender can't be measured here; the message says why and begins with "not"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Contenders beside each other."""

    name: str
    rounds: int
    open: Open
    """Makes ready what they need, gives them by name, and takes it away."""
    seconds: float = 1.0
    """About how long it takes, for the time that is left."""
    warm: bool = False
    """One more round, before the others, warms caches and does not count."""


@dataclass(frozen=True, slots=True)
class Way:
    """A contender of several cases: how one library does the work."""

    name: str
    note: str
    """How the library is used, for the report."""
    open: Callable[..., AbstractAsyncContextManager[Any]]
    """Connects to a DSN, gives what does the work, and disconnects."""
    needs: Sequence[str] = ()
    """Packages, as their registry calls them."""
    limit: bool = False
    """It does less than the others: it sets no bad rows aside, or has neither timeouts nor retry."""
    text: bool = False
    """It takes rows of text, as a CSV gives them."""

    def require(self) -> None:
        """Raise `NotMeasured` where a package is missing."""
        absent = [package for package in self.needs if version(package) is None]
        if absent:
            raise NotMeasured(f"not installed: {', '.join(absent)} (pip install 'dbop-raw[peers]')")


async def measure(cases: Sequence[Case], result: Result) -> None:
    """Add the rows of all cases. What goes wrong with one contender is its row, and the others go on."""
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    # A round may take minutes: what is left is told from all that was done.
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=86_400) as bar:
        task = bar.add_task("", total=sum(case.seconds for case in cases))
        for case in cases:
            try:
                async with case.open() as contenders:
                    steps = (case.rounds + case.warm) * len(contenders)
                    for turn in range(0 if case.warm else 1, case.rounds + 1):
                        for name in rotated(list(contenders), max(0, turn - 1)):
                            bar.update(task, description=f"{case.name}: {name}")
                            await _once(case.name, name, contenders[name], turn, result)
                            bar.advance(task, case.seconds / steps)
            except Exception as exc:  # noqa: BLE001 - reported in its row
                result.fail(case.name, ALL, said(exc))


async def _once(case: str, name: str, contender: Contender, turn: int, result: Result) -> None:
    if result.why(case, name):
        return
    try:
        figures = await contender()
    except Exception as exc:  # noqa: BLE001 - reported in its row
        result.fail(case, name, said(exc))
    else:
        if turn:
            result.add(case, name, turn, figures)


def said(exc: BaseException) -> str:
    """An error in one line."""
    text = (str(exc).strip() or "no message").splitlines()[0][:200]
    return text if isinstance(exc, NotMeasured) else f"failed: {type(exc).__name__}: {text}"


def rotated(things: Sequence[T], turn: int) -> list[T]:
    """The same, beginning with another one each turn: none always comes first."""
    start = turn % len(things)
    return [*things[start:], *things[:start]]


async def timed(call: Call) -> dict[str, float]:
    """Seconds of the clock and of this process's processor time."""
    gc.collect()
    cpu, started = time.process_time(), time.perf_counter()
    await call()
    return {"s": time.perf_counter() - started, "cpu s": time.process_time() - cpu}
