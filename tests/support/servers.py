"""Servers of a test's own, to be broken or given a standby; the test is skipped where there can be none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from dbop_raw.testing import ServerUnavailable, postgres
from dbop_raw.testing.binaries import embedded_folder, local_folder
from dbop_raw.testing.local import LocalServer
from dbop_raw.testing.postgres import Source

__all__ = ["or_skip", "own_server", "own_source"]

T = TypeVar("T")


@contextmanager
def or_skip(opened: AbstractContextManager[T]) -> Iterator[T]:
    """Enter a context manager for a fixture, and skip the test where what it needs is not installed.

    In CI a test that is skipped fails (DBOP_RAW_NO_SKIP).
    """
    with ExitStack() as stack:
        try:
            value = stack.enter_context(opened)
        except ServerUnavailable as exc:
            pytest.skip(str(exc))
        yield value


@contextmanager
def own_server(**settings: str) -> Iterator[LocalServer]:
    """Give a server made of processes of this machine, never one that a DSN in the environment names.

    Args:
        settings: For postgresql.conf.

    """
    # An external server is not taken where there are settings.
    with or_skip(postgres(settings={"max_connections": "60"} | settings)) as server:
        assert isinstance(server, LocalServer)
        yield server


def own_source() -> Source:
    """Return a source of programs that is here, whatever the environment says of a server."""
    sources: dict[Source, Callable[[], Path]] = {"embedded": embedded_folder, "local": local_folder}
    for source, find in sources.items():
        try:
            find()
        except ServerUnavailable:
            continue
        return source
    pytest.skip("neither the embedded nor a local PostgreSQL is here")
