"""What a person sees of an ingest: a progress bar, one line of numbers, and what was rejected and why."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from dbop_raw.ingestion.rejects import JsonlRejects, Reject
from dbop_raw.ingestion.report import IngestReport
from dbop_raw.sources.files import Input

__all__ = [
    "RejectKind",
    "TallySink",
    "describe",
    "plural",
    "print_tally",
    "progress_bar",
    "rounded",
    "summary",
]

# Where the output is no terminal, a table may be so wide (characters).
_WIDTH = 140
# A bar that is drawn more often takes time from the work, and shows no more.
_DRAWN_A_SECOND = 4


def plural(number: int, word: str) -> str:
    """Count in words: `1 row`, `2,000 rows`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def rounded(number: float) -> str:
    """Round to three figures: what follows them says nothing about the next run."""
    return f"{float(f'{number:.3g}'):,.0f}"


def summary(report: IngestReport) -> str:
    """Give an ingest's numbers in one line."""
    parts = [
        f"read {report.read:,}",
        f"written {report.written:,}",
        f"rejected {report.rejected:,}",
        f"retries {report.retries:,}",
        f"seconds {report.seconds:.1f}",
        f"rows/s {rounded(report.rows_per_second)}",
    ]
    if report.skipped:
        parts.append(f"{plural(report.skipped, 'chunk')} skipped: in the ledger already")
    return " · ".join(parts)


@dataclass(slots=True)
class RejectKind:
    """Rejects of one SQLSTATE and constraint: how many, and the one that comes first in the source."""

    sqlstate: str
    condition: str
    constraint: str
    example: Reject = field(repr=False)
    count: int = 0


class TallySink:
    """A sink of rejects that counts what it hands on to a file, by SQLSTATE and constraint."""

    def __init__(self, path: Path) -> None:
        self.file = JsonlRejects(path)
        self.before = path.stat().st_size if path.exists() else 0
        """Bytes that the file had already: rejects of an earlier run, to which these are appended."""
        self.kinds: dict[tuple[str, str, str], RejectKind] = {}

    async def write(self, rejects: Sequence[Reject]) -> None:
        """Append them, and then count them; an `OSError` when the file can't be written."""
        await self.file.write(rejects)
        for one in rejects:
            key = (one.sqlstate or "", one.condition, one.constraint or "")
            kind = self.kinds.setdefault(key, RejectKind(*key, example=one))
            kind.count += 1
            if one.index < kind.example.index:
                kind.example = one


def print_tally(sink: TallySink, file: Any = None) -> None:
    """Print what rows were rejected for, the most frequent reason first, and where they are.

    Args:
        sink: Counted them.
        file: Where to print; None: standard output.
    """
    if not sink.kinds:
        return
    file = sys.stdout if file is None else file
    console = Console(file=file, width=None if file.isatty() else _WIDTH, highlight=False, markup=False)
    table = Table(title="rejected", title_justify="left", box=None, pad_edge=False)
    table.add_column("rows", justify="right", no_wrap=True)
    for heading in ("SQLSTATE", "constraint"):
        table.add_column(heading, overflow="fold")
    table.add_column("example", overflow="fold", ratio=1)
    for kind in sorted(sink.kinds.values(), key=lambda kind: -kind.count):
        code = f"{kind.sqlstate} {kind.condition}".strip()
        table.add_row(f"{kind.count:,}", code, kind.constraint or "-", _example(kind.example))
    console.print(table)
    appended = ", appended to those of earlier runs" if sink.before else ""
    console.print(f"rejects, one JSON object a line: {sink.file.path}{appended}", soft_wrap=True)


def _example(reject: Reject) -> str:
    """The first reject in one line: the server's detail where there is one, since it quotes the value."""
    first, *rest = reject.message.splitlines() or [""]
    details = [line.removeprefix("DETAIL:").strip() for line in rest if line.startswith("DETAIL:")]
    return f"row {reject.index:,}: {(details or [first])[0]}"


@contextlib.contextmanager
def progress_bar(source: Input, *, quiet: bool = False) -> Iterator[Callable[[IngestReport], None]]:
    """Show a bar on standard error, where that is a terminal.

    Args:
        source: What is read: the bar counts its bytes, or only moves where their number is not known.
        quiet: Show none.

    Yields:
        What `ingest(progress=…)` takes.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]} rows"),
        TextColumn("{task.fields[rate]} rows/s"),
        TextColumn("{task.fields[rejected]} rejected"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=_DRAWN_A_SECOND) as bar:
        task = bar.add_task(source.name, total=source.size, rows="0", rate="0", rejected="0")

        def advance(report: IngestReport) -> None:
            bar.update(
                task,
                completed=source.position,
                rows=f"{report.read:,}",
                rate=rounded(report.rows_per_second),
                rejected=f"{report.rejected:,}",
            )

        yield advance


def describe(exc: BaseException) -> str:
    """Tell an error in one line: the server's with its code, another by its name where it says nothing."""
    if isinstance(exc, OSError) and exc.strerror and exc.filename:
        return f"{exc.filename}: {exc.strerror}"
    what = " ".join(str(exc).split("\n")[0].split())
    sqlstate = getattr(exc, "sqlstate", None)
    if sqlstate:
        return f"{what} (SQLSTATE {sqlstate})"
    return what or type(exc).__name__
