"""What a server for a test can do: make databases, stop, crash, freeze, and end one backend."""

from __future__ import annotations

import os
import signal
import subprocess

import asyncpg
import pytest

from dbop_raw.testing import Server, ServerError, postgres
from dbop_raw.testing.server import run_sql
from tests.support.servers import own_source
from tests.support.sessions import is_running

pytestmark = pytest.mark.slow


async def database_of(dsn: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval("SELECT current_database()")
    finally:
        await connection.close()


class TestDatabases:
    @pytest.mark.anyio
    async def test_a_database_is_made_and_dropped_inside_a_running_event_loop(self, server: Server) -> None:
        dsn = server.create_database()
        name = await database_of(dsn)
        assert dsn.endswith(f"/{name}")
        server.drop_database(dsn)
        with pytest.raises(asyncpg.InvalidCatalogNameError):
            await database_of(dsn)

    @pytest.mark.parametrize(
        "name", ['with "quotes" and spaces', "Ünïcode", "semi;colon--", "50%/slash?query"]
    )
    def test_a_databases_name_is_taken_literally(self, server: Server, name: str) -> None:
        dsn = server.create_database(name)
        try:
            assert run_sql(dsn, "SELECT current_database()") == name
        finally:
            server.drop_database(dsn)
        assert name not in server.sql("SELECT array_agg(datname::text) FROM pg_database")

    def test_databases_without_a_name_never_meet(self, server: Server) -> None:
        dsns = {server.create_database() for _ in range(3)}
        for dsn in dsns:
            server.drop_database(dsn)
        assert len(dsns) == 3

    @pytest.mark.anyio
    async def test_a_database_in_use_is_dropped(self, server: Server) -> None:
        dsn = server.create_database()
        connection = await asyncpg.connect(dsn)
        server.drop_database(dsn)
        with pytest.raises(
            (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.AdminShutdownError)
        ):
            await connection.fetchval("SELECT 1")
        connection.terminate()

    def test_a_database_that_is_not_there_is_dropped_without_an_error(self, server: Server) -> None:
        server.drop_database("never_made")
        assert "never_made" not in server.sql("SELECT array_agg(datname::text) FROM pg_database")

    def test_a_database_made_twice_is_refused_in_the_servers_words(self, server: Server) -> None:
        dsn = server.create_database("twice")
        try:
            with pytest.raises(ServerError, match="already exists"):
                server.create_database("twice")
        finally:
            server.drop_database(dsn)


class TestSettings:
    def test_a_tests_settings_win_over_ours(self) -> None:
        settings = {"max_connections": "17", "application_name": "it's"}
        with postgres(source=own_source(), settings=settings) as server:
            assert server.sql("SHOW max_connections") == "17"

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            # What COMMIT waits for is part of what a test looks at.
            ("synchronous_commit", "on"),
            ("fsync", "off"),
            ("full_page_writes", "off"),
            ("listen_addresses", "127.0.0.1"),
        ],
    )
    def test_a_server_without_settings_has(self, server: Server, name: str, value: str) -> None:
        assert server.sql(f"SHOW {name}") == value

    def test_a_durable_server_syncs(self) -> None:
        with postgres(source=own_source(), durable=True) as server:
            assert server.sql("SHOW fsync") == "on"
            assert server.sql("SHOW full_page_writes") == "on"


class TestLife:
    def test_committed_rows_survive_a_stop_a_crash_and_a_restart(self) -> None:
        with postgres(source=own_source()) as server:
            dsn, port = server.create_database(), server.port
            run_sql(dsn, "CREATE TABLE t AS SELECT 42 AS answer")
            server.stop()
            with pytest.raises(ConnectionRefusedError):
                run_sql(dsn, "SELECT 1")
            server.stop()
            server.start()
            server.start()
            server.crash()
            server.start()
            assert "not properly shut down" in server.log_tail(50)
            server.restart()
            assert (run_sql(dsn, "SELECT answer FROM t"), server.port) == (42, port)

    def test_a_paused_server_answers_again_when_it_is_resumed(self) -> None:
        with postgres(source=own_source()) as server:
            server.pause()
            with pytest.raises(TimeoutError):
                run_sql(server.dsn, "SELECT 1", wait=0.2)
            server.resume()
            assert run_sql(server.dsn, "SELECT 1") == 1

    def test_a_paused_server_ends_with_its_block(self) -> None:
        with postgres(source=own_source()) as server:
            server.pause()
        assert not is_running(server)


class TestBackends:
    @pytest.mark.anyio
    async def test_one_backend_is_ended_and_no_other(self, server: Server) -> None:
        one, other = await asyncpg.connect(server.dsn), await asyncpg.connect(server.dsn)
        server.kill_backend(one.get_server_pid(), signal.SIGTERM)
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
            await one.fetchval("SELECT pg_sleep(10)")
        assert await other.fetchval("SELECT 1") == 1
        await other.close()

    def test_a_process_of_something_else_is_not_killed(self, server: Server) -> None:
        with pytest.raises(ServerError, match="no backend"):
            server.kill_backend(os.getpid(), signal.SIGTERM)


class TestPrograms:
    def test_a_client_program_is_of_the_servers_version(self, server: Server) -> None:
        done = subprocess.run([server.bin("psql"), "--version"], capture_output=True, text=True, check=True)
        assert server.sql("SHOW server_version").split()[0] in done.stdout

    def test_a_program_that_is_not_there_is_named(self, server: Server) -> None:
        with pytest.raises(ServerError, match="no_such_program"):
            server.bin("no_such_program")
