"""What the commands have in common that measure for long and write a report and a chart."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bench.header import RESULTS
from bench.place import database
from dbop_raw.testing import ServerError, ServerUnavailable

__all__ = ["carry_out", "parser"]


class _Report(Protocol):
    def markdown(self) -> str: ...

    def write(self, folder: Path) -> list[Path]: ...


R = TypeVar("R", bound=_Report)


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Where it measures, and where the results go; the benchmark adds how much."""
    made = argparse.ArgumentParser(prog=f"bench {name}", description=description, allow_abbrev=False)
    made.add_argument("--dsn", help="postgresql:// URL; gets a database for the time. Default: embedded")
    made.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works")
    made.add_argument("--out", type=Path, help="folder; default: bench/results, with --quick none")
    return made


def carry_out(
    name: str,
    asked: argparse.Namespace,
    measure: Callable[[str], Coroutine[Any, Any, R]],
    draw: Callable[[R, Path], Path | None],
) -> int:
    """Measure on the server that is asked for, and print and write what came of it; gives the exit code.

    `measure` gets the DSN of a database of its own. `draw` gives None where a chart can't be drawn.
    """
    try:
        with database(asked.dsn, f"bench_{name}") as dsn:
            report = asyncio.run(measure(dsn))
    except (ServerUnavailable, ServerError) as exc:
        print(f"bench {name}: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bench {name}: stopped by Ctrl-C; nothing was written", file=sys.stderr)
        return 130
    print(report.markdown())
    out = asked.out or (None if asked.quick else RESULTS)
    if out is None:
        return 0
    report.write(out)
    chart = draw(report, out / f"{name}.png")
    print(f"written: {name}.*, in {out.name}")
    if chart is None:
        print("no chart: matplotlib is not installed (pip install 'dbop-raw[bench]')", file=sys.stderr)
    return 0
