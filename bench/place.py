"""Where a benchmark runs: in a database of its own, on a durable server of its own or one that is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dbop_raw.testing import postgres

__all__ = ["database"]


@contextmanager
def database(dsn: str | None, name: str) -> Iterator[str]:
    """The DSN of an empty database, which is dropped at the end. On a named server it gets a unique name."""
    with postgres(dsn=dsn) if dsn is not None else postgres(durable=True) as server:
        made = server.create_database(None if dsn is not None else name)
        try:
            yield made
        finally:
            server.drop_database(made)
