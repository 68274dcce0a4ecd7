"""The rig for servers in Docker: crashed, frozen, started again, and one process of it ended."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from dbop_raw.testing.server import run_sql
from tests.support.container import DockerServer, docker_server
from tests.support.servers import or_skip


@pytest.fixture(scope="module")
def container() -> Iterator[DockerServer]:
    with or_skip(docker_server({"max_connections": "19"})) as server:
        yield server


def test_settings_reach_the_server_in_the_container(container: DockerServer) -> None:
    assert container.sql("SHOW max_connections") == "19"


def test_rows_survive_a_crash_of_the_container(container: DockerServer) -> None:
    dsn = container.create_database()
    run_sql(dsn, "CREATE TABLE t AS SELECT 1 AS a")
    container.crash()
    container.start()
    assert run_sql(dsn, "SELECT a FROM t") == 1


def test_a_frozen_container_answers_again_when_it_goes_on(container: DockerServer) -> None:
    container.pause()
    with pytest.raises(TimeoutError):
        run_sql(container.dsn, "SELECT 1", wait=0.5)
    container.resume()
    assert run_sql(container.dsn, "SELECT 1") == 1


def test_a_process_in_the_container_is_sent_a_signal(container: DockerServer) -> None:
    container.restart()
    # By its process id inside the container.
    pid = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'background writer'"
    before = container.sql(pid)
    container.kill_backend(before, signal.SIGTERM)
    assert container.sql("SELECT 1") == 1
