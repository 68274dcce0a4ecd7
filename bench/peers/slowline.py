"""A line to the server on which each answer is late: a `FaultProxy` in a process of its own.

In the process that measures it would take that one's time, and its event loop's.

    python -m bench.peers.slowline HOST PORT SECONDS      prints its port, and ends with its input
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg

from dbop_raw.testing import FaultProxy

__all__ = ["round_trip", "slow_line"]

_ROOT = Path(__file__).resolve().parent.parent.parent


@contextmanager
def slow_line(dsn: str, seconds: float) -> Iterator[str]:
    """The DSN of a line to the same database, each answer of which comes `seconds` late."""
    parts = urlsplit(dsn)
    command = [
        sys.executable,
        "-m",
        "bench.peers.slowline",
        parts.hostname or "",
        str(parts.port or 5432),
        repr(seconds),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT
    ) as process:
        assert process.stdin is not None  # noqa: S101 - for the type checker
        assert process.stdout is not None  # noqa: S101
        try:
            line = process.stdout.readline().strip()
            if not line:
                raise RuntimeError("the proxy of the slow line did not start")
            account = parts.netloc.rpartition("@")[0]
            yield parts._replace(
                netloc=f"{account}@127.0.0.1:{line}" if account else f"127.0.0.1:{line}"
            ).geturl()
        finally:
            process.stdin.close()
            process.wait(10)


async def round_trip(dsn: str, tries: int = 50) -> float:
    """Seconds: the median time of `SELECT 1` over a line."""
    conn = await asyncpg.connect(dsn)
    try:
        took = []
        for _ in range(tries):
            started = time.perf_counter()
            await conn.execute("SELECT 1")
            took.append(time.perf_counter() - started)
    finally:
        await conn.close()
    return statistics.median(took)


async def _serve(host: str, port: int, seconds: float) -> None:
    async with FaultProxy(host, port) as proxy:
        proxy.delay_server = seconds
        print(proxy.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
