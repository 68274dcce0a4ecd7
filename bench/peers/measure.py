"""Measure the ways: interleaved rounds, each checked against what must be in the table."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from bench.figures import Figures, rotated
from bench.peers.peer import Way, missing
from bench.peers.work import Row, State, Work, state_of
from bench.progress import Progress, silent

__all__ = ["Measured", "measure_ways", "said"]


@dataclass(slots=True)
class Measured:
    """One way at one work: rows a second, or why there is none."""

    way: Way
    rate: Figures = field(default_factory=Figures)
    reason: str | None = None


def said(exc: BaseException) -> str:
    """An error in one line."""
    text = str(exc).strip() or "no message"
    return f"{type(exc).__name__}: {text.splitlines()[0][:200]}"


async def measure_ways(
    dsn: str,
    work: Work,
    ways: Sequence[Way],
    *,
    rounds: int,
    chunk: int,
    through: str | None = None,
    progress: Progress = silent,
) -> list[Measured]:
    """All `ways` at one work.

    The rows go in transactions of `chunk` rows. `through`: a DSN that leads to the same database over another
    line, for the ways; tables are made and checked without it.
    """
    measured = [Measured(way, reason=missing(way.needs)) for way in ways]
    conn: asyncpg.Connection[Any] = await asyncpg.connect(dsn)
    try:
        expected = await work.prepare(conn)
        for turn in range(rounds):
            for one in rotated(measured, turn):
                progress(0, f"{work.name}: {one.way.name}")
                if one.reason is None:
                    await _once(conn, through or dsn, work, one, expected, chunk)
                progress(1, "")
    finally:
        await conn.close()
    return measured


async def _once(
    conn: asyncpg.Connection[Any], dsn: str, work: Work, one: Measured, expected: State, chunk: int
) -> None:
    """One round of one way. What goes wrong is its reason to have no figures: the others go on."""
    await work.reset(conn)
    try:
        seconds, failed = await _timed(dsn, work, one.way, chunk)
    except Exception as exc:  # noqa: BLE001 - reported in its row
        one.reason = f"failed: {said(exc)}"
        return
    state = await state_of(conn, work.table)
    bad = len(work.rows) - len(work.good)
    if state != expected:
        one.reason = f"wrong: the table has {state[0]} rows, other than the {expected[0]} good ones"
    elif failed != (0 if one.way.only_good else bad):
        one.reason = f"wrong: it says that {failed} rows failed, but {bad} are bad"
    else:
        # Of all rows, bad ones too, so that the ways can be compared; the limits are given the good ones.
        one.rate.samples.append((expected[0] if one.way.only_good else len(work.rows)) / seconds)


async def _timed(dsn: str, work: Work, way: Way, chunk: int) -> tuple[float, int]:
    """Seconds, and how many rows were said to be bad. Connecting is not counted."""
    rows: Sequence[Any] = work.good if way.only_good else work.text_rows if way.text else work.rows
    chunks: list[Sequence[Row]] = [rows[start : start + chunk] for start in range(0, len(rows), chunk)]
    failed = 0
    async with way.open(dsn, work) as load:
        gc.collect()
        started = time.perf_counter()
        for part in chunks:
            failed += await load(part)
        return time.perf_counter() - started, failed
