"""The commands of `dbop-raw`, put together: each is in a file of its own. Needs the extra `cli`."""

from __future__ import annotations

import typer

from dbop_raw.cli import ingest, pool_size, sqlstate

__all__ = ["app"]

app = typer.Typer(
    name="dbop-raw",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Load a CSV file into PostgreSQL, bad rows set aside; size a connection pool; explain a SQLSTATE.",
)
app.command("ingest", help=ingest.HELP)(ingest.command)
app.command("sqlstate", help=sqlstate.HELP)(sqlstate.command)
app.command("pool-size", help=pool_size.HELP)(pool_size.pool_size)
