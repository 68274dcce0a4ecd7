"""A server for the tests of `dbop_raw.testing` itself, and a folder that its account can reach."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbop_raw.testing import Server, postgres
from tests.support.servers import own_source

OWN_VARIABLES = ("DBOP_RAW_TEST_DSN", "DBOP_RAW_PG_BIN")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OWN_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with postgres(source=own_source()) as server:
        yield server


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that another account can reach, too (pytest's own tmp_path is closed to it)."""
    with tempfile.TemporaryDirectory(prefix="dbop_raw_test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)
