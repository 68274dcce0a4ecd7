"""The pytest fixtures that a user's tests get: a server for the session, and a database for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbop_raw.testing import Server
from tests.support.programs import run_pytest

pytestmark = pytest.mark.slow


def test_each_test_gets_a_database_of_its_own(folder: Path, server: Server) -> None:
    test_file = folder / "test_it.py"
    test_file.write_text(
        "import pytest\nfrom dbop_raw.testing.server import run_sql\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_fresh(postgres_dsn, n):\n"
        "    run_sql(postgres_dsn, 'CREATE TABLE t (a int)')\n"
        "def test_server(postgres_server):\n"
        "    assert postgres_server.sql('SELECT 1') == 1\n"
    )
    before = server.sql("SELECT count(*) FROM pg_database")
    output = run_pytest(test_file, DBOP_RAW_TEST_DSN=server.dsn)
    assert "3 passed" in output
    assert server.sql("SELECT count(*) FROM pg_database") == before


def test_a_test_without_a_server_is_skipped_with_the_reason(folder: Path) -> None:
    test_file = folder / "test_it.py"
    test_file.write_text("def test_it(postgres_dsn):\n    assert False\n")
    (folder / "conftest.py").write_text(
        "import importlib.util\nimportlib.util.find_spec = lambda name: None\n"
    )
    output = run_pytest(test_file, DBOP_RAW_PG_BIN="/nowhere")
    assert "1 skipped" in output
    assert "no PostgreSQL for a test" in output
