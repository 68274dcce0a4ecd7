"""The pool benchmark, tiny: its reports are whole. What they say is not looked at: nothing here is timed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest

pytest.importorskip("scipy", reason="needs the extra bench")
pytest.importorskip("matplotlib", reason="needs the extra bench")
pytest.importorskip("hdrh", reason="needs the extra bench")

from matplotlib.image import imread

from bench.pool import main
from bench.pool.workloads import SCHEMA
from dbop_raw.testing.server import run_sql

TINY = ("--seconds", "0.3", "--warmup", "0.1", "--rounds", "1")
PASSWORD = "Sesame-2f81"


def with_password(dsn: str) -> str:
    """The same server, which trusts whoever comes, and a password that must be seen nowhere."""
    parts = urlsplit(dsn)
    user, _, place = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}:{PASSWORD}@{place}"))


def bench(dsn: str, out: Path, *arguments: str) -> int:
    return main(["--dsn", dsn, "--out", str(out), *TINY, *arguments])


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
    assert bench(with_password(postgres_dsn), out, "--sizes", "2,1", "--clients", "4") == 0
    data = json.loads((out / "pool.json").read_text(encoding="utf-8"))
    advice = data["recommendation"]
    check_files(out, "pool", (advice["sentence"], advice["formula"]))
    printed = capsys.readouterr()
    assert "req/s" in printed.out
    assert PASSWORD not in printed.out + printed.err
    assert advice["size"] is None
    assert "one round has no spread" in advice["sentence"]
    assert "why_not" in data["model"]
    cells = [(row["kind"], row["size"]) for row in data["rows"]]
    assert cells == [("dbop_raw", 1), ("dbop_raw", 2), ("asyncpg", 1), ("asyncpg", 2)]
    for row in data["rows"]:
        assert row["throughput"] > 0
        assert row["failed_share"] == 0
        assert 0 < row["in_use"] <= row["size"]
        assert row["wait_share"] > 0
        assert {"p50", "p95", "p99", "p999", "max"} <= set(row["latency"]) & set(row["wait"])
        assert row["latency_histogram"]
        assert len(row["rounds"]) == 1
        assert {"errors", "shed", "unfinished", "over_time"} <= set(row["rounds"][0])
    assert run_sql(postgres_dsn, "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'dbop%'") == 0


@pytest.mark.parametrize("workload", ["point-read", "short-write", "ingest"])
def test_every_workload_runs_in_an_open_loop(postgres_dsn: str, tmp_path: Path, workload: str) -> None:
    assert bench(postgres_dsn, tmp_path, "--sizes", "2", "--rate", "50", "--workload", workload) == 0
    data = check_files(tmp_path, "pool", ())
    assert [row["failed_share"] for row in data["rows"]] == [0, 0]
    assert "open loop" in data["model"]["why_not"]


def test_what_is_shed_is_counted(postgres_dsn: str, tmp_path: Path) -> None:
    assert bench(postgres_dsn, tmp_path, "--sizes", "1", "--clients", "8", "--max-waiting", "0") == 0
    ours, bare = check_files(tmp_path, "pool", ())["rows"]
    assert ours["rounds"][0]["shed"] > 0
    assert ours["throughput"] > 0
    assert bare["rounds"][0]["shed"] == 0


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
    assert bench(postgres_dsn, tmp_path, "--sizes", "1", "--clients", "2", "--workload", str(file)) == 0
    data = check_files(tmp_path, "pool", ())
    assert all(row["failed_share"] == 0 for row in data["rows"])
    # Its name alone: a folder of this machine is nobody else's business.
    assert data["about"]["options"]["workload"] == "own.sql"
    assert str(tmp_path) not in (tmp_path / "pool.html").read_text(encoding="utf-8")


def test_the_spike_shows_both_kinds_of_pool(postgres_dsn: str, tmp_path: Path) -> None:
    arguments = ("--spike", "--sizes", "3", "--burst", "20", "--connect-delay", "0.05")
    assert bench(with_password(postgres_dsn), tmp_path, *arguments) == 0
    data = json.loads((tmp_path / "pool-spike.json").read_text(encoding="utf-8"))
    check_files(tmp_path, "pool-spike", (data["sentence"],))
    growing, full = data["rows"]
    assert (growing["min_size"], growing["max_size"]) == (1, 3)
    assert (full["min_size"], full["max_size"]) == (3, 3)
    assert growing["rounds"][0]["opened"] == 2
    assert full["rounds"][0]["opened"] == 0
    assert not growing["rounds"][0]["errors"]


def test_somebody_elses_schema_is_not_touched(
    postgres_dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sql(postgres_dsn, f"CREATE SCHEMA {SCHEMA}")
    assert bench(postgres_dsn, tmp_path) == 2
    assert "did not make" in capsys.readouterr().err
    assert run_sql(postgres_dsn, f"SELECT count(*) FROM pg_namespace WHERE nspname = '{SCHEMA}'") == 1


def test_what_cannot_be_used_ends_with_two_and_one_sentence(
    postgres_dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.sql"
    file.write_text("SELECT no_such_column", encoding="utf-8")
    (tmp_path / "file").touch()
    parts = urlsplit(postgres_dsn)
    nowhere = urlunsplit(parts._replace(netloc=f"somebody:{PASSWORD}@127.0.0.1:1"))
    garbled = urlunsplit(parts._replace(netloc=f"somebody:{PASSWORD}/x@127.0.0.1"))
    for dsn, arguments, said in (
        (postgres_dsn, ("--sizes", "1,zwei"), "--sizes"),
        (postgres_dsn, ("--sizes", "900"), "room"),
        (postgres_dsn, ("--workload", str(file)), "no_such_column"),
        (postgres_dsn, ("--workload", "nothing"), "--workload"),
        (postgres_dsn, ("--out", str(tmp_path / "file" / "below")), "--out"),
        (nowhere, (), "can't connect"),
        (garbled, (), "can't be read"),
    ):
        assert bench(dsn, tmp_path, *arguments) == 2
        printed = capsys.readouterr()
        assert said in printed.err
        assert PASSWORD not in printed.out + printed.err
        assert "Traceback" not in printed.err
    with pytest.raises(SystemExit, match="2"):
        bench(postgres_dsn, tmp_path, "--rate", "5", "--clients", "5")
