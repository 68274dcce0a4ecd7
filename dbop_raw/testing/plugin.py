"""Fixtures for pytest: a real server for the session, and a fresh database for each test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dbop_raw.testing.errors import ServerUnavailable
from dbop_raw.testing.postgres import postgres

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dbop_raw.testing.server import Server

__all__ = ["postgres_dsn", "postgres_server"]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """Give a PostgreSQL server, the same for the whole session; skip with the reason where there is none."""
    opened = postgres()
    try:
        server = opened.__enter__()
    except ServerUnavailable as exc:
        pytest.skip(str(exc))
    try:
        yield server
    finally:
        opened.__exit__(None, None, None)


@pytest.fixture
def postgres_dsn(postgres_server: Server) -> Iterator[str]:
    """Give the DSN of a new, empty database; it is dropped at the end, whoever is still connected."""
    dsn = postgres_server.create_database()
    try:
        yield dsn
    finally:
        postgres_server.drop_database(dsn)
