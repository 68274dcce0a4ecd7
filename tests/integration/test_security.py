"""What must not get out, and what must not get in: DSNs, passwords, values, hostile names, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import logging
import os
import shutil
import ssl
import stat
import subprocess
import sys
import traceback
import uuid
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dbop_raw
from dbop_raw import (
    AcquireTimeout,
    CommitTokens,
    CommitUnknown,
    DbopError,
    Engine,
    EngineClosed,
    EngineOverloaded,
    Event,
    GroupFailed,
    JsonlRejects,
    Ledger,
    LedgerMismatch,
    OperationTimeout,
    PolicyError,
    Repair,
    RetriesExhausted,
    RetryBudget,
    RetryPolicy,
    RollbackFailed,
    SkipLimitExceeded,
    TransactionAborted,
    TransactionMisuse,
    batch,
    classify,
    copy_into,
    copy_text,
    each,
    execute_many,
    ingest,
    pipe,
    retry,
    timeout,
)
from dbop_raw.cli.target import Target
from dbop_raw.events import LeakSuspected, Retried
from dbop_raw.observe.structlog import StructlogObserver
from dbop_raw.testing import Fault, FaultProxy, Server, query
from dbop_raw.testing.binaries import account_for
from dbop_raw.testing.folders import own, temporary_root
from dbop_raw.testing.server import run_sql
from tests.support.dsn import PASSWORD, with_password
from tests.support.pgbouncer import pgbouncer
from tests.support.servers import or_skip

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

ONCE = RetryPolicy(attempts=2, first_delay=0.001)


class Ears:
    """All that dbop_raw says, in whatever way, as text."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.events: list[Event] = []
        self.errors: list[BaseException] = []
        self._lines = io.StringIO()
        renderer = structlog.processors.JSONRenderer()
        self._log = StructlogObserver(
            structlog.wrap_logger(structlog.PrintLogger(self._lines), processors=[renderer])
        )

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.said += [repr(event), str(event), json.dumps(dataclasses.asdict(event))]
        self._log(event)

    def hear(self, error: BaseException) -> None:
        self.errors.append(error)
        # A line of code in a traceback is the program's own text: here, too, without DSNs or values.
        self.said.append("".join(traceback.format_exception(error)))
        seen: BaseException | None = error
        while seen is not None:
            self.said += [str(seen), repr(seen), repr(seen.args), *getattr(seen, "__notes__", ())]
            seen = seen.__cause__ or seen.__context__

    async def expect(self, kind: type[BaseException], call: Awaitable[Any]) -> None:
        with pytest.raises(kind) as caught:
            await call
        self.hear(caught.value)

    def assert_silent_about(self, *secrets: str) -> None:
        assert self.said
        for text in (*self.said, self._lines.getvalue()):
            for secret in secrets:
                assert secret not in text, text


@pytest.fixture
def ears(caplog: pytest.LogCaptureFixture) -> Iterator[Ears]:
    caplog.set_level(logging.DEBUG)
    ears = Ears()
    yield ears
    ears.said.append(caplog.text)
    ears.assert_silent_about(PASSWORD)


@pytest.fixture
async def table(postgres_dsn: str) -> str:
    run_sql(postgres_dsn, "CREATE TABLE t (id integer PRIMARY KEY, body text NOT NULL)")
    return postgres_dsn


async def _raises(error: Exception) -> None:
    raise error


async def _sleep(conn: Any) -> None:
    await conn.execute("SELECT pg_sleep(5)")


class TestPasswords:
    async def test_a_password_is_in_no_event_log_error_reject_or_repr(  # noqa: PLR0915 - one list of all that is said
        self, table: str, postgres_server: Server, ears: Ears, tmp_path: Path
    ) -> None:
        dsn = with_password(table)
        hears = ears.expect
        tokens = CommitTokens()
        async with (
            FaultProxy(postgres_server.host, postgres_server.port) as proxy,
            Engine.open(
                proxy.dsn(dsn), min_size=1, max_size=1, ssl=False, acquire_timeout=0.1, max_waiting=1,
                observer=ears, leak_after=0.05, commit_tokens=tokens, budget=RetryBudget(capacity=20),
            ) as engine,
        ):  # fmt: skip
            await engine.run(tokens.install)
            await hears(OperationTimeout, engine.run(pipe(_sleep, timeout(0.1))))
            await hears(OperationTimeout, engine.run(_sleep, deadline=0.1))
            async with engine.transaction():
                waiting = asyncio.create_task(hears(AcquireTimeout, engine.run(_sleep)))
                await asyncio.sleep(0)
                await hears(EngineOverloaded, engine.run(_sleep))
                await waiting

            async def serialization(conn: Any) -> None:
                await conn.execute("DO $$BEGIN RAISE serialization_failure; END$$")

            async def swallows(conn: Any) -> None:
                with contextlib.suppress(asyncpg.PostgresError):
                    await conn.execute("SELECT 1/0")

            async def commits(conn: Any) -> None:
                await conn.execute("COMMIT")

            async def nests(conn: Any) -> None:
                async with conn.transaction():
                    pass

            await hears(RetriesExhausted, engine.run(serialization, retry=ONCE))
            await hears(TransactionAborted, engine.run(swallows))
            await hears(TransactionMisuse, engine.run(commits))
            await hears(TransactionMisuse, engine.run(nests))
            await hears(PolicyError, engine.run(nests, isolation="none"))  # type: ignore[arg-type]
            await hears(TypeError, engine.run(dsn))  # type: ignore[arg-type]
            write = batch(execute_many("INSERT INTO t VALUES ($1, $2)"), skip_limit=1)
            await hears(SkipLimitExceeded, engine.run(write([(1, None), (2, None)])))
            grouped = batch(execute_many("INSERT INTO t VALUES ($1, $2)"), together=lambda _: 0)
            companions = await engine.run(grouped([(901, "x"), (902, None)]))
            await hears(GroupFailed, _raises(companions.failed[0].error))
            rejects = JsonlRejects(tmp_path / "rejects.jsonl")
            await ingest(
                engine, [(n, None if n % 2 else "x") for n in range(10)],
                batch(copy_into("t", columns=("id", "body"))), rejects=rejects, ledger=Ledger("l"), workers=1,
            )  # fmt: skip
            ears.said.append((tmp_path / "rejects.jsonl").read_text())
            others = [(n, "y") for n in range(10)]
            await hears(LedgerMismatch, ingest(engine, others, write, ledger=Ledger("l")))
            # The line is lost: at COMMIT, in the body, at ROLLBACK.
            proxy.inject(Fault("cut", when=query("COMMIT"), side="after"))
            await hears(CommitUnknown, engine.run(lambda c: c.execute("SELECT 1")))
            proxy.inject(Fault("cut", when=query("COMMIT"), side="before"))
            await engine.run(lambda c: c.execute("SELECT 1"), resolve_commit=True)
            proxy.inject(Fault("reset", when=query("1/0"), side="before"))
            await hears(asyncpg.PostgresConnectionError, engine.run(lambda c: c.execute("SELECT 1/0")))
            proxy.inject(Fault("hang", when=query("ROLLBACK"), side="before"))
            await hears(RollbackFailed, engine.run(lambda c: c.execute("SELECT 1/0")))
            # Nobody is there.
            port, proxy.server_port = proxy.server_port, 1
            proxy.drop_all()
            await hears(RetriesExhausted, engine.run(lambda c: c.execute("SELECT 1"), retry=ONCE))
            proxy.server_port = port
            async with engine.transaction():
                await asyncio.sleep(0.1)
            assert any(isinstance(event, LeakSuspected) for event in ears.events)
            ears.said += [repr(engine), str(engine.stats()), repr(tokens), repr(rejects), repr(write)]
            ears.said += [repr(engine.run), repr(pipe(serialization, timeout(1), retry(ONCE)))]
            await engine.close()
            await hears(EngineClosed, engine.run(_sleep))
        ours = {
            kind for kind in vars(dbop_raw).values() if isinstance(kind, type) and issubclass(kind, DbopError)
        }
        heard = {type(error) for error in ears.errors}
        assert ours - heard == {DbopError}, "an error that was not forced"
        # The events are told apart from a dumb silence: these did happen.
        assert len({event.name for event in ears.events}) >= 14

    @pytest.mark.parametrize(
        "dsn",
        [
            f"postgresql://u:{PASSWORD}@127.0.0.1:1/db",
            f"postgresql://u:{PASSWORD}@127.0.0.1:1,127.0.0.1:2/db?target_session_attrs=read-write",
            f"postgresql://u:{PASSWORD}@nosuch.invalid/db",
            f"postgresql://u:{PASSWORD}@127.0.0.1:port/db",
            f"postgresql://u:{PASSWORD}/x@127.0.0.1:5432/db",
            f"postgresql://u:{PASSWORD}#x@127.0.0.1:5432/db",
            f"postgresql://u:x?{PASSWORD}@127.0.0.1:5432/db",
            f"postgresql://u:x?y={PASSWORD}@127.0.0.1:1/db",
            f"postgresql://u:p@ss:{PASSWORD}@127.0.0.1:5432/db",
            f"postgresql://u:[{PASSWORD}@127.0.0.1/db",
            f"postgresql://u:{PASSWORD}\u2100@127.0.0.1/db",
            f"postgresql://u:{PASSWORD}@127.0.0.1:1/db?sslmode=nonsense",
            f"postgresql://u@127.0.0.1:1/db?password={PASSWORD}&sslmode=nonsense",
            f"mysql://u:{PASSWORD}@127.0.0.1/db",
            f"u:{PASSWORD}@127.0.0.1/db",
            f"host=127.0.0.1 password={PASSWORD}",
        ],
    )
    @pytest.mark.parametrize("size", [0, 1])
    async def test_a_password_is_in_no_error_of_connecting(self, ears: Ears, dsn: str, size: int) -> None:
        async def connect() -> None:
            async with Engine.open(dsn, min_size=size, max_size=1, timeout=2, observer=ears) as engine:
                await engine.run(lambda conn: conn.execute("SELECT 1"), retry=ONCE)

        await ears.expect(Exception, connect())

    async def test_a_wrong_password_is_not_told(
        self, postgres_server: Server, postgres_dsn: str, ears: Ears
    ) -> None:
        if postgres_server.data_dir is None:
            pytest.skip("its pg_hba.conf is not ours to change")
        role = f"guarded_{uuid.uuid4().hex[:8]}"
        run_sql(postgres_dsn, f"CREATE ROLE {role} LOGIN PASSWORD 'another'")
        hba = postgres_server.data_dir / "pg_hba.conf"
        before = hba.read_text()
        hba.write_text(f"host all {role} all scram-sha-256\n{before}")
        try:
            postgres_server.sql("SELECT pg_reload_conf()")
            dsn = with_password(postgres_dsn, user=role)
            async with Engine.open(
                with_password(postgres_dsn, "another", role), min_size=1, max_size=1
            ) as engine:
                assert await engine.fetchval("SELECT current_user") == role
            async with Engine.open(dsn, min_size=0, max_size=1, observer=ears) as engine:
                await ears.expect(
                    asyncpg.InvalidPasswordError,
                    engine.run(lambda conn: conn.execute("SELECT 1"), retry=ONCE),
                )
        finally:
            hba.write_text(before)
            postgres_server.sql("SELECT pg_reload_conf()")
            run_sql(postgres_dsn, f"DROP ROLE {role}")
        assert not [event for event in ears.events if isinstance(event, Retried)]

    async def test_a_dsn_in_the_code_that_took_a_connection_is_not_in_a_report_of_a_leak(
        self, table: str, ears: Ears
    ) -> None:
        async def takes(_secret: str) -> None:
            async with engine.transaction():
                await asyncio.sleep(0.06)

        async with Engine.open(table, min_size=1, max_size=1, leak_after=0.02, observer=ears) as engine:
            await takes("postgresql://u:hunter2-and-more@h/db")
        assert [event for event in ears.events if isinstance(event, LeakSuspected) and "takes" in event.stack]

        async with Engine.open(table, min_size=1, max_size=1, leak_after=0.02) as engine:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                await takes("postgresql://u:hunter2-and-more@h/db")
        ears.said += [str(warning.message) for warning in caught]
        assert any("takes" in str(warning.message) for warning in caught)


SECRET = "4111-1111-1111-1111"


class TestValues:
    @pytest.mark.parametrize("kind", ["each", "execute_many", "copy_into", "copy_text"])
    @pytest.mark.parametrize("share", [1, 10])
    async def test_values_of_items_are_in_no_event_and_in_no_error_of_ours(
        self, table: str, ears: Ears, kind: str, share: int, tmp_path: Path
    ) -> None:
        number = str if kind == "copy_text" else int
        run_sql(table, "ALTER TABLE t ADD CHECK (body NOT LIKE 'bad%')")
        items: list[Any] = [(number(n), ("bad" if n % share == 0 else "") + SECRET) for n in range(60)]
        items += [(number(1), SECRET), (object(), SECRET), (SECRET, SECRET), SECRET, (SECRET,)]

        async def insert(conn: Any, row: Any) -> None:
            await conn.execute("INSERT INTO t VALUES ($1, $2)", *row)

        writers: dict[str, Any] = {
            "each": each(lambda row: lambda conn: insert(conn, row)),
            "execute_many": execute_many("INSERT INTO t VALUES ($1, $2)"),
            "copy_into": copy_into("t", columns=("id", "body")),
            "copy_text": copy_text("t", columns=("id", "body")),
        }
        async with Engine.open(table, min_size=1, max_size=2, observer=ears) as engine:
            write = batch(writers[kind], retry=ONCE, skip_limit=3)
            await ears.expect(SkipLimitExceeded, engine.run(write(items)))
            result = await engine.run(batch(writers[kind])(items))
            ears.said += [repr(write), repr(write(items)), str(engine.stats())]
            assert len(result.failed) >= 5
            # Our own words about an item; the server's and the driver's are theirs, and unchanged.
            ears.said += [
                str(failed.error) for failed in result.failed if not isinstance(failed.error, _FOREIGN)
            ]
            ears.said += [repr(failed.verdict) for failed in result.failed]
            rejects = JsonlRejects(tmp_path / "rejects.jsonl")
            report = await ingest(engine, items, batch(writers[kind]), rejects=rejects, workers=1)
            ears.said += [repr(report), repr(rejects)]
        assert any(event.name == "batch.item_failed" for event in ears.events)
        assert SECRET in rejects.path.read_text(), "they are what a rejects file is for"
        ears.assert_silent_about(SECRET)

    async def test_an_item_that_is_given_for_an_operation_is_not_quoted(self, table: str, ears: Ears) -> None:
        def makes_no_operation(item: Any) -> Any:
            return item

        async with Engine.open(table, min_size=1, max_size=1, observer=ears) as engine:
            result = await engine.run(batch(each(makes_no_operation))([{"card": SECRET}]))
        (failed,) = result.failed
        ears.hear(failed.error)
        ears.assert_silent_about(SECRET)

    async def test_a_rejects_file_is_made_for_its_owner_alone(self, table: str, tmp_path: Path) -> None:
        path = tmp_path / "rejects.jsonl"
        before = os.umask(0)
        try:
            async with Engine.open(table, min_size=1, max_size=1) as engine:
                write = batch(copy_into("t", columns=("id", "body")))
                await ingest(engine, [(1, None)], write, rejects=JsonlRejects(path), workers=1)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


_FOREIGN = (asyncpg.PostgresError, asyncpg.InterfaceError)


# --- hostile names

CANARY = "canary"
HOSTILE = (
    f't"; DROP TABLE {CANARY}; --',
    f"t'; DROP TABLE {CANARY}; --",
    f"$d_x$; DROP TABLE {CANARY}; $d_x$",
    f"t) FROM STDIN; DROP TABLE {CANARY}; --",
    '"',
    "''",
    "\\",
    "a.b",
    'pg_temp"."x',
    "select",
    " ",
    "\n",
    "\t\r",
    "%s {0} {one} $1 :name",
    "Ünïcödé 数据库 🐘",
    "E'\\x'",
    "/*",
)


def _fits(name: str) -> bool:
    return 0 < len(name.encode()) <= 63 - len("_at")


NAMES = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20),
    st.text("\"'$\\.;-{}%a", min_size=1, max_size=20),
).filter(_fits)


@pytest.fixture(scope="module")
def names_runner(postgres_server: Server) -> Iterator[Callable[[Callable[[Engine], Awaitable[None]]], None]]:
    """Runs an async function with an engine that lives for all examples."""
    dsn = postgres_server.create_database()
    run_sql(dsn, f"CREATE TABLE {CANARY} AS SELECT 1 AS alive")
    with asyncio.Runner() as runner:
        opened = Engine.open(dsn, min_size=1, max_size=2)
        engine = runner.run(opened.__aenter__())
        try:
            yield lambda work: runner.run(_call(work, engine))
        finally:
            runner.run(opened.__aexit__(None, None, None))
            postgres_server.drop_database(dsn)


async def _call(work: Callable[[Engine], Awaitable[None]], engine: Engine) -> None:
    await work(engine)
    assert await engine.fetchval(f"SELECT alive FROM {CANARY}") == 1


async def _quoted(engine: Engine, *names: str) -> list[str]:
    """As the server itself quotes them."""
    return [await engine.fetchval("SELECT pg_catalog.quote_ident($1)", name) for name in names]


@contextlib.asynccontextmanager
async def _schema(engine: Engine, name: str) -> AsyncIterator[str]:
    (quoted,) = await _quoted(engine, name)
    await engine.execute(f"CREATE SCHEMA {quoted}")
    try:
        yield quoted
    finally:
        await engine.execute(f"DROP SCHEMA {quoted} CASCADE")


FEW = settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


class TestHostileNames:
    @FEW
    @given(table=NAMES, schema=NAMES.filter(lambda n: not n.startswith("pg_")), first=NAMES, second=NAMES)
    def test_hostile_names_are_taken_literally_by_the_writers(
        self,
        names_runner: Callable[[Callable[[Engine], Awaitable[None]]], None],
        table: str,
        schema: str,
        first: str,
        second: str,
    ) -> None:
        columns = (first, second) if first != second else (first, second + "2")

        async def work(engine: Engine) -> None:
            async with _schema(engine, schema) as quoted_schema:
                quoted_table, a, b = await _quoted(engine, table, *columns)
                relation = f"{quoted_schema}.{quoted_table}"
                await engine.execute(f"CREATE TABLE {relation} ({a} integer NOT NULL, {b} text)")
                dense = [(n, "x") if n % 2 else (None, "x") for n in range(60)]
                texts = [(None if n is None else str(n), body) for n, body in dense]
                cases: tuple[tuple[Any, list[Any]], ...] = (
                    (copy_into(table, columns=columns, schema=schema), dense),
                    (copy_text(table, columns=columns, schema=schema), texts),
                )
                for writer, items in cases:
                    result = await engine.run(batch(writer)(items))
                    assert (result.written, len(result.failed)) == (30, 30)
                    assert {one.verdict.sqlstate for one in result.failed} == {"23502"}
                assert await engine.fetchval(f"SELECT count({a}) FROM {relation}") == 60
                found = await engine.run(lambda conn: Target.find(conn, table, schema))
                assert set(found.columns) == set(columns)
                found.check(columns)

        names_runner(work)

    @FEW
    @given(table=NAMES, schema=NAMES.filter(lambda n: not n.startswith("pg_")), name=NAMES)
    def test_hostile_names_are_taken_literally_by_tokens_and_ledgers(
        self,
        names_runner: Callable[[Callable[[Engine], Awaitable[None]]], None],
        table: str,
        schema: str,
        name: str,
    ) -> None:
        async def work(engine: Engine) -> None:
            async with _schema(engine, schema) as quoted_schema:
                (quoted,) = await _quoted(engine, table)
                tokens = CommitTokens(table=table, schema=schema)
                await engine.run(tokens.install)
                await engine.run(tokens.install)
                async with engine.transaction() as conn:
                    await conn.execute(tokens.record().opening())
                assert await engine.fetchval(f"SELECT count(*) FROM {quoted_schema}.{quoted}") == 1
                assert await engine.run(tokens.purge) == 0

            async with _schema(engine, schema) as quoted_schema:
                await engine.execute("CREATE TABLE IF NOT EXISTS target (id integer NOT NULL)")
                if not name.strip():
                    return
                ledger = Ledger(name, table=table, schema=schema)
                for written in (7, 0):
                    report = await ingest(
                        engine, [(n,) for n in range(7)], batch(copy_into("target", columns=("id",))),
                        size=3, workers=2, ledger=ledger,
                    )  # fmt: skip
                    assert (report.written, report.read) == (written, 7)
                (kept,) = {
                    row["name"] for row in await engine.fetch(f"SELECT name FROM {quoted_schema}.{quoted}")
                }
                assert kept == name

        names_runner(work)

    @pytest.mark.parametrize("name", [HOSTILE[0], HOSTILE[1], "a.b", "%s {0} {one} $1 :name"])
    async def test_hostile_names_are_taken_literally_by_the_command(
        self, postgres_dsn: str, tmp_path: Path, name: str
    ) -> None:
        async with Engine.open(postgres_dsn, min_size=1, max_size=1) as engine:
            await engine.execute(f"CREATE TABLE {CANARY} AS SELECT 1 AS alive")
            (quoted,) = await _quoted(engine, name)
            await engine.execute(f"CREATE TABLE {quoted} ({quoted} integer)")
            source = tmp_path / "source.csv"
            header = name.replace('"', '""')
            source.write_text(f'"{header}"\n1\n2\nx\n')
            command = [
                sys.executable, "-m", "dbop_raw.cli", "ingest", str(source), "--table", name,
                "--dsn", with_password(postgres_dsn), "--ledger", name,
                "--rejects", str(tmp_path / "rejects.jsonl"),
            ]  # fmt: skip
            done = await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 1, done.stderr
            assert await engine.fetchval(f"SELECT count(*) FROM {quoted}") == 2
            assert await engine.fetchval(f"SELECT alive FROM {CANARY}") == 1
        assert PASSWORD not in done.stdout + done.stderr


# --- a search_path with something else in it

EVIL = """
CREATE SCHEMA evil;
CREATE FUNCTION evil.bad() RETURNS boolean LANGUAGE plpgsql AS
  $$BEGIN RAISE 'hijacked' USING ERRCODE = 'HJ000'; END$$;
{functions}
{operators}
"""
EVIL_FUNCTIONS = (
    ("array_length", "anyarray, integer", "integer"),
    ("unnest", "anyarray", "setof anyelement"),
    ("substr", "text, integer, integer", "text"),
    ("to_regproc", "text", "regproc"),
    ("set_config", "text, text, boolean", "text"),
    ("current_setting", "text", "text"),
    ("concat_ws", "text, text", "text"),
    ("now", "", "timestamptz"),
    ("pg_is_in_recovery", "", "boolean"),
    ("pg_xact_status", "xid8", "text"),
)
EVIL_OPERATORS = ("=", "<>", "<", "<=", ">", ">=", "+", "-", "*", "/", "||")


async def _set_the_trap(dsn: str) -> None:
    functions = "\n".join(
        f"CREATE FUNCTION evil.{name}({arguments}) RETURNS {returns} LANGUAGE plpgsql AS "
        f"$$BEGIN RAISE 'hijacked {name}' USING ERRCODE = 'HJ000'; END$$;"
        for name, arguments, returns in EVIL_FUNCTIONS
    )
    operators = "\n".join(
        f"CREATE FUNCTION evil.op_{n}_{kind}({kind}, {kind}) RETURNS {returns} LANGUAGE plpgsql AS "
        f"$$BEGIN RAISE 'hijacked {operator} {kind}' USING ERRCODE = 'HJ000'; END$$; "
        f"CREATE OPERATOR evil.{operator} "
        f"(FUNCTION = evil.op_{n}_{kind}, LEFTARG = {kind}, RIGHTARG = {kind});"
        for n, operator in enumerate(EVIL_OPERATORS)
        for kind in ("integer", "text")
        for returns in [kind if operator in {"+", "-", "*", "/", "||"} else "boolean"]
    )
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(EVIL.format(functions=functions, operators=operators))
        await connection.execute("CREATE TABLE t (id integer NOT NULL, body text)")
    finally:
        await connection.close()


async def _learn_types(conn: asyncpg.Connection) -> None:
    """The driver reads about types by unqualified names, once a connection. That is not ours to mend."""
    await conn.execute("SET search_path = pg_catalog, public")
    await conn.fetch("SELECT $1::int4[], $2::text[]", [], [])
    await conn.execute("RESET search_path")


class TestASearchPathThatHijacks:
    @pytest.fixture
    async def trap(self, postgres_dsn: str) -> AsyncIterator[Engine]:
        await _set_the_trap(postgres_dsn)
        hijacked = {"search_path": "evil, public, pg_catalog"}
        async with Engine.open(
            postgres_dsn, min_size=1, max_size=2, server_settings=hijacked, commit_tokens=CommitTokens(),
            init=_learn_types,
        ) as engine:  # fmt: skip
            with pytest.raises(asyncpg.PostgresError, match="hijacked"):
                await engine.execute("SELECT 1 + 1")
            yield engine

    @pytest.mark.parametrize("kind", ["execute_many", "copy_into", "copy_text"])
    async def test_the_functions_in_pg_temp_call_nothing_of_a_hostile_search_path(
        self, trap: Engine, kind: str
    ) -> None:
        number = str if kind == "copy_text" else int
        items = [(number(n) if n % 2 else None, "x") for n in range(200)]
        writers: dict[str, Any] = {
            "execute_many": execute_many("INSERT INTO t VALUES ($1, $2)"),
            "copy_into": copy_into("t", columns=("id", "body")),
            "copy_text": copy_text("t", columns=("id", "body")),
        }
        write = batch(writers[kind])
        for round_ in (1, 2):
            result = await trap.run(write(items))
            assert {one.verdict.sqlstate for one in result.failed} == {"23502"}
            assert (result.written, len(result.failed)) == (100, 100)
            assert await trap.fetchval("SELECT pg_catalog.count(*) FROM t") == 100 * round_
        made = (
            "SELECT pg_catalog.count(*) FROM pg_catalog.pg_proc "
            "WHERE pg_catalog.starts_with(proname::text, 'dbop_raw_')"
        )
        assert await trap.fetchval(made) >= 1, "the row-by-row way was not taken"

    async def test_limits_tokens_and_look_ups_call_nothing_of_a_hostile_search_path(
        self, trap: Engine, postgres_dsn: str
    ) -> None:
        tokens = CommitTokens()
        await trap.run(tokens.install)
        insert = "INSERT INTO t VALUES (1, 'x')"

        async def nested(conn: Any) -> None:
            await timeout(1, lock=0.5)(lambda c: c.execute(insert))(conn)
            await conn.execute(insert)

        await trap.run(nested, resolve_commit=True, deadline=5, retry=ONCE)
        for by_token in (True, False):
            async with (
                FaultProxy(*_address(postgres_dsn)) as proxy,
                Engine.open(
                    proxy.dsn(postgres_dsn), min_size=1, max_size=2, ssl=False,
                    server_settings={"search_path": "evil, public, pg_catalog"},
                    commit_tokens=tokens if by_token else None,
                ) as engine,
            ):  # fmt: skip
                proxy.inject(Fault("cut", when=query("COMMIT"), side="after"))
                await engine.run(lambda c: c.execute(insert), resolve_commit=True, deadline=5)
                assert engine.stats().commits_found_committed == 1
        assert await trap.run(tokens.purge) == 0
        for _ in range(2):
            report = await ingest(
                trap, [(n, "x") for n in range(10)], batch(copy_into("t", columns=("id", "body"))),
                size=5, workers=1, ledger=Ledger("l"),
            )  # fmt: skip
            assert report.finished


def _address(dsn: str) -> tuple[str, int]:
    host, _, port = dsn.rpartition("@")[2].partition("/")[0].partition(":")
    return host, int(port)


# --- TLS


@dataclasses.dataclass(frozen=True)
class Guarded:
    """A server that takes encrypted connections only: by a pooler, for the embedded server knows no TLS."""

    dsn: str
    """By the name that its certificate is for."""
    by_address: str
    certificate: Path
    other: Path
    """A certificate that is not its own."""


@pytest.fixture(scope="module")
def guarded(postgres_server: Server) -> Iterator[Guarded]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on the PATH: it makes the certificates")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(temporary_root())
        for name, host in (("server", "localhost"), ("other", "elsewhere.invalid")):
            subject = ["-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}"]
            subprocess.run(
                ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject,
                 "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.crt"],
                check=True, capture_output=True, timeout=60,
            )  # fmt: skip
        for path in (folder, *folder.glob("server.*")):
            own(path, account_for(None))
        settings = {
            "client_tls_sslmode": "require",
            "client_tls_key_file": str(folder / "server.key"),
            "client_tls_cert_file": str(folder / "server.crt"),
        }
        opened = pgbouncer(postgres_server, pool_mode="session", settings=settings)
        pooler = stack.enter_context(or_skip(opened))
        by_name = pooler.dsn.replace("127.0.0.1", "localhost")
        yield Guarded(by_name, pooler.dsn, folder / "server.crt", folder / "other.crt")


class TestTLS:
    @pytest.mark.parametrize("how", ["context", "require", "dsn"])
    async def test_tls_options_pass_through_open(self, guarded: Guarded, how: str) -> None:
        ways: dict[str, dict[str, Any]] = {
            "context": {"dsn": guarded.dsn, "ssl": ssl.create_default_context(cafile=guarded.certificate)},
            "require": {"dsn": guarded.dsn, "ssl": "require"},
            "dsn": {"dsn": f"{guarded.dsn}?sslmode=verify-full&sslrootcert={guarded.certificate}"},
        }
        async with Engine.open(**ways[how], min_size=1, max_size=1) as engine:
            assert await engine.run(lambda conn: conn.fetchval("SELECT 6 * 7")) == 42

    async def test_tls_is_not_left_out_where_the_server_requires_it(self, guarded: Guarded) -> None:
        with pytest.raises(asyncpg.PostgresError):
            async with Engine.open(guarded.dsn, ssl=False, min_size=1, max_size=1):
                pass

    @pytest.mark.parametrize("wrong", ["unknown", "another", "another host"])
    async def test_a_refused_certificate_is_never_tried_again(self, guarded: Guarded, wrong: str) -> None:
        cafile = {"unknown": None, "another": guarded.other, "another host": guarded.certificate}[wrong]
        context = ssl.create_default_context(cafile=cafile)
        dsn = guarded.by_address if wrong == "another host" else guarded.dsn
        seen: list[Event] = []
        async with Engine.open(dsn, min_size=0, max_size=1, ssl=context, observer=seen.append) as engine:
            with pytest.raises(ssl.SSLCertVerificationError) as caught:
                await engine.run(lambda conn: conn.execute("SELECT 1"), retry=RetryPolicy(attempts=5))
            assert classify(caught.value).repair is Repair.NEVER
        assert not [event for event in seen if isinstance(event, Retried)]

    async def test_a_server_without_tls_is_not_talked_to_in_the_clear(self, postgres_server: Server) -> None:
        async with FaultProxy(postgres_server.host, postgres_server.port) as proxy:
            dsn = with_password(proxy.dsn(postgres_server.dsn))
            with pytest.raises(ConnectionError):
                async with Engine.open(dsn, min_size=1, max_size=1, ssl="require"):
                    pass
            assert {seen.type for seen in proxy.messages if seen.sender == "client"} == {"ssl"}
