"""`dbop-raw pool-size`, tiny: its reports are whole. What they say is not looked at: nothing is timed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest

pytest.importorskip("matplotlib", reason="needs the extra sizing")
pytest.importorskip("typer", reason="needs the extra sizing")

from matplotlib.image import imread

from bench import pool
from bench.results import RESULTS
from dbop_raw.cli import __main__ as command_line
from dbop_raw.sizing.workloads import SCHEMA
from dbop_raw.testing.server import run_sql

TINY = ("--seconds", "0.3", "--warmup", "0.1", "--rounds", "1")
PASSWORD = "Sesame-2f81"


def with_password(dsn: str) -> str:
    """The same server, which trusts whoever comes, and a password that must be seen nowhere."""
    parts = urlsplit(dsn)
    user, _, place = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}:{PASSWORD}@{place}"))


def command(dsn: str, out: Path, *arguments: str) -> int:
    """Run the command in this process; gives its exit code."""
    argv = ["dbop-raw", "pool-size", "--dsn", dsn, "--out", str(out), *TINY, *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            command_line.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


class Links(HTMLParser):
    """What a page would have to fetch, or leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "iframe", "object"}
        wanted = {"src", "href", "srcset", "data", "action", "poster"}
        self.found += [value or "" for name, value in attrs if name in wanted]


def check_files(out: Path, name: str, sentences: Sequence[str]) -> dict[str, Any]:
    """All four are there and say the same; gives the JSON."""
    data: dict[str, Any] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    page = (out / f"{name}.html").read_text(encoding="utf-8")
    text = (out / f"{name}.md").read_text(encoding="utf-8")
    assert imread(out / f"{name}.png").shape[0] > 300
    assert "data:image/png;base64," in page
    links = Links()
    links.feed(page)
    assert [link[:11] for link in links.found] == ["data:image/"]
    assert not re.search(r"https?:|<script|@import|url\(", page)
    assert f"]({name}.png)" in text
    for sentence in sentences:
        assert sentence in text
    assert set(data["about"]) == {"when", "commit", "python", "packages", "machine", "server", "options"}
    assert {"fsync", "shared_buffers", "synchronous_commit", "max_connections"} <= set(
        data["about"]["server"]
    )
    assert PASSWORD not in json.dumps(data) + page + text
    return data


def test_a_tiny_run_writes_whole_reports(
    postgres_dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "here"
    assert command(with_password(postgres_dsn), out, "--sizes", "2,1", "--clients", "4") == 0
    data = json.loads((out / "pool.json").read_text(encoding="utf-8"))
    advice = data["recommendation"]
    check_files(out, "pool", (advice["sentence"], advice["formula"]))
    printed = capsys.readouterr()
    assert "req/s" in printed.out
    assert PASSWORD not in printed.out + printed.err
    assert advice["size"] is None
    assert "one round has no spread" in advice["sentence"]
    assert "why_not" in data["model"]
    cells = [(row["cell"]["kind"], row["cell"]["size"]) for row in data["rows"]]
    assert cells == [("dbop_raw", 1), ("dbop_raw", 2), ("asyncpg", 1), ("asyncpg", 2)]
    for row in data["rows"]:
        assert row["throughput"] > 0
        assert row["failed_share"] == 0
        assert 0 < row["seen"]["in_use"] <= row["cell"]["size"]
        assert row["wait_share"] > 0
        assert {"p50", "p95", "p99", "p999", "max"} <= set(row["latency"]) & set(row["wait"])
        assert len(row["latency"]["curve"]) == len(data["percents"])
        assert len(row["rounds"]) == 1
        assert {"errors", "shed", "unfinished"} <= set(row["rounds"][0]["load"])
        assert row["rounds"][0]["samples"]
    assert run_sql(postgres_dsn, "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'dbop%'") == 0
    committed = json.loads((RESULTS / "pool.json").read_text(encoding="utf-8"))
    assert set(committed) == set(data)
    assert set(committed["rows"][0]) == set(data["rows"][0])


@pytest.mark.parametrize("workload", ["point-read", "short-write", "ingest"])
def test_every_workload_runs_in_an_open_loop(postgres_dsn: str, tmp_path: Path, workload: str) -> None:
    assert command(postgres_dsn, tmp_path, "--sizes", "2", "--rate", "50", "--workload", workload) == 0
    data = check_files(tmp_path, "pool", ())
    assert [row["failed_share"] for row in data["rows"]] == [0, 0]
    assert "open loop" in data["model"]["why_not"]


def test_what_is_shed_is_counted(postgres_dsn: str, tmp_path: Path) -> None:
    assert command(postgres_dsn, tmp_path, "--sizes", "1", "--clients", "8", "--max-waiting", "0") == 0
    ours, bare = check_files(tmp_path, "pool", ())["rows"]
    assert ours["rounds"][0]["load"]["shed"] > 0
    assert ours["throughput"] > 0
    assert bare["rounds"][0]["load"]["shed"] == 0


@pytest.mark.parametrize(
    "sql",
    [
        "\\set n random(1, 9)\nSELECT :n + 1;",
        "BEGIN; SELECT 1; COMMIT;",
        "\\set n random(1, 9)\nSELECT :n; SELECT 2",
    ],
)
def test_a_file_of_sql_is_a_workload(postgres_dsn: str, tmp_path: Path, sql: str) -> None:
    file = tmp_path / "own.sql"
    file.write_text(sql, encoding="utf-8")
    assert command(postgres_dsn, tmp_path, "--sizes", "1", "--clients", "2", "--workload", str(file)) == 0
    data = check_files(tmp_path, "pool", ())
    assert all(row["failed_share"] == 0 for row in data["rows"])
    # Its name alone: a folder of this machine is nobody else's business.
    assert data["about"]["options"]["workload"] == "own.sql"
    assert str(tmp_path) not in (tmp_path / "pool.html").read_text(encoding="utf-8")


def test_the_spike_shows_both_kinds_of_pool(postgres_dsn: str, tmp_path: Path) -> None:
    arguments = ("--spike", "--sizes", "3", "--burst", "300", "--connect-delay", "0")
    assert command(with_password(postgres_dsn), tmp_path, *arguments) == 0
    data = json.loads((tmp_path / "pool-spike.json").read_text(encoding="utf-8"))
    check_files(tmp_path, "pool-spike", (data["sentence"],))
    growing, full = data["rows"]
    assert (growing["cell"]["least"], growing["cell"]["size"]) == (1, 3)
    assert (full["cell"]["least"], full["cell"]["size"]) == (3, 3)
    assert growing["rounds"][0]["opened"] == 2
    assert full["rounds"][0]["opened"] == 0
    assert not growing["rounds"][0]["load"]["errors"]


def test_somebody_elses_schema_is_not_touched(
    postgres_dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sql(postgres_dsn, f"CREATE SCHEMA {SCHEMA}")
    assert command(postgres_dsn, tmp_path) == 2
    assert "did not make" in capsys.readouterr().err
    assert run_sql(postgres_dsn, f"SELECT count(*) FROM pg_namespace WHERE nspname = '{SCHEMA}'") == 1


def elsewhere(dsn: str, place: str) -> str:
    """A server that is not there, or a DSN that can't be read."""
    return urlunsplit(urlsplit(dsn)._replace(netloc=f"somebody:{PASSWORD}{place}"))


@pytest.mark.parametrize(
    ("place", "arguments", "said"),
    [
        ("", ("--sizes", "1,zwei"), "--sizes"),
        ("", ("--sizes", "900"), "room"),
        ("", ("--rounds", "0"), "--rounds"),
        ("", ("--rate", "5", "--clients", "5"), "give one of them"),
        ("", ("--workload", "FOLDER/own.sql"), "no_such_column"),
        ("", ("--workload", "nothing"), "--workload"),
        ("", ("--out", "FOLDER/own.sql/below"), "--out"),
        ("@127.0.0.1:1", (), "can't connect"),
        ("/x@127.0.0.1", (), "can't be read"),
    ],
)
def test_what_cannot_be_used_ends_with_two_and_one_line(
    postgres_dsn: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: str,
    arguments: Sequence[str],
    said: str,
) -> None:
    (tmp_path / "own.sql").write_text("SELECT no_such_column", encoding="utf-8")
    dsn = elsewhere(postgres_dsn, place) if place else postgres_dsn
    assert command(dsn, tmp_path, *(one.replace("FOLDER", str(tmp_path)) for one in arguments)) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert PASSWORD not in printed.out + printed.err


def test_the_answer_is_printed_first_and_the_other_tables_on_demand(
    postgres_dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    small = ("--sizes", "1", "--clients", "2")
    assert command(postgres_dsn, tmp_path, *small) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("The data can't decide: one round has no spread")
    assert sum("req/s" in line for line in lines) == 1
    assert command(postgres_dsn, tmp_path, *small, "--details") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("The data can't decide")
    for title in ("asyncpg by hand", "The wait for a connection", "The server meanwhile", "Scalability Law"):
        assert title in printed


def test_an_operation_is_found_from_the_folder_where_the_user_stands(
    postgres_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_pool_work.py").write_text(
        "async def ask(conn):\n    return await conn.fetchval('SELECT 1')\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    work = ("--workload", "own_pool_work:ask", "--sizes", "1", "--clients", "1")
    assert command(postgres_dsn, tmp_path, *work) == 0
    assert all(row["failed_share"] == 0 for row in check_files(tmp_path, "pool", ())["rows"])


def test_scripts_bench_pool_runs_the_same_command(
    postgres_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pool, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        pool.main(["--dsn", postgres_dsn, "--sizes", "1", "--clients", "2", *TINY])
    assert ended.value.code == 0
    check_files(tmp_path, "pool", ())
    assert "The server meanwhile" in capsys.readouterr().out


WITHOUT = """
import sys
sys.modules[{package!r}] = None
sys.argv = ["dbop-raw", "pool-size"]
from dbop_raw.cli.__main__ import main
main()
"""


@pytest.mark.parametrize("package", ["numpy", "matplotlib", "markdown_it"])
def test_a_missing_package_is_named_with_the_command_that_brings_it(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(package=package)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"dbop-raw: pool-size needs the package {package}: pip install 'dbop-raw[sizing]'\n"


def test_who_imports_the_package_does_not_import_what_the_command_needs() -> None:
    look = "import sys, dbop_raw; print(sorted({'numpy', 'matplotlib', 'rich', 'typer'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
