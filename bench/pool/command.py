"""The command line: `python -m bench pool --help`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import asyncpg
from rich.console import Console

from bench.pool.errors import BadOption
from bench.pool.options import RESULTS, Options, parse_sizes
from bench.pool.run import run_spike, run_sweep
from bench.pool.userwork import find_workload
from bench.pool.workloads import BUILT_IN
from dbop_raw.testing import ServerError, ServerUnavailable, postgres

__all__ = ["main", "parser"]

_EPILOG = """workloads:
{built_in}
  FILE.sql      its SQL in one message, its own transactions; pgbench's \\set NAME random(LOW, HIGH) and
                :NAME are understood
  pkg.mod:name  an operation, an async function of a connection, or a function that makes an operation
                (called for each request; with a random.Random if it takes one argument); in a transaction

A server named by --dsn gets a schema dbop_raw_bench_pool for a built-in workload; it is dropped at the end.
Exit code: 0 done, also where the data can't decide; 1 the server went away; 2 an option or a server that
can't be used; 130 Ctrl-C.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    default = Options()
    built_in = "\n".join(f"  {one.name:<13} {one.description}" for one in BUILT_IN.values())
    made = argparse.ArgumentParser(
        prog="bench pool",
        description="How large should a connection pool be, for this server and this work?",
        epilog=_EPILOG.format(built_in=built_in),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = made.add_argument_group("what is measured")
    what.add_argument("--dsn", help="postgresql:// URL; default: an embedded server, durable, for this run")
    what.add_argument("--workload", default=default.workload, help="see below; default: %(default)s")
    what.add_argument("--sizes", default=",".join(map(str, default.sizes)), help="default: %(default)s")
    load = what.add_mutually_exclusive_group()
    load.add_argument("--clients", type=int, help=f"closed loop: so many callers; default: {default.clients}")
    load.add_argument("--rate", type=float, help="open loop: so many requests a second, by chance")
    what.add_argument("--spike", action="store_true", help="instead: a burst on a pool that grows on demand")
    _add_times(made.add_argument_group("how"), default)
    made.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for the results; default: bench/results"
    )
    return made


def _add_times(how: argparse._ArgumentGroup, default: Options) -> None:
    for name, kind, text in (
        ("seconds", float, "of one measurement"),
        ("warmup", float, "seconds before each that don't count"),
        ("rounds", int, "how often each size is measured"),
        ("seed", int, "of the order, the requests and the arrivals"),
        ("acquire-timeout", float, "seconds that the engine waits for a connection"),
        ("burst", int, "requests in a spike"),
        ("connect-delay", float, "seconds to open a connection in a spike"),
    ):
        value = getattr(default, name.replace("-", "_"))
        how.add_argument(f"--{name}", type=kind, default=value, help=f"{text}; default: {value}")
    how.add_argument("--max-waiting", type=int, help="shed calls beyond so many that wait; default: never")
    how.add_argument("--cores", type=int, help="of the server, for 2 * cores + 1; default: of this machine")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; gives the exit code."""
    try:
        options = _options(parser().parse_args(arguments))
        workload = find_workload(options.workload)
        work = run_spike if options.spike else run_sweep
        _check_folder(options.out)
        with _server(options) as dsn:
            report = asyncio.run(work(dsn, options, workload))
        paths = report.write(options.out)
    except (BadOption, ServerUnavailable, ServerError) as exc:
        print(f"bench pool: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench pool: stopped by Ctrl-C; nothing was written", file=sys.stderr)
        return 130
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, ExceptionGroup) as exc:
        # In the middle of the run: the server is gone, most likely. By name alone: a message may quote data.
        print(
            f"bench pool: stopped by {_names(exc)}: is the server still there? Nothing was written",
            file=sys.stderr,
        )
        return 1
    report.print(Console())
    print(f"\nwritten: {', '.join(path.name for path in paths)} in {options.out}")
    return 0


def _names(exc: Exception) -> str:
    """The kinds of an error, or of all in a group."""
    if isinstance(exc, ExceptionGroup):
        return " and ".join(dict.fromkeys(_names(one) for one in exc.exceptions))
    return type(exc).__name__


def _check_folder(folder: Path) -> None:
    """Raise `BadOption` before anything is measured, not when it is to be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise BadOption(f"--out {folder}: can't make it: {exc.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise BadOption(f"--out {folder}: can't write there")


def _options(asked: argparse.Namespace) -> Options:
    given = {name: value for name, value in vars(asked).items() if value is not None}
    given["sizes"] = parse_sizes(given["sizes"])
    return Options(**given)


@contextlib.contextmanager
def _server(options: Options) -> Iterator[str]:
    """The DSN to measure; of a server of our own for the time of the block where none is named."""
    if options.dsn is not None:
        yield options.dsn
        return
    # Room for the largest pool, the watcher, and what the server keeps for its superuser.
    room = {"max_connections": str(max(100, options.sizes[-1] + 10))}
    with postgres(durable=True, settings=room) as server:
        yield server.create_database("bench_pool")
