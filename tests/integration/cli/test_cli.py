"""`dbop-raw` as a user runs it: a process, a real server, and what is in the table afterwards."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql

pytest.importorskip("typer")
pytest.importorskip("rich")

COMMAND = [sys.executable, "-m", "dbop_raw.cli"]
SCHEMA = """
CREATE TABLE parents (id int PRIMARY KEY);
INSERT INTO parents SELECT generate_series(1, 3);
CREATE TABLE events (
    id int PRIMARY KEY, body text NOT NULL, at date, parent int REFERENCES parents,
    twice int GENERATED ALWAYS AS (id * 2) STORED
);
"""
BAD_NULL = 'null value in column "body" of relation "events" violates not-null constraint'


class Cli:
    """Runs the command in a folder of its own."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn = dsn
        self.folder = folder

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "DATABASE"))}
        return kept | {"DATABASE_URL": self.dsn, "COLUMNS": "200"} | dict(more or {})

    def __call__(
        self, *arguments: str | Path, stdin: bytes = b"", env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            input=stdin,
            cwd=self.folder,
            env=self.environment(env),
            capture_output=True,
            check=False,
            timeout=60,
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    def write(self, text: str, name: str = "events.csv") -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def ask(self, query: str) -> Any:
        return run_sql(self.dsn, query)

    def rejects(self, name: str = "events.rejects.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def cli(postgres_dsn: str, tmp_path: Path) -> Cli:
    async def make() -> None:
        connection = await asyncpg.connect(postgres_dsn)
        await connection.execute(SCHEMA)
        await connection.close()

    asyncio.run(make())
    return Cli(postgres_dsn, tmp_path)


def numbers(stdout: str) -> dict[str, int]:
    """`read 3 · written 2 · …` as a dictionary."""
    line = next(line for line in stdout.splitlines() if line.startswith("read "))
    return {name: int(value.replace(",", "")) for name, value in re.findall(r"(\w+) ([\d,]+)(?= ·)", line)}


def test_a_file_is_loaded_and_bad_rows_are_set_aside_with_their_reason(cli: Cli) -> None:
    cli.write(
        "id,body,at,parent\n1,a,2026-01-31,1\n2,,2026-01-31,1\n3,c,,9\n1,d,,\nx,e,,\n4,f,2026-02-30,\n5,g,,3\n"
    )
    done = cli("ingest", "events.csv", "--table", "events")
    assert done.returncode == 1, done.stderr
    assert {key: numbers(done.stdout)[key] for key in ("read", "written", "rejected", "retries")} == {
        "read": 7,
        "written": 2,
        "rejected": 5,
        "retries": 0,
    }
    assert cli.ask("SELECT string_agg(id || body, ',' ORDER BY id) FROM events") == "1a,5g"
    found = cli.rejects()
    assert [(one["index"], one["sqlstate"]) for one in found] == [
        (1, "23502"),
        (2, "23503"),
        (3, "23505"),
        (4, "22P02"),
        (5, "22008"),
    ]
    assert found[1]["constraint"] == "events_parent_fkey"
    assert "events_parent_fkey" in done.stdout
    assert "Key (parent)=(9) is not present" in done.stdout
    assert "events.rejects.jsonl" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".zip", "stdin"])
def test_plain_packed_and_standard_input_give_the_same_table(cli: Cli, ending: str) -> None:
    text = "id,body\n" + "".join(f'{n},"line 1\nline 2 of ""{n}"" \\N \\t"\n' for n in range(2500))
    stdin = b""
    path = cli.folder / f"events{ending}"
    if ending == ".csv":
        path.write_text(text, encoding="utf-8")
    elif ending == ".csv.gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif ending == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("inner.csv", text)
    else:
        stdin = text.encode()
    done = cli("ingest", "-" if stdin else path, "--table", "events", stdin=stdin)
    assert done.returncode == 0, done.stderr
    query = "SELECT count(*) FROM events WHERE body = E'line 1\\nline 2 of \"' || id || E'\" \\\\N \\\\t'"
    assert cli.ask(query) == 2500


def test_dense_failures_keep_quotes_backslashes_and_nulls(cli: Cli) -> None:
    # More than one in two is bad: these are tried row by row in the server, on another way than COPY's.
    bodies = ['a"b', "c\\d", "{e,f}", "NULL", "g\th", " i ", "j\nk", "é'"]
    rows = [(n, bodies[n % len(bodies)], 9 if n % 8 in {1, 2, 5, 6} else "") for n in range(4000)]
    text = "id,body,parent\n" + "".join('{},"{}",{}\n'.format(n, b.replace('"', '""'), p) for n, b, p in rows)
    done = cli("ingest", cli.write(text), "--table", "events", "--size", "500", "--workers", "2")
    assert done.returncode == 1, done.stderr
    assert numbers(done.stdout)["written"] == 2000
    assert numbers(done.stdout)["rejected"] == 2000
    good = {body for n, body, p in rows if not p}
    assert set(cli.ask("SELECT array_agg(DISTINCT body) FROM events")) == good


def test_columns_are_selected_and_null_and_delimiter_are_as_told(cli: Cli) -> None:
    cli.write("x;body;id;at\n1;NA b;7;NA\n2;;8;2026-01-31\n")
    done = cli(
        "ingest",
        "events.csv",
        "--table",
        "events",
        "--columns",
        "id,body,at",
        "--null",
        "NA",
        "--delimiter",
        ";",
    )
    assert done.returncode == 0, done.stderr
    # The empty text is no NULL now: body is NOT NULL, and is written.
    assert cli.ask("SELECT array_agg(id || body || coalesce(at::text, '-') ORDER BY id) FROM events") == [
        "7NA b-",
        "82026-01-31",
    ]


def test_a_table_is_found_by_schema_and_by_odd_names(cli: Cli) -> None:
    asyncio.run(
        _execute(
            cli.dsn, 'CREATE SCHEMA "My Own"; CREATE TABLE "My Own"."Order lines" ("Größe" int, "a.b" text)'
        )
    )
    cli.write("Größe,a.b\n1,x\n")
    done = cli("ingest", "events.csv", "--table", "Order lines", "--schema", "My Own")
    assert done.returncode == 0, done.stderr
    assert cli.ask('SELECT "a.b" FROM "My Own"."Order lines"') == "x"


async def _execute(dsn: str, query: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(query)
    await connection.close()


def unusable(done: subprocess.CompletedProcess[str], *says: str) -> None:
    """It ended with exit code 2, one line on standard error, and nothing written."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("dbop-raw: ")
    for text in says:
        assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_a_table_that_is_not_there_is_told_with_near_names(cli: Cli) -> None:
    cli.write("id,body\n1,a\n")
    unusable(
        cli("ingest", "events.csv", "--table", "event"),
        "no table",
        "did you mean 'events'?",
        "Nothing was written",
    )
    unusable(cli("ingest", "events.csv", "--table", "public.events"), "--schema public --table events")
    unusable(cli("ingest", "events.csv", "--table", "zzzzz"), "the tables here: events, parents")
    unusable(
        cli("ingest", "events.csv", "--table", "events", "--schema", "nope"), "--schema public --table events"
    )


def test_a_column_that_is_not_there_is_told_with_the_table_s(cli: Cli) -> None:
    cli.write("id,bodi\n1,a\n")
    unusable(
        cli("ingest", "events.csv", "--table", "events"), "no column 'bodi'", "'body'", "id, body, at, parent"
    )
    unusable(
        cli("ingest", "events.csv", "--table", "events", "--columns", "id,at"), "'at' is not in the header"
    )
    cli.write("id,body,twice\n1,a,2\n")
    unusable(cli("ingest", "events.csv", "--table", "events"), "'twice'", "generated")
    unusable(cli("ingest", "events.csv", "--table", "events", "--columns", "id,id"), "named twice")
    assert cli.ask("SELECT count(*) FROM events") == 0


def test_a_file_that_can_t_be_used_is_one_sentence(cli: Cli) -> None:
    unusable(cli("ingest", "none.csv", "--table", "events"), "none.csv can't be read: No such file")
    unusable(cli("ingest", cli.folder, "--table", "events"), "can't be read")
    unusable(cli("ingest", cli.write(""), "--table", "events"), "no header")
    unusable(cli("ingest", cli.write("x", "x.zip"), "--table", "events"), "can't be read as a zip")
    unusable(cli("ingest", cli.write("x", "x.gz"), "--table", "events"), "x.gz")
    with zipfile.ZipFile(cli.folder / "two.zip", "w") as archive:
        archive.writestr("a.csv", "id\n1\n")
        archive.writestr("b.csv", "id\n1\n")
    unusable(cli("ingest", "two.zip", "--table", "events"), "a.csv, b.csv")
    cli.write("id,body\n1,a\n")
    unusable(
        cli("ingest", "events.csv", "--table", "events", "--rejects", "no/such/folder.jsonl"), "--rejects"
    )


BROKEN = ["7777", '7777,"x', "7777,x,y", '7777,"x"y']


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_ends_it_and_all_before_it_is_in(cli: Cli, line: str) -> None:
    good = "".join(f"{n},x\n" for n in range(2500))
    cli.write(f"id,body\n{good}{line}\n3000,y\n")
    done = cli("ingest", "events.csv", "--table", "events")
    assert done.returncode == 2
    assert "events.csv, line 2,502: " in done.stderr
    assert (
        "2,500 rows of 3 chunks are in the table, and 0 rejected: all that comes before that line"
        in done.stderr
    )
    assert cli.ask("SELECT count(*) FROM events") == 2500


def test_a_wrong_byte_ends_it_and_all_before_it_is_in(cli: Cli) -> None:
    (cli.folder / "events.csv").write_bytes(b"id,body\n1,a\n2,\xff\n3,c\n")
    done = cli("ingest", "events.csv", "--table", "events")
    assert done.returncode == 2
    assert "line 3: it is not utf-8: byte 0xff" in done.stderr
    assert "1 row of 1 chunk are in the table" in done.stderr
    assert cli.ask("SELECT array_agg(id) FROM events") == [1]
    done = cli("ingest", "events.csv", "--table", "events", "--encoding", "latin-1")
    assert done.returncode == 1, "the first row is in already"
    assert cli.ask("SELECT string_agg(body, '' ORDER BY id) FROM events") == "aÿc"


def test_with_a_ledger_a_broken_line_can_be_repaired_and_the_same_command_goes_on(cli: Cli) -> None:
    good = [f"{n},x\n" for n in range(2500)]
    cli.write("id,body\n" + "".join([*good[:1200], "1200\n", *good[1201:]]))
    command = (
        "ingest",
        "events.csv",
        "--table",
        "events",
        "--ledger",
        "e",
        "--size",
        "100",
        "--workers",
        "1",
    )
    done = cli(*command)
    assert done.returncode == 2
    assert "1,200 rows of 12 chunks are in the table" in done.stderr
    assert "the same command goes on from there" in done.stderr
    cli.write("id,body\n" + "".join(good))
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert "12 chunks skipped" in done.stdout
    assert cli.ask("SELECT count(*) FROM events") == 2500
    done = cli(*command)
    assert numbers(done.stdout)["written"] == 0
    assert "25 chunks skipped" in done.stdout
    unusable(cli(*command[:-4], "--size", "50"), "size=100", "Nothing was written")


def test_a_skip_limit_stops_it_with_exit_code_3(cli: Cli) -> None:
    cli.write("id,body\n" + "".join(f"{n},{'x' if n % 100 else ''}\n" for n in range(3000)))
    done = cli(
        "ingest", "events.csv", "--table", "events", "--skip-limit", "15", "--size", "500", "--workers", "1"
    )
    assert done.returncode == 3
    assert "more than 15 rows rejected (--skip-limit)" in done.stderr
    assert "1,485 rows of 3 chunks are in the table, and 15 rejected" in done.stderr
    assert cli.ask("SELECT count(*) FROM events") == 1485


def test_an_error_that_every_row_meets_stops_it_with_exit_code_2(cli: Cli, postgres_server: Server) -> None:
    role = f"reader_{os.getpid()}"
    asyncio.run(_execute(cli.dsn, f"CREATE ROLE {role} LOGIN; GRANT SELECT ON events TO {role}"))
    try:
        cli.write("id,body\n1,a\n")
        dsn = cli.dsn.replace(f"//{postgres_server.user}@", f"//{role}@")
        done = cli("ingest", "events.csv", "--table", "events", "--dsn", dsn)
        assert done.returncode == 2
        assert "permission denied for table events (SQLSTATE 42501). " in done.stderr
        assert (
            "Nothing is in the table" in done.stderr
            or "0 rows" in done.stderr
            or "Nothing was" in done.stderr
        )
    finally:
        asyncio.run(_execute(cli.dsn, f"DROP OWNED BY {role}; DROP ROLE {role}"))


EXIT_CODES = [
    ("1,a\n2,b\n", [], 0),
    ("1,a\n2,\n", [], 1),
    ("1,\n2,\n", [], 1),
    ("1,\n2,\n", ["--skip-limit", "2"], 1),
    ("1,\n2,\n", ["--skip-limit", "1"], 3),
    ("1,a\n2\n", [], 2),
    ("1,\n2\n", [], 2),
    ("", [], 0),
]


@pytest.mark.parametrize(("text", "options", "code"), EXIT_CODES)
def test_the_exit_code_says_whether_all_some_or_too_few_rows_were_written(
    cli: Cli, text: str, options: list[str], code: int
) -> None:
    cli.write(f"id,body\n{text}")
    done = cli("ingest", "events.csv", "--table", "events", *options)
    assert done.returncode == code, (done.stdout, done.stderr)


def test_help_and_exit_codes_agree(cli: Cli) -> None:
    text = " ".join(cli("ingest", "--help").stdout.split())
    for said in (
        "0 all rows written",
        "1 some rejected",
        "2 it could not run",
        "3 more",
        "130 Ctrl-C",
        "143",
    ):
        assert said in text


@pytest.mark.parametrize("by", ["path", "symlink", "hard link", "standard input"])
def test_rejects_are_not_written_into_the_input(cli: Cli, by: str) -> None:
    path = cli.write("id,body\n1,\n")
    before = path.read_bytes()
    rejects = path if by in {"path", "standard input"} else cli.folder / "other.jsonl"
    if by == "symlink":
        rejects.symlink_to(path)
    elif by == "hard link":
        rejects.hardlink_to(path)
    arguments: list[str | Path] = ["ingest", "events.csv", "--table", "events", "--rejects", rejects]
    if by == "standard input":
        arguments[1] = "-"
        with path.open("rb") as file:
            ended = subprocess.run(
                [*COMMAND, *map(str, arguments)], stdin=file, cwd=cli.folder, env=cli.environment(),
                capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
    else:
        ended = cli(*arguments)
    unusable(ended, "is the input itself", "--rejects", "Nothing was written")
    assert path.read_bytes() == before


def test_a_device_may_take_the_rejects_though_it_is_the_input_too(cli: Cli) -> None:
    done = cli("ingest", "/dev/null", "--table", "events", "--rejects", "/dev/null")
    unusable(done, "no header")


def test_a_full_disk_for_the_rejects_is_told_by_the_files_name(cli: Cli) -> None:
    cli.write("id,body\n1,\n")
    done = cli("ingest", "events.csv", "--table", "events", "--rejects", "/dev/full")
    assert done.returncode == 2
    assert "/dev/full" in done.stderr
    assert "make room" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_file_under_a_ledgers_name_is_refused_and_nothing_is_written(cli: Cli) -> None:
    command = ("ingest", "events.csv", "--table", "events", "--ledger", "e", "--size", "100")
    cli.write("id,body\n" + "".join(f"{n},x\n" for n in range(250)))
    assert cli(*command).returncode == 0
    cli.write("id,body\n" + "".join(f"{n},x\n" for n in range(1000, 1400)))
    unusable(cli(*command), "another source", "another ledger name", "Nothing was written")
    assert cli.ask("SELECT max(id) FROM events") == 249


def test_a_file_that_grew_goes_on_at_its_growth(cli: Cli) -> None:
    command = ("ingest", "events.csv", "--table", "events", "--ledger", "e", "--size", "100")
    for count in (250, 260, 260, 730):
        cli.write("id,body\n" + "".join(f"{n},x\n" for n in range(count)))
        done = cli(*command)
        assert done.returncode == 0, done.stderr
        assert cli.ask("SELECT array_agg(id ORDER BY id) FROM events") == list(range(count))


def test_a_line_that_broke_in_what_is_in_already_is_told_as_such(cli: Cli) -> None:
    command = ("ingest", "events.csv", "--table", "events", "--ledger", "e", "--size", "100")
    good = [f"{n},x\n" for n in range(250)]
    cli.write("id,body\n" + "".join(good))
    assert cli(*command).returncode == 0
    cli.write("id,body\n" + "".join([*good[:150], "150\n", *good[151:]]))
    done = cli(*command)
    assert done.returncode == 2
    assert "events.csv, line 152: 1 fields" in done.stderr
    assert cli.ask("SELECT count(*) FROM events") == 250


CANNOT = [
    ("postgresql://u:s3cret@127.0.0.1:99999/db", "the dsn can't be read"),
    ("postgresql://u:s3cret@127.0.0.1/db?port=99999", "the dsn can't be read"),
    ("postgresql://u:s3cret@127.0.0.1:1/db", "no connection to postgresql://u@127.0.0.1:1/db"),
    ("postgresql://u:s3/cret@127.0.0.1/db", "the dsn can't be read"),
    ("postgresql://u:12/s3cret@127.0.0.1/db", "no connection to the server of the DSN"),
    ("host=localhost password=s3cret", "no connection to"),
    ("mysql://u:s3cret@127.0.0.1/db", "no connection to"),
]


@pytest.mark.parametrize(("dsn", "says"), CANNOT)
def test_a_server_that_is_not_there_is_told_without_the_password(cli: Cli, dsn: str, says: str) -> None:
    cli.write("id,body\n1,a\n")
    done = cli("ingest", "events.csv", "--table", "events", "--dsn", dsn)
    unusable(done, says)
    assert "s3" not in done.stderr
    assert "cret" not in done.stderr


def test_libpq_s_environment_is_used_without_a_dsn(cli: Cli, postgres_server: Server) -> None:
    cli.write("id,body\n1,a\n")
    env = {
        "DATABASE_URL": "",
        "PGHOST": postgres_server.host,
        "PGPORT": str(postgres_server.port),
        "PGUSER": postgres_server.user,
        "PGDATABASE": cli.dsn.rpartition("/")[2],
    }
    done = cli("ingest", "events.csv", "--table", "events", env=env)
    assert done.returncode == 0, done.stderr
    assert cli.ask("SELECT count(*) FROM events") == 1
    for port in ("1", "99999", "abc"):
        done = cli("ingest", "events.csv", "--table", "events", env=env | {"PGPORT": port})
        unusable(done, f"port {port}", "no --dsn")


def test_rejects_are_appended_to_a_file_of_one_s_own_and_that_is_said(cli: Cli) -> None:
    cli.write("id,body\n1,\n")
    for count in (1, 2):
        done = cli("ingest", "events.csv", "--table", "events", "--rejects", "mine.jsonl")
        assert done.returncode == 1
        assert len(cli.rejects("mine.jsonl")) == count
        assert ("appended" in done.stdout) == (count == 2)


SIGNALS = [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)]


@pytest.mark.parametrize("ledger", [(), ("--ledger", "e")], ids=["without", "with a ledger"])
@pytest.mark.parametrize(("number", "name", "code"), SIGNALS, ids=["SIGINT", "SIGTERM"])
def test_a_signal_stops_it_in_order_and_it_tells_exactly_what_is_in(
    cli: Cli, number: signal.Signals, name: str, code: int, ledger: tuple[str, ...]
) -> None:
    """Neither the summary is lost, nor a reject of a chunk that is committed."""
    asyncio.run(_execute(cli.dsn, SLOW))
    cli.write("id,body\n" + "".join(f"{n},{'x' if n % 50 else ''}\n" for n in range(200_000)))
    process = subprocess.Popen(
        [*COMMAND, "ingest", "events.csv", "--table", "events", "--size", "200", *ledger],
        cwd=cli.folder,
        env=cli.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while cli.ask("SELECT count(*) FROM events") < 1000:
        assert time.monotonic() < deadline
        assert process.poll() is None
    process.send_signal(number)
    # Whoever is told once more, before it is done, is told in order all the same.
    if number is signal.SIGTERM:
        process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == code, stderr
    assert f"stopped by {name}. " in stderr
    assert "Traceback" not in stderr
    assert ("goes on from there" if ledger else "empty the table") in stderr
    told = numbers(stdout)
    assert told["written"] == cli.ask("SELECT count(*) FROM events")
    assert 1000 <= told["written"] < 196_000
    kept = {one["index"] for one in cli.rejects()}
    there = set(cli.ask("SELECT array_agg(id) FROM events"))
    of_committed_chunks = {n for n in range(0, 200_000, 50) if n // 200 in {one // 200 for one in there}}
    # With a ledger rejects are kept before COMMIT, so those of a chunk that was rolled back may be there.
    assert kept >= of_committed_chunks if ledger else kept == of_committed_chunks
    assert told["rejected"] == len(of_committed_chunks)


# Each statement takes a moment, so that there is time to stop it.
SLOW = """
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.02); RETURN NULL; END';
CREATE TRIGGER wait AFTER INSERT ON events EXECUTE FUNCTION wait();
"""


def test_ctrl_c_stops_it_while_it_waits_for_standard_input(cli: Cli) -> None:
    process = subprocess.Popen(
        [*COMMAND, "ingest", "-", "--table", "events", "--size", "10"],
        cwd=cli.folder,
        env=cli.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(b"id,body\n" + b"".join(b"%d,x\n" % n for n in range(3000)))
    process.stdin.flush()
    deadline = time.monotonic() + 30
    while cli.ask("SELECT count(*) FROM events") < 3000:
        assert time.monotonic() < deadline
    # No transaction is left open while it waits.
    time.sleep(0.5)
    states = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dbop-raw' AND state <> 'idle'"
    assert cli.ask(states) == 0
    threading.Timer(0.1, process.send_signal, [signal.SIGINT]).start()
    try:
        assert process.wait(20) == 130
    finally:
        process.kill()
    stdout, stderr = process.communicate()
    assert b"stopped by Ctrl-C" in stderr
    assert numbers(stdout.decode())["written"] == cli.ask("SELECT count(*) FROM events")


@pytest.mark.parametrize("asked", ["40P01", "40p01", "deadlock_detected"])
def test_sqlstate_explains_a_code_by_code_and_by_condition(cli: Cli, asked: str) -> None:
    done = cli("sqlstate", asked)
    assert done.returncode == 0
    assert done.stdout.startswith("40P01 deadlock_detected\n")
    assert re.search(r"repair +transaction", done.stdout)
    assert re.search(r"evict +no", done.stdout)
    assert "a deadlock" in done.stdout
    assert "starts the whole again" in done.stdout


def test_sqlstate_explains_a_class_and_what_severity_changes(cli: Cli) -> None:
    done = cli("sqlstate", "40")
    assert done.returncode == 0
    for code in ("40000", "40001", "40P01"):
        assert code in done.stdout
    done = cli("sqlstate", "08006")
    assert "outcome unknown" in done.stdout
    assert "severity ERROR" in done.stdout


def test_sqlstate_gives_near_ones_for_an_unknown_code(cli: Cli) -> None:
    for asked, near in (
        ("40P05", "40P01"),
        ("deadlock", "deadlock_detected"),
        ("unique", "unique_violation"),
    ):
        done = cli("sqlstate", asked)
        assert done.returncode == 2
        assert near in done.stderr


def test_help_teaches_by_examples(cli: Cli) -> None:
    done = cli("ingest", "--help")
    assert done.returncode == 0
    for text in ("--skip-limit", "--ledger", "zcat", "Exit code"):
        assert text in done.stdout
    assert cli("ingest", "events.csv").returncode == 2
    assert cli("ingest", "x", "--table", "t", "--delimiter", "ab").returncode == 2
    assert cli("ingest", "x", "--table", "t", "--encoding", "utf-16").returncode == 2
    assert cli("ingest", "x", "--table", "t", "--encoding", "klingon").returncode == 2


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from dbop_raw.cli.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"dbop-raw: the command line needs the package {missing}: pip install 'dbop-raw[cli]'\n"
    )
