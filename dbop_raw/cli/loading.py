"""A CSV file into a table, as a command asked for it, and the truth about what is in when it ends."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import asyncpg

from dbop_raw.batching.batch import batch
from dbop_raw.batching.writers.copy_text import copy_text
from dbop_raw.cli import show
from dbop_raw.cli.sigterm import Sigterm
from dbop_raw.cli.target import Target, TargetError, connect
from dbop_raw.engine.engine import Engine
from dbop_raw.failure.errors import DbopError, PolicyError, RetriesExhausted, SkipLimitExceeded
from dbop_raw.ingestion.ingest import ingest
from dbop_raw.ingestion.ledger import Ledger
from dbop_raw.ingestion.report import IngestReport
from dbop_raw.sources.csv import CsvRows, Dialect, Row
from dbop_raw.sources.files import STDIN, Input, SourceError, open_input
from dbop_raw.sources.threads import in_thread, items_in_thread

__all__ = ["Job", "load", "run"]

# Exit codes. The last two are a shell's for a program that SIGINT or SIGTERM ended.
ALL_WRITTEN, SOME_REJECTED, FAILED, OVER_LIMIT = 0, 1, 2, 3
INTERRUPTED, TERMINATED = 130, 143

_ENDINGS = (".gz", ".zip", ".csv", ".tsv", ".txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What was asked for on the command line."""

    file: str
    table: str
    schema: str | None = None
    dsn: str | None = None
    columns: tuple[str, ...] | None = None
    """None: all of the file's header."""
    dialect: Dialect = field(default_factory=Dialect)
    rejects: Path | None = None
    workers: int = 4
    size: int = 1000
    skip_limit: int | None = None
    ledger: str | None = None
    quiet: bool = False

    @property
    def rejects_path(self) -> Path:
        """Where rejects go: as asked for, else named after the file, in the current folder."""
        if self.rejects is not None:
            return self.rejects
        if self.file == STDIN:
            return Path("stdin.rejects.jsonl")
        name = Path(self.file).name
        while name.lower().endswith(_ENDINGS):
            name = name[: name.rindex(".")]
        return Path(f"{name or 'rows'}.rejects.jsonl")


def run(job: Job) -> int:
    """Do it, and tell of it on standard output and standard error.

    Args:
        job: What was asked for.

    Returns:
        The process's exit code.
    """
    running = _Running(job)
    with Sigterm() as sigterm:
        try:
            return asyncio.run(running.main(sigterm))
        except KeyboardInterrupt:
            return running.complain("stopped by Ctrl-C", INTERRUPTED)
        except asyncio.CancelledError:
            if not sigterm.received:
                raise
            return running.complain("stopped by SIGTERM", TERMINATED)


async def load(
    engine: Engine,
    rows: CsvRows,
    source: Input,
    job: Job,
    *,
    sink: show.TallySink,
    progress: Callable[[IngestReport], None],
) -> IngestReport:
    """Write rows into the job's table with COPY, in chunks.

    Args:
        engine: Where to.
        rows: What to write.
        source: What they are read from.
        job: The table, and how to cut chunks.
        sink: Gets the rejects.
        progress: Gets a report after each chunk.

    Returns:
        The report of `ingest`, which also says what is raised.
    """
    # A pipe is read in a thread, so that waiting for it leaves no transaction hanging; a file is read faster
    # right here, a chunk at a time.
    items: Iterable[Row] | AsyncIterable[Row] = (
        items_in_thread(iter(rows), job.size) if source.may_wait else rows
    )
    return await ingest(
        engine,
        items,
        batch(copy_text(job.table, columns=rows.columns, schema=job.schema)),
        size=job.size,
        workers=job.workers,
        rejects=sink,
        skip_limit=job.skip_limit,
        ledger=None if job.ledger is None else Ledger(job.ledger),
        progress=progress,
    )


class _Running:
    """One job on its way, and what is known of it when it stops."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._report: IngestReport | None = None
        self._sink: show.TallySink | None = None

    async def main(self, sigterm: Sigterm) -> int:
        """All of it, every error told in one sentence; gives the exit code."""
        sigterm.cancels_this_task()
        try:
            source = open_input(self._job.file)
            try:
                return await self._write(source)
            finally:
                source.close()
        except (SourceError, TargetError, PolicyError) as exc:
            return self.complain(str(exc))
        except SkipLimitExceeded as exc:
            last = show.describe(exc.failed[-1].error)
            rows = show.plural(exc.limit, "row")
            return self.complain(
                f"more than {rows} rejected (--skip-limit), the last for: {last}", OVER_LIMIT
            )
        except RetriesExhausted as exc:
            cause = exc.__cause__ if isinstance(exc.__cause__, Exception) else exc
            return self.complain(f"gave up after {exc.attempts} attempts: {show.describe(cause)}")
        except (DbopError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as exc:
            return self.complain(show.describe(exc))

    async def _write(self, source: Input) -> int:
        job = self._job
        self._sink = sink = _open_sink(job.rejects_path, source)
        async with connect(job.dsn, connections=job.workers) as engine:
            rows = await self._matching(engine, source)
            with show.progress_bar(source, quiet=job.quiet) as progress:

                def keep(report: IngestReport) -> None:
                    self._report = report
                    progress(report)

                report = await load(engine, rows, source, job, sink=sink, progress=keep)
        if rows.broken is not None:
            return self.complain(str(rows.broken))
        print(show.summary(report))
        show.print_tally(sink)
        return SOME_REJECTED if report.rejected else ALL_WRITTEN

    async def _matching(self, engine: Engine, source: Input) -> CsvRows:
        """Open the rows of the source, and make sure that the table has their columns."""
        job = self._job
        target = await engine.run(
            lambda conn: Target.find(conn, job.table, job.schema), readonly=True, autocommit=True
        )
        # With a ledger a broken line must not pass for the file's end: the ledger may know of more.
        make = partial(CsvRows, source, job.dialect, raise_broken=job.ledger is not None)
        # In a thread: the header of a pipe may be long in coming.
        rows = await in_thread(make)
        if job.columns is not None:
            rows.select(job.columns)
        target.check(rows.columns)
        return rows

    def complain(self, what: str, code: int = FAILED) -> int:
        """Say on standard error why it stopped, and what is in and what is not.

        Args:
            what: Why, as a sentence.
            code: The exit code.

        Returns:
            That code.
        """
        report = self._report
        if report is not None and self._sink is not None:
            print(show.summary(report))
            show.print_tally(self._sink)
        print(f"dbop-raw: {what.rstrip('.')}. {self._state(report)}", file=sys.stderr)
        return code

    def _state(self, report: IngestReport | None) -> str:
        """Say in a sentence what is in the table, and how to go on."""
        if report is None or not (report.written or report.rolled_back or report.rejected):
            before = 0 if report is None else report.skipped
            known = f" {show.plural(before, 'chunk')} were in already, as the ledger knows." if before else ""
            return f"Nothing was written.{known}"
        rows, chunks = show.plural(report.written, "row"), show.plural(report.chunks, "chunk")
        told = f"{rows} of {chunks} are in the table, and {report.rejected:,} rejected"
        if report.rolled_back:
            told += f"; {show.plural(report.rolled_back, 'chunk')} in flight rolled back, or never sent"
        if self._job.ledger is not None:
            return f"{told}. The ledger knows which: the same command goes on from there."
        if report.finished:
            return f"{told}: all that comes before that line, and nothing from it on."
        return (
            f"{told}. These need not be the first of the file: before you run it again, empty the table; "
            "with --ledger it would go on from there."
        )


def _open_sink(path: Path, source: Input) -> show.TallySink:
    """Name the file for rejects; a `PolicyError` when it can't be written to, before anything is."""
    if source.is_of(path):
        raise PolicyError(f"the rejects file {path} is the input itself: name another with --rejects")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PolicyError(f"the rejects file {path} can't be written: name another with --rejects")
    return show.TallySink(path)
