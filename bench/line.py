"""Lines to the server: the slow one, on which each answer is late, and how long a round trip takes.

The slow line is a `FaultProxy` in a process of its own: in the process that measures, it would take that
one's time, and its event loop's.

    python -m bench.line HOST PORT SECONDS      prints its port, and ends with its input
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from bench import ROOT, connected
from dbop_raw.testing import FaultProxy


@contextmanager
def line_to(dsn: str, seconds: float) -> Iterator[str]:
    """The DSN of a line to the same database, each answer comes `seconds` late; 0: the direct one."""
    if not seconds:
        yield dsn
        return
    parts = urlsplit(dsn)
    command = [
        sys.executable,
        "-m",
        "bench.line",
        parts.hostname or "",
        str(parts.port or 5432),
        repr(seconds),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdin is not None  # noqa: S101 - for the type checker
        assert process.stdout is not None  # noqa: S101
        try:
            port = process.stdout.readline().strip()
            if not port:
                raise RuntimeError("the proxy of the slow line did not start")
            account, at, _ = parts.netloc.rpartition("@")
            yield parts._replace(netloc=f"{account}{at}127.0.0.1:{port}").geturl()
        finally:
            process.stdin.close()
            process.wait(10)


async def round_trip(dsn: str, calls: int = 50) -> dict[str, float]:
    """Seconds: the median time of `SELECT 1` over a line."""
    took = []
    async with connected(dsn) as conn:
        for _ in range(calls):
            started = time.perf_counter()
            await conn.execute("SELECT 1")
            took.append(time.perf_counter() - started)
    return {"s": statistics.median(took)}


async def _serve(host: str, port: int, seconds: float) -> None:
    async with FaultProxy(host, port) as proxy:
        proxy.delay_server = seconds
        print(proxy.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
