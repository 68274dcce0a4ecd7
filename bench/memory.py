"""The peak of memory of one ingest of generated rows: `python -m bench.memory DSN ROWS` prints it, in KiB.

A process of its own, since a peak can't be measured twice in one.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dbop_raw import Engine, batch, copy_into, ingest

PAIRS = "DROP TABLE IF EXISTS pairs; CREATE TABLE pairs (id integer PRIMARY KEY, body text NOT NULL)"


async def _ingest(dsn: str, rows: int) -> None:
    async with Engine.open(dsn, min_size=1, max_size=4) as engine:
        await engine.execute(PAIRS)
        # One in a thousand is bad, so that what failed passes through too.
        source: Iterator[Sequence[Any]] = (
            (n, None if n % 1000 == 999 else f"body of row {n}") for n in range(rows)
        )
        report = await ingest(engine, source, batch(copy_into("pairs", columns=("id", "body"))))
        if report.read != rows:
            raise RuntimeError(f"{report.read} rows of {rows} were read")


def _peak_kib() -> int:
    try:
        # Not getrusage(2), where there is this: its peak begins with that of the process that started us.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # macOS counts bytes, all others KiB.
        return peak // 1024 if sys.platform == "darwin" else peak


if __name__ == "__main__":
    asyncio.run(_ingest(sys.argv[1], int(sys.argv[2])))
    print(_peak_kib())
