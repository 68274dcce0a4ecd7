"""`dbop-raw ingest`: its options and its help. What it does with them is in `loading.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dbop_raw.cli.loading import Job, run
from dbop_raw.sources.csv import Dialect

__all__ = ["HELP", "command"]

HELP = """Load a CSV file with a header into a table, in chunks of one transaction each.

Rows that the server refuses go to a file, each with its SQLSTATE and the server's message; all others are
written. The server's own types parse the values. `.gz` and `.zip` (of one file) are unpacked, `-` is standard
input.

A line that is no CSV row (wrong number of fields, stray quote, wrong encoding) ends it: all before that line
is in. An error that every row would meet (no privilege, disk full) or `--skip-limit` ends it too. Whatever
ends it, the last line says what is in the table.

**Exit code**: 0 all rows written · 1 some rejected, and not more than `--skip-limit` · 2 it could not run, or
stopped on the way · 3 more rejected than `--skip-limit` · 130 Ctrl-C, 143 SIGTERM.

**Examples**

    dbop-raw ingest events.csv --table events --dsn postgresql://app@localhost/app

    dbop-raw ingest flights.csv.gz --table flights --null NA --workers 4 --ledger flights-2013

    zcat big.csv.gz | dbop-raw ingest - --table big --columns id,body --skip-limit 100
"""


def _one_character(value: str) -> str:
    value = "\t" if value in {"\\t", "tab"} else value
    if len(value) != 1 or value in '"\r\n':
        raise typer.BadParameter("give one character, such as , or ; or tab")
    return value


def _encoding(value: str) -> str:
    try:
        newline = "\n".encode(value)
    except LookupError as exc:
        raise typer.BadParameter(f"Python knows no encoding {value!r}") from exc
    if newline != b"\n":
        raise typer.BadParameter(f"{value} can't be read line by line: convert the file to UTF-8 before")
    return value


def command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="CSV file, or - for standard input.")],
    *,
    table: Annotated[str, typer.Option(help="Table to write to; its name as it is, without quotes.")],
    schema: Annotated[str | None, typer.Option(help="Its schema. Default: by the search_path.")] = None,
    dsn: Annotated[
        str | None, typer.Option(help="postgresql:// URL. Default: DATABASE_URL, else PGHOST, PGUSER, ….")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns of the header to load, as a,b,c. Default: all of them.")
    ] = None,
    null: Annotated[
        str,
        typer.Option(help="A field of exactly this text is NULL, quoted or not. Default: the empty field."),
    ] = "",
    delimiter: Annotated[
        str, typer.Option(callback=_one_character, help="Between fields: one character, or tab.")
    ] = ",",
    encoding: Annotated[
        str, typer.Option(callback=_encoding, help="Of the file, as Python names it.")
    ] = "utf-8",
    rejects: Annotated[
        Path | None, typer.Option(help="File for rejected rows. Default: FILE's name + .rejects.jsonl, here.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Chunks in flight at a time, a connection each.")] = 4,
    size: Annotated[int, typer.Option(min=1, help="Rows in a chunk.")] = 1000,
    skip_limit: Annotated[
        int | None, typer.Option(min=0, help="Stop when more rows than that are rejected.")
    ] = None,
    ledger: Annotated[
        str | None,
        typer.Option(help="Remember under this name which chunks are in: the same command goes on there."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Load a CSV file."""
    job = Job(
        file=file,
        table=table,
        schema=schema,
        dsn=dsn,
        columns=None if columns is None else tuple(columns.split(",")),
        dialect=Dialect(delimiter, null, encoding),
        rejects=rejects,
        workers=workers,
        size=size,
        skip_limit=skip_limit,
        ledger=ledger,
        quiet=quiet,
    )
    raise typer.Exit(run(job))
