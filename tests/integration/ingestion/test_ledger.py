"""The ledger: run again, nothing is written twice and nothing is lost; another job is refused."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    Engine,
    IngestReport,
    JsonlRejects,
    Ledger,
    LedgerMismatch,
    Operation,
    PolicyError,
    batch,
    copy_into,
    copy_text,
    each,
    execute_many,
    ingest,
    pipe,
)
from dbop_raw.testing import Fault, FaultProxy, Server, query
from tests.support.ingesting import TABLES, Kept, Row, add_item, copying, engine_on, rows, stored

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


class TestLedger:
    async def test_run_twice_writes_once(self, engine: Engine) -> None:
        first = await ingest(engine, rows(55, bad=(3,)), copying(), size=10, ledger=Ledger("x"))
        again = await ingest(engine, rows(55, bad=(3,)), copying(), size=10, ledger=Ledger("x"))
        assert (first.chunks, first.skipped, again.chunks, again.skipped) == (6, 0, 0, 6)
        assert (again.read, again.written, again.rejected, again.finished) == (55, 0, 0, True)
        assert len(await stored(engine)) == 54

    async def test_stopped_by_an_error_it_goes_on_where_it_was(self, engine: Engine, tmp_path: Path) -> None:
        rejects = JsonlRejects(tmp_path / "rejects.jsonl")

        def source(broken_at: int | None) -> Iterator[Row]:
            for row in rows(95, bad=(5, 50, 90)):
                if row[0] == broken_at:
                    raise ConnectionError("the source broke")
                yield row

        with pytest.raises(ConnectionError, match="the source broke"):
            await ingest(
                engine, source(47), copying(), size=10, workers=3, ledger=Ledger("x"), rejects=rejects
            )
        partly = await stored(engine)
        assert set(partly) <= set(range(47))
        report = await ingest(
            engine, source(None), copying(), size=10, workers=3, ledger=Ledger("x"), rejects=rejects
        )
        assert await stored(engine) == [n for n in range(95) if n not in {5, 50, 90}]
        assert report.read == 95
        assert report.skipped + report.chunks == 10
        indexes = [json.loads(line)["index"] for line in rejects.path.read_text().splitlines()]
        assert set(indexes) == {5, 50, 90}

    @pytest.mark.parametrize("moment", ["before", "after"])
    @pytest.mark.parametrize("nth", [1, 3])
    async def test_cancelled_at_a_commit_it_goes_on_where_it_was(
        self, engine: Engine, postgres_server: Server, database: str, moment: str, nth: int
    ) -> None:
        """Whether the COMMIT had been done when the ingest was stopped: nothing twice, nothing lost."""
        async with (
            FaultProxy(postgres_server.host, postgres_server.port) as proxy,
            engine_on(proxy.dsn(database)) as distant,
        ):
            commits = 0

            def when(message: Any) -> bool:
                nonlocal commits
                commits += query("COMMIT")(message)
                return bool(query("COMMIT")(message)) and commits == nth

            side: Any = moment
            fault = proxy.inject(Fault("delay", when=when, side=side, seconds=0.2))
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:

                    async def cancel() -> None:
                        await fault.wait()
                        scope.cancel()

                    group.start_soon(cancel)
                    await ingest(distant, rows(60), copying(), size=10, workers=2, ledger=Ledger("x"))
            assert scope.cancelled_caught
        await ingest(engine, rows(60), copying(), size=10, workers=2, ledger=Ledger("x"))
        assert await stored(engine) == list(range(60))

    @pytest.mark.parametrize("writer", ["each", "execute_many", "copy_into", "copy_text"])
    async def test_two_at_once_share_the_work(self, engine: Engine, writer: str) -> None:
        """Two processes with one ledger: a chunk is written by one of them, by whatever writer."""
        reports: list[IngestReport] = []
        items: list[Any] = [(str(n), body) for n, body in rows(100)] if writer == "copy_text" else rows(100)
        writers: dict[str, Any] = {
            "each": each(add_item),
            "execute_many": execute_many("INSERT INTO item VALUES ($1, $2)"),
            "copy_into": copy_into("item", columns=("id", "body")),
            "copy_text": copy_text("item", columns=("id", "body")),
        }

        async def run() -> None:
            write = batch(writers[writer])
            reports.append(await ingest(engine, items, write, size=10, workers=2, ledger=Ledger("x")))

        async with anyio.create_task_group() as group:
            group.start_soon(run)
            group.start_soon(run)
        assert await stored(engine) == list(range(100))
        assert sum(report.chunks for report in reports) == 10
        assert sum(report.skipped for report in reports) == 10

    async def test_several_at_once_may_make_the_table(self, engine: Engine) -> None:
        async def make() -> None:
            await engine.run(Ledger("x").install)

        for _ in range(10):
            await engine.execute("DROP TABLE IF EXISTS dbop_raw_ledger")
            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(make)

    async def test_names_are_apart_and_taken_literally(self, engine: Engine) -> None:
        for number, name in enumerate(("x", "o'brien\\", 'a"b')):
            source = rows(10, start=number * 10)
            report = await ingest(engine, source, copying(), size=10, ledger=Ledger(name))
            assert report.chunks == 1
            assert (await ingest(engine, source, copying(), size=10, ledger=Ledger(name))).skipped == 1

    async def test_a_chunk_of_bad_items_only_is_in_the_ledger_too(self, engine: Engine) -> None:
        kept = Kept()
        for _ in range(2):
            await ingest(engine, rows(4, bad=range(4)), copying(), size=2, ledger=Ledger("x"), rejects=kept)
        assert sorted(kept.indexes) == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        "options", [{"name": ""}, {"name": " "}, {"name": "a\0"}, {"name": "x", "table": ""}]
    )
    def test_a_wrong_name_is_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(PolicyError):
            Ledger(**options)


LEDGER = Ledger("x")
TOLD: dict[str, Any] = {"size": 10, "workers": 1, "ledger": LEDGER}


async def forget(engine: Engine, chunk: int) -> None:
    """Undo one chunk of ten rows, as if its worker had been stopped before its COMMIT."""
    await engine.execute("DELETE FROM dbop_raw_ledger WHERE chunk = $1", chunk)
    await engine.execute("DELETE FROM item WHERE id / 10 = $1", chunk)


async def entries(engine: Engine) -> list[tuple[int, int]]:
    """Chunk and number of items of each row, in order."""
    found = await engine.fetch("SELECT chunk, items FROM dbop_raw_ledger ORDER BY chunk")
    return [(row["chunk"], row["items"]) for row in found]


def nth_commit(number: int) -> Callable[[Any], bool]:
    """Match the COMMIT of that number, from 1."""
    seen = itertools.count(1)
    return lambda message: query("COMMIT")(message) and next(seen) == number


class TestAnotherJobUnderTheSameName:
    """It is refused before anything is written, and never passes for done."""

    @pytest.mark.parametrize("missing", [(), (0,), (0, 2), (3,)], ids=str)
    async def test_another_source_is_refused_before_anything_is_written(
        self, engine: Engine, missing: tuple[int, ...]
    ) -> None:
        """Also where a stop has left holes, so that chunks come before the first that can be compared."""
        await ingest(engine, rows(50), copying(), **TOLD)
        for chunk in missing:
            await forget(engine, chunk)
        before = await stored(engine), await entries(engine)
        kept = Kept()
        with pytest.raises(LedgerMismatch) as raised:
            await ingest(engine, rows(80, bad=(4,), start=1000), copying(), **TOLD, rejects=kept)
        assert (await stored(engine), await entries(engine)) == before
        assert kept.rejects == []
        assert raised.value.ledger == "x"
        assert raised.value.field == "items"
        assert raised.value.chunk == (1 if 0 in missing else 0)

    async def test_of_a_source_that_breaks_before_it_could_be_compared_nothing_is_written(
        self, engine: Engine
    ) -> None:
        await ingest(engine, rows(50), copying(), **TOLD)
        await forget(engine, 0)
        before = await stored(engine), await entries(engine)

        def source() -> Iterator[Row]:
            yield from rows(17, start=1000)
            raise LookupError("the source broke")

        with pytest.raises(LookupError, match="the source broke"):
            await ingest(engine, source(), copying(), **TOLD)
        assert (await stored(engine), await entries(engine)) == before

    async def test_a_source_that_was_changed_in_the_middle_is_refused(self, engine: Engine) -> None:
        await ingest(engine, rows(40), copying(), **TOLD)
        await forget(engine, 1)
        changed = rows(40)
        changed[25] = (25, "another body")
        with pytest.raises(LedgerMismatch) as raised:
            await ingest(engine, changed, copying(), **TOLD)
        assert raised.value.chunk == 2
        assert await stored(engine) == [n for n in range(40) if n // 10 != 1]

    async def test_a_source_that_has_become_shorter_is_refused(self, engine: Engine) -> None:
        await ingest(engine, rows(45), copying(), **TOLD)
        await forget(engine, 0)
        for count in (0, 20, 44):
            with pytest.raises(LedgerMismatch) as raised:
                await ingest(engine, rows(count), copying(), **TOLD)
            assert raised.value.field == "items"
        assert await stored(engine) == list(range(10, 45))

    async def test_another_table_is_refused(self, engine: Engine) -> None:
        await engine.execute("CREATE TABLE IF NOT EXISTS other (LIKE item)")
        await ingest(engine, rows(30), copying(), **TOLD)
        with pytest.raises(
            LedgerMismatch, match=r'"public"\."item", and now it is "public"\."other"'
        ) as raised:
            await ingest(engine, rows(30), copying("other"), **TOLD)
        assert raised.value.field == "target"
        assert await stored(engine, "other") == []

    async def test_the_same_table_by_another_way_of_naming_it_is_the_same(self, engine: Engine) -> None:
        await ingest(engine, rows(30), copying(), **TOLD)
        write = batch(copy_into("item", columns=("id", "body"), schema="public"))
        assert (await ingest(engine, rows(30), write, **TOLD)).skipped == 3

    async def test_other_columns_are_refused(self, engine: Engine) -> None:
        await ingest(engine, rows(30), copying(), **TOLD)
        turned = batch(copy_into("item", columns=("body", "id")))
        with pytest.raises(LedgerMismatch, match="'body', 'id'") as raised:
            await ingest(engine, rows(30), turned, **TOLD)
        assert raised.value.field == "columns"

    async def test_another_statement_is_refused_and_its_sql_is_in_no_message(self, engine: Engine) -> None:
        first, second = (f"INSERT INTO item VALUES ($1, $2{more})" for more in ("", " || 'secret'"))
        await ingest(engine, rows(30), batch(execute_many(first)), **TOLD)
        spaced = first.replace(" ", "\n  ")
        assert (await ingest(engine, rows(30), batch(execute_many(spaced)), **TOLD)).skipped == 3
        with pytest.raises(LedgerMismatch) as raised:
            await ingest(engine, rows(30), batch(execute_many(second)), **TOLD)
        assert raised.value.field == "target"
        assert "secret" not in str(raised.value)

    async def test_another_size_is_refused(self, engine: Engine) -> None:
        await ingest(engine, rows(25), copying(), size=10, ledger=LEDGER)
        with pytest.raises(LedgerMismatch, match="size=10, and now size=20") as raised:
            await ingest(engine, rows(25), copying(), size=20, ledger=LEDGER)
        assert (raised.value.field, raised.value.was, raised.value.now) == ("size", 10, 20)
        assert await stored(engine) == list(range(25))

    async def test_a_writer_whose_target_is_not_known_is_taken_at_its_word(self, engine: Engine) -> None:
        await ingest(engine, rows(30), batch(each(add_item)), **TOLD)
        assert (await ingest(engine, rows(30), copying(), **TOLD)).skipped == 3

    async def test_two_processes_with_different_sources_are_told_apart(self, engine: Engine) -> None:
        """The second has seen an empty ledger, and meets the first one's row only when it writes its own."""
        first_is_done = anyio.Event()

        async def late() -> AsyncIterator[Row]:
            await first_is_done.wait()
            for row in rows(20, start=500):
                yield row

        async with anyio.create_task_group() as group:

            async def first() -> None:
                await ledger_is_read.wait()
                await ingest(engine, rows(20), copying(), **TOLD)
                first_is_done.set()

            ledger_is_read = anyio.Event()
            group.start_soon(first)

            class Late:
                def __aiter__(self) -> AsyncIterator[Row]:
                    async def items() -> AsyncIterator[Row]:
                        ledger_is_read.set()
                        async for row in late():
                            yield row

                    return items()

            with pytest.raises(LedgerMismatch) as raised:
                await ingest(engine, Late(), copying(), **TOLD)
        assert raised.value.chunk == 0
        assert await stored(engine) == list(range(20))

    async def test_items_that_are_equal_in_every_way_that_is_stored_are_the_same_source(
        self, engine: Engine
    ) -> None:
        await ingest(engine, rows(30), copying(), **TOLD)
        lists: list[Any] = [list(row) for row in rows(30)]
        assert (await ingest(engine, lists, copying(), **TOLD)).skipped == 3

    async def test_order_by_does_not_change_what_a_chunk_is(self, engine: Engine) -> None:
        await ingest(engine, rows(30), copying(), **TOLD)
        report = await ingest(engine, rows(30), copying(), **TOLD, order_by=lambda row: -row[0])
        assert report.skipped == 3


class TestGrowth:
    @pytest.mark.parametrize("workers", [1, 3])
    @pytest.mark.parametrize(("before", "after"), [(25, 26), (25, 29), (25, 30), (25, 47), (20, 23), (3, 64)])
    async def test_a_source_that_grew_goes_on_at_its_growth(
        self, engine: Engine, before: int, after: int, workers: int
    ) -> None:
        """The last, shorter chunk was in; what came after it goes in exactly once, however often it runs."""
        told = TOLD | {"workers": workers}
        await ingest(engine, rows(before), copying(), **told)
        grown = await ingest(engine, rows(after), copying(), **told)
        assert (grown.read, grown.written, grown.rejected) == (after, after - before, 0)
        assert await stored(engine) == list(range(after))
        again = await ingest(engine, rows(after), copying(), **told)
        assert (again.read, again.written, again.chunks) == (after, 0, 0)

    async def test_it_may_grow_again_and_again(self, engine: Engine) -> None:
        kept = Kept()
        for count in (7, 8, 19, 19, 33, 60):
            await ingest(engine, rows(count, bad=(18, 32)), copying(), **TOLD, rejects=kept)
            assert await stored(engine) == [n for n in range(count) if n not in {18, 32}]
        assert kept.indexes == [18, 32]

    async def test_growth_with_a_hole_before_it(self, engine: Engine) -> None:
        await ingest(engine, rows(25), copying(), **TOLD)
        await forget(engine, 1)
        await ingest(engine, rows(44), copying(), **TOLD)
        assert await stored(engine) == list(range(44))

    async def test_what_a_source_gave_before_it_broke_is_in_and_the_rest_follows(
        self, engine: Engine
    ) -> None:
        def source(broken_at: int | None) -> Iterator[Row]:
            for row in rows(60):
                if row[0] == broken_at:
                    raise LookupError("the source broke")
                yield row

        for broken_at in (13, 34, 34):
            with pytest.raises(LookupError, match="the source broke"):
                await ingest(engine, source(broken_at), copying(), **TOLD)
            assert await stored(engine) == list(range(broken_at))
        await ingest(engine, source(None), copying(), **TOLD)
        assert await stored(engine) == list(range(60))


class TestTheTable:
    async def test_a_row_says_what_went_where_and_what_became_of_it(self, engine: Engine) -> None:
        bad: Any = [*rows(30, bad=(3, 11, 12)), ("no number", "x")]
        await ingest(engine, bad, copying(), **TOLD)
        columns = "name, part, chunk, size, items, target, columns, written, rejected, by_sqlstate"
        found = await engine.fetch(f"SELECT {columns}, digest FROM dbop_raw_ledger ORDER BY chunk")
        same = ("x", "")
        where = (10, '"public"."item"', ["id", "body"])
        assert [
            ((row["name"], row["part"]), (row["size"], row["target"], row["columns"])) for row in found
        ] == [(same, where)] * 4
        told = [(r["chunk"], r["items"], r["written"], r["rejected"], r["by_sqlstate"]) for r in found]
        assert [(*row[:4], json.loads(row[4])) for row in told] == [
            (0, 10, 9, 1, {"23502": 1}),
            (1, 10, 8, 2, {"23502": 2}),
            (2, 10, 10, 0, {}),
            (3, 1, 0, 1, {"TypeError": 1}),
        ]
        assert len({row["digest"] for row in found}) == 4

    async def test_an_item_that_the_server_dropped_is_not_told_as_written(self, engine: Engine) -> None:
        """A trigger may do that: the item is neither written nor rejected."""
        write = copying()

        def dropping(items: Any) -> Operation[Any]:
            async def op(conn: Any) -> Any:
                result = await write(items)(conn)
                return dataclasses.replace(result, written=result.written - 2)

            return pipe(op)

        report = await ingest(engine, rows(20, bad=(7,)), dropping, **TOLD)
        assert (report.written, report.rejected) == (15, 1)
        found = await engine.fetch("SELECT items, written, rejected FROM dbop_raw_ledger ORDER BY chunk")
        assert [tuple(row) for row in found] == [(10, 7, 1), (10, 8, 0)]

    async def test_a_chunk_that_is_started_again_is_told_as_it_ended(
        self, engine: Engine, postgres_server: Server, database: str
    ) -> None:
        async with (
            FaultProxy(postgres_server.host, postgres_server.port) as proxy,
            engine_on(proxy.dsn(database)) as distant,
        ):
            await distant.run(LEDGER.install)
            # The first one is of the ledger's reading.
            proxy.inject(Fault("reset", when=nth_commit(2)))
            proxy.inject(Fault("reset", when=nth_commit(4), side="after"))
            report = await ingest(distant, rows(50, bad=(5, 17, 33)), copying(), **TOLD)
        assert report.retries >= 1
        totals = "SELECT sum(written) AS written, sum(rejected) AS rejected, count(*) FROM dbop_raw_ledger"
        assert tuple(await engine.fetchrow(totals)) == (47, 3, 5)
        assert len(await stored(engine)) == 47

    @pytest.mark.parametrize("side", ["before", "after"])
    async def test_answers_that_are_lost_while_it_is_made_or_read_cost_nothing(
        self, engine: Engine, postgres_server: Server, database: str, side: Any
    ) -> None:
        async with (
            FaultProxy(postgres_server.host, postgres_server.port) as proxy,
            engine_on(proxy.dsn(database)) as distant,
        ):
            lost = proxy.inject(Fault("reset", when=query("COMMIT"), side=side, times=3))
            report = await ingest(distant, rows(50), copying(), **TOLD)
            assert lost.fired == 3
        assert (report.written, report.finished) == (50, True)
        assert await stored(engine) == list(range(50))

    async def test_a_table_of_an_earlier_version_is_brought_up_to_date_and_gone_on_with(
        self, engine: Engine
    ) -> None:
        """Its rows know no digest: what they know is compared."""
        await engine.execute(OLD_TABLE)
        await engine.execute("INSERT INTO dbop_raw_ledger VALUES ('x', 0, 10, 10), ('x', 1, 10, 4)")
        with pytest.raises(LedgerMismatch):
            await ingest(engine, rows(13), copying(), **TOLD)
        report = await ingest(engine, rows(30), copying(), **TOLD)
        assert (report.skipped, report.written) == (2, 16)
        assert await stored(engine) == list(range(14, 30))
        assert (await ingest(engine, rows(30), copying(), **TOLD)).skipped == 4
        await ingest(engine, rows(5, start=100), copying(), size=10, ledger=Ledger("y"))
        assert len(await entries(engine)) == 5

    async def test_several_at_once_may_bring_it_up_to_date(self, engine: Engine) -> None:
        for _ in range(5):
            await engine.execute(f"DROP TABLE IF EXISTS dbop_raw_ledger; {OLD_TABLE}")
            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(engine.run, LEDGER.install)
            key = await engine.fetchval(
                "SELECT array_agg(attname::text ORDER BY attnum) FROM pg_index, pg_attribute "
                "WHERE indrelid = 'dbop_raw_ledger'::regclass AND indisprimary "
                "AND attrelid = indrelid AND attnum = ANY (indkey)"
            )
            assert sorted(key) == ["chunk", "name", "part"]

    async def test_a_table_that_is_up_to_date_needs_no_right_to_change_it(
        self, engine: Engine, database: str
    ) -> None:
        await engine.run(LEDGER.install)
        role = f"ledger_user_{os.getpid()}"
        await engine.execute(
            f"CREATE ROLE {role} LOGIN; GRANT INSERT, SELECT ON item TO {role}; "
            f"GRANT INSERT, SELECT, UPDATE ON dbop_raw_ledger TO {role}"
        )
        try:
            async with engine_on(database, user=role) as other:
                report = await ingest(other, rows(20, bad=(3,)), copying(), **TOLD)
            assert (report.written, report.rejected) == (19, 1)
        finally:
            await engine.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")

    @pytest.mark.parametrize("there", [False, True], ids=["new", "there already"])
    async def test_it_becomes_a_reference_table_once(
        self, postgres_server: Server, database: str, *, there: bool
    ) -> None:
        """Citus is not here: what it is asked, it would do."""
        dsn = postgres_server.create_database()
        try:
            async with engine_on(dsn) as engine:
                await engine.execute(f"{CITUS}; {TABLES}")
                if there:
                    await engine.run(LEDGER.install)
                for _ in range(2):
                    await ingest(
                        engine, rows(20), copying(), size=10, ledger=Ledger("x", reference=True), workers=2
                    )
                asked = await engine.fetch("SELECT relation::text FROM citus_was_asked")
            assert [row["relation"] for row in asked] == ["dbop_raw_ledger"]
        finally:
            postgres_server.drop_database(dsn)
        assert database

    async def test_without_citus_a_reference_table_is_refused_in_plain_words(self, engine: Engine) -> None:
        with pytest.raises(PolicyError, match="reference=True needs Citus"):
            await ingest(engine, rows(20), copying(), size=10, ledger=Ledger("x", reference=True))
        assert await stored(engine) == []


OLD_TABLE = """
CREATE TABLE dbop_raw_ledger (
    name text, chunk bigint, size integer NOT NULL, items integer NOT NULL,
    at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (name, chunk)
)
"""

CITUS = """
SET allow_system_table_mods = on;
CREATE TABLE pg_catalog.pg_dist_partition (logicalrelid regclass, partmethod "char", repmodel "char");
CREATE TABLE citus_was_asked (relation regclass);
CREATE FUNCTION pg_catalog.create_reference_table(relation regclass) RETURNS void LANGUAGE sql AS
    'INSERT INTO pg_catalog.pg_dist_partition VALUES (relation, ''n'', ''t'');
     INSERT INTO public.citus_was_asked VALUES (relation)';
"""


class TestOnlyTheLedgersOwnRowMeansAlreadyIn:
    """D.1: whose error it is, its fields don't tell; that the row is there, the ledger does."""

    @pytest.mark.parametrize("ledger", [None, LEDGER], ids=["without", "with a ledger"])
    @pytest.mark.parametrize("schema", ["public", "elsewhere"])
    async def test_a_foreign_unique_violation_is_an_error(
        self, engine: Engine, schema: str, ledger: Ledger | None
    ) -> None:
        """Also of a table that has the ledger's name, in another schema."""
        name = "dbop_raw_ledger" if schema == "elsewhere" else "tags"
        await engine.execute(
            f"CREATE SCHEMA IF NOT EXISTS {schema}; DROP TABLE IF EXISTS {schema}.{name}; "
            f"CREATE TABLE {schema}.{name} (tag int UNIQUE); INSERT INTO {schema}.{name} VALUES (1)"
        )
        write = copying()

        def tagging(items: Any) -> Operation[Any]:
            async def op(conn: Any) -> Any:
                result = await write(items)(conn)
                if items[0][0] in {10, 20}:
                    await conn.execute(f"INSERT INTO {schema}.{name} VALUES (1)")
                return result

            return pipe(op)

        told: list[IngestReport] = []
        with pytest.raises(asyncpg.UniqueViolationError):
            await ingest(engine, rows(30), tagging, size=10, workers=1, ledger=ledger, progress=told.append)
        assert await stored(engine) == list(range(10))
        assert (told[-1].finished, told[-1].skipped, told[-1].chunks) == (False, 0, 1)

    async def test_a_row_that_is_there_is_found_though_the_error_names_no_table(self, engine: Engine) -> None:
        """As Citus words a unique violation of another node."""
        await engine.run(LEDGER.install)
        await engine.execute(NAMELESS)
        both_know_nothing = 0
        ready = anyio.Event()

        async def source() -> AsyncIterator[Row]:
            nonlocal both_know_nothing
            both_know_nothing += 1
            if both_know_nothing == 2:
                ready.set()
            await ready.wait()
            for row in rows(50):
                yield row

        reports: list[IngestReport] = []
        async with anyio.create_task_group() as group:

            async def run() -> None:
                reports.append(await ingest(engine, source(), copying(), **TOLD))

            group.start_soon(run)
            group.start_soon(run)
        assert await stored(engine) == list(range(50))
        assert sum(report.chunks for report in reports) == sum(report.skipped for report in reports) == 5


NAMELESS = """
CREATE OR REPLACE FUNCTION nameless() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
    PERFORM pg_advisory_xact_lock(NEW.chunk + 1000);
    IF EXISTS (SELECT FROM dbop_raw_ledger WHERE name = NEW.name AND chunk = NEW.chunk) THEN
        RAISE unique_violation USING MESSAGE = 'duplicate key';
    END IF;
    RETURN NEW;
END$$;
CREATE TRIGGER nameless BEFORE INSERT ON dbop_raw_ledger FOR EACH ROW EXECUTE FUNCTION nameless();
"""


class Stopped(Exception):
    """Of the test."""


@pytest.mark.usefixtures("unheard")
@pytest.mark.parametrize("seed", range(12))
async def test_whatever_stops_it_and_however_it_grows_each_item_is_in_once(engine: Engine, seed: int) -> None:
    """Stops at random: of the source, of a chunk, by a cancellation; with other workers, and more items."""
    rng = random.Random(seed)
    count, bad = 0, {n for n in range(200) if rng.random() < 0.1}
    size, kept = rng.choice([1, 3, 10]), Kept()

    def source(until: int) -> Iterator[Row]:
        yield from rows(until, bad=bad)
        if until < count:
            raise Stopped

    for _ in range(8):
        count += rng.choice([0, 1, rng.randrange(30)])
        write, unlucky = copying(), rng.randrange(200)

        def failing(items: Any, write: Any = write, unlucky: int = unlucky) -> Operation[Any]:
            async def op(conn: Any) -> Any:
                await asyncio.sleep(rng.random() / 500)
                result = await write(items)(conn)
                if any(item[0] == unlucky for item in items):
                    raise Stopped
                return result

            return pipe(op)

        until = rng.choice([count, rng.randrange(count + 1)])
        with contextlib.suppress(Stopped):
            with anyio.move_on_after(rng.choice([60, rng.random() / 20])):
                await ingest(
                    engine, source(until), failing, size=size, workers=rng.randint(1, 4), ledger=LEDGER,
                    rejects=kept,
                )  # fmt: skip
    report = await ingest(engine, rows(count, bad=bad), copying(), size=size, ledger=LEDGER, rejects=kept)
    assert report.read == count
    assert await stored(engine) == [n for n in range(count) if n not in bad]
    assert set(kept.indexes) == {n for n in range(count) if n in bad}
    totals = (
        "SELECT coalesce(sum(items), 0), coalesce(sum(written), 0), coalesce(sum(rejected), 0) "
        "FROM dbop_raw_ledger"
    )
    rejected = len(set(kept.indexes))
    assert tuple(await engine.fetchrow(totals) or ()) == (count, count - rejected, rejected)
