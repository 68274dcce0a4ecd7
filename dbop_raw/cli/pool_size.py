"""`dbop-raw pool-size`: how large a connection pool should be, measured. Needs the extra `sizing`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import asyncpg
import typer
from rich import progress
from rich.console import Console

from dbop_raw.sizing.options import BadOption, Options, parse_sizes
from dbop_raw.sizing.workloads import BUILT_IN, SCHEMA, find_workload
from dbop_raw.testing import ServerError, ServerUnavailable, postgres

__all__ = ["HELP", "pool_size"]

# What the extra brings beyond what this module needs.
_NEEDED = frozenset({"markdown_it", "matplotlib", "numpy"})
_WORKLOADS = "\n".join(f"- `{one.name}`: {one.description}" for one in BUILT_IN.values())
_DEFAULT = Options()

HELP = f"""Find out how large a connection pool should be, for a server and a kind of work.

Sends requests through pools of several sizes, in rounds that measure each size once in a shuffled order, by
this library and by plain asyncpg. The answer is the smallest size with 95 % of the best throughput and no
much longer waits, or that the data can't decide; with what held it up, and what the common formula says. With
the defaults it takes about five minutes.

**Workloads** (`--workload`)

{_WORKLOADS}
- `FILE.sql`: its SQL in one message, its own transactions; pgbench's `\\set NAME random(LOW, HIGH)`, `:NAME`
- `package.module:name`: an operation, an async function of a connection, or a function that makes an
  operation (called for each request; with a random.Random if it takes one argument); each in a transaction

A built-in workload makes a schema {SCHEMA} on the server, which is dropped at the end.

**Exit code**: 0 done, also where the data can't decide · 1 the server went away · 2 an option, a workload or
the server can't be used · 130 Ctrl-C.

**Examples**

    dbop-raw pool-size

    dbop-raw pool-size --dsn postgresql://app@db/app --workload checkout.sql --cores 16 --out .

    dbop-raw pool-size --workload shop.work:checkout --rate 500 --sizes 2,4,8,16

    dbop-raw pool-size --spike --sizes 20 --burst 500
"""


def pool_size(
    *,
    dsn: Annotated[
        str | None,
        typer.Option(help="postgresql:// URL. Default: an embedded server, durable, for this run."),
    ] = None,
    workload: Annotated[str, typer.Option(help="What a request does: see above.")] = _DEFAULT.workload,
    sizes: Annotated[str, typer.Option(help="Connections in the pool.")] = ",".join(map(str, _DEFAULT.sizes)),
    clients: Annotated[
        int | None,
        typer.Option(help=f"Closed loop: so many callers, one request each. Default: {_DEFAULT.clients}."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop instead: so many requests a second, come what may.")
    ] = None,
    spike: Annotated[
        bool,
        typer.Option("--spike", help="Instead: bursts on a pool that grows on demand, and on a full one."),
    ] = False,
    seconds: Annotated[float, typer.Option(help="Of one measurement.")] = _DEFAULT.seconds,
    warmup: Annotated[float, typer.Option(help="Seconds before each that don't count.")] = _DEFAULT.warmup,
    rounds: Annotated[int, typer.Option(help="How often each size is measured.")] = _DEFAULT.rounds,
    seed: Annotated[int, typer.Option(help="Of the order, the requests and the arrivals.")] = _DEFAULT.seed,
    acquire_timeout: Annotated[
        float, typer.Option(help="Seconds that a request waits for a connection.")
    ] = _DEFAULT.acquire_timeout,
    max_waiting: Annotated[
        int | None, typer.Option(help="Shed requests beyond so many that wait. Default: never.")
    ] = None,
    cores: Annotated[
        int | None, typer.Option(help="Of the server, for 2 * cores + 1. Default: of this machine.")
    ] = None,
    burst: Annotated[int, typer.Option(help="Requests in a burst.")] = _DEFAULT.burst,
    connect_delay: Annotated[
        float, typer.Option(help="Seconds more to open a connection in a burst.")
    ] = _DEFAULT.connect_delay,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the result, as JSON, Markdown, HTML and a chart. Default: none."),
    ] = None,
    details: Annotated[bool, typer.Option("--details", help="Print every table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure."""
    try:
        options = Options(
            workload=workload,
            sizes=parse_sizes(sizes),
            clients=_callers(clients, rate),
            rate=rate,
            spike=spike,
            seconds=seconds,
            warmup=warmup,
            rounds=rounds,
            seed=seed,
            acquire_timeout=acquire_timeout,
            max_waiting=max_waiting,
            cores=cores,
            burst=burst,
            connect_delay=connect_delay,
        )
        code = _measure(dsn, options, out, details=details, quiet=quiet)
    except (BadOption, ServerUnavailable, ServerError) as exc:
        code = _complain(str(exc), 2)
    except KeyboardInterrupt:
        code = _complain("stopped by Ctrl-C; nothing was written", 130)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, ExceptionGroup) as exc:
        # In the middle of the run: the server is gone, most likely. By name alone: a message may quote data.
        code = _complain(f"stopped by {_names(exc)}: is the server still there? Nothing was written", 1)
    raise typer.Exit(code)


def _callers(clients: int | None, rate: float | None) -> int:
    if clients is not None and rate is not None:
        raise BadOption("--rate and --clients: an open loop or a closed one, give one of them")
    return _DEFAULT.clients if clients is None else clients


def _measure(dsn: str | None, options: Options, out: Path | None, *, details: bool, quiet: bool) -> int:
    # A module of the user's own is found from where they stand, as by `python -m`.
    sys.path.insert(0, str(Path.cwd()))
    workload = find_workload(options.workload)
    if out is not None:
        _check_folder(out)
    try:
        # Here and not above: the other commands need none of these packages.
        from rich.markdown import Markdown  # noqa: PLC0415

        from dbop_raw.sizing.run import planned_seconds, run  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        package = (exc.name or "").partition(".")[0]
        if package not in _NEEDED:
            raise
        return _complain(f"pool-size needs the package {package}: pip install 'dbop-raw[sizing]'", 2)
    kind = "embedded, on the same machine" if dsn is None else "named by --dsn"
    with _server(dsn, options) as server, _bar(planned_seconds(options), quiet=quiet) as told:
        report = asyncio.run(run(server, options, workload, kind=kind, progress=told))
    console = Console(highlight=False)
    for number, sentence in enumerate(report.sentences):
        console.print(sentence, style="bold green" if not number else "", markup=False)
    for table in report.tables if details else report.tables[:1]:
        console.print()
        console.print(Markdown(table.markdown()))
    if out is None:
        print("\n--details prints more tables, --out FOLDER keeps the result with a chart")
        return 0
    try:
        paths = report.write(out)
    except OSError as exc:
        raise BadOption(f"--out {out}: can't write there: {exc.strerror}") from None
    print(f"\nwritten: {', '.join(path.name for path in paths)} in {out}")
    return 0


def _complain(what: str, code: int) -> int:
    print(f"dbop-raw: {what}", file=sys.stderr)
    return code


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


@contextlib.contextmanager
def _server(dsn: str | None, options: Options) -> Iterator[str]:
    """The DSN to measure; of a server of our own for the time of the block where none is named."""
    if dsn is not None:
        yield dsn
        return
    # Room for the largest pool, the watcher, and what the server keeps for its superuser.
    room = {"max_connections": str(max(100, options.sizes[-1] + 10))}
    with postgres(durable=True, settings=room) as server:
        yield server.create_database("pool_size")


@contextlib.contextmanager
def _bar(total: float, *, quiet: bool) -> Iterator[Callable[[float, str], None]]:
    """Show on a terminal how far it is; gives what is told of each step's seconds and of what comes next."""
    console = Console(stderr=True)
    columns = (
        progress.BarColumn(),
        progress.TextColumn("{task.description}"),
        progress.TimeRemainingColumn(),
    )
    hidden = quiet or not console.is_terminal
    with progress.Progress(*columns, console=console, disable=hidden, speed_estimate_period=total) as bar:
        task = bar.add_task("", total=total)
        yield lambda seconds, what: bar.update(task, advance=seconds, description=what or None)
