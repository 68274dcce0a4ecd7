"""`ingest` against a real server: each item of a source is written once or rejected once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from decimal import Decimal
from typing import Any

import anyio
import pytest

from dbop_raw import (
    Engine,
    Event,
    IngestReport,
    Ledger,
    PolicyError,
    batch,
    copy_into,
    copy_text,
    each,
    execute_many,
    ingest,
    operation,
)
from dbop_raw.events import ChunkFinished, IngestFinished
from tests.support.ingesting import Kept, Row, add_item, as_stream, copying, engine_on, rows, stored

pytestmark = pytest.mark.anyio


class TestTheWholeSource:
    @pytest.mark.parametrize("workers", [1, 4])
    @pytest.mark.parametrize("size", [1, 7, 100, 1000])
    @pytest.mark.parametrize("kind", ["list", "generator", "async generator"])
    async def test_each_item_is_written_or_rejected(
        self, engine: Engine, kind: str, size: int, workers: int
    ) -> None:
        items = rows(150, bad=(0, 70, 71, 149))
        sources: dict[str, Callable[[], Any]] = {
            "list": lambda: items,
            "generator": lambda: iter(items),
            "async generator": lambda: as_stream(items),
        }
        kept = Kept()
        report = await ingest(engine, sources[kind](), copying(), size=size, workers=workers, rejects=kept)
        assert await stored(engine) == [n for n in range(150) if n not in {0, 70, 71, 149}]
        assert sorted(kept.indexes) == [0, 70, 71, 149]
        assert (report.read, report.written, report.rejected) == (150, 146, 4)
        assert report.by_sqlstate == {"23502": 4}
        assert report.chunks == -(-150 // size)
        assert report.finished
        assert (report.rolled_back, report.skipped, report.retries) == (0, 0, 0)

    @pytest.mark.parametrize("source", [[], iter(()), as_stream([])], ids=["list", "iterator", "async"])
    async def test_an_empty_source_is_done_at_once(self, engine: Engine, source: Any) -> None:
        report = await ingest(engine, source, copying())
        assert (report.read, report.chunks, report.finished) == (0, 0, True)
        assert engine.stats().acquires == engine.stats().in_use + 1  # the fixture's own

    @pytest.mark.parametrize("writer", ["each", "execute_many", "copy_text"])
    async def test_any_writer_does(self, engine: Engine, writer: str) -> None:
        writers: dict[str, Any] = {
            "each": each(add_item),
            "execute_many": execute_many("INSERT INTO item VALUES ($1, $2)"),
            "copy_text": copy_text("item", columns=("id", "body")),
        }
        items: list[Any] = rows(50, bad=(3,))
        if writer == "copy_text":
            items = [(str(number), body) for number, body in items]
        report = await ingest(engine, items, batch(writers[writer]), size=20)
        assert (report.written, report.rejected) == (49, 1)

    async def test_rejects_say_what_and_why(self, engine: Engine) -> None:
        kept = Kept()
        items: list[Any] = [(1, "x"), (1, "again"), ("text", "x"), (2, None)]
        report = await ingest(engine, items, copying(), size=2, workers=1, rejects=kept)
        assert [(r.index, r.item, r.sqlstate, r.condition, r.constraint) for r in kept.rejects] == [
            (1, items[1], "23505", "unique_violation", "item_pkey"),
            (2, items[2], None, "TypeError", None),
            (3, items[3], "23502", "not_null_violation", None),
        ]
        assert "duplicate key" in kept.rejects[0].message
        assert report.by_sqlstate == {"23505": 1, "TypeError": 1, "23502": 1}

    async def test_order_by_sorts_each_chunk_and_keeps_the_index_in_the_source(self, engine: Engine) -> None:
        seen: list[int] = []

        @operation
        async def note(conn: Any, row: Row) -> None:
            seen.append(row[0])
            await conn.execute("INSERT INTO item VALUES ($1, $2)", *row)

        items: list[Row] = [(5, "a"), (3, None), (4, "c"), (2, "d"), (1, None), (0, "f")]
        kept = Kept()
        await ingest(
            engine, items, batch(each(note)), size=3, workers=1, order_by=lambda row: row[0], rejects=kept
        )
        assert [n for n in dict.fromkeys(seen)] == [3, 4, 5, 0, 1, 2]  # noqa: C416
        assert kept.indexes == [1, 4]
        assert [reject.item for reject in kept.rejects] == [items[1], items[4]]

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            ([3, None, 1, None, 2], [1, 2, 3, None, None]),
            ([(2, None), (1, "b"), (None, "a"), (1, None)], [(1, "b"), (1, None), (2, None), (None, "a")]),
            ([2.5, Decimal(2), 3, True], [True, Decimal(2), 2.5, 3]),
            (["b", 2, None, "a", 1], [1, 2, "a", "b", None]),
        ],
        ids=["None", "tuples with None", "numbers", "texts and numbers"],
    )
    async def test_order_by_sorts_none_last_and_unlike_types_apart(
        self, engine: Engine, keys: list[Any], expected: list[Any]
    ) -> None:
        seen: list[Any] = []

        @operation
        async def note(conn: Any, item: tuple[int, Any]) -> None:
            await conn.execute("SELECT 1")
            seen.append(item[1])

        await ingest(engine, list(enumerate(keys)), batch(each(note)), order_by=lambda item: item[1])
        assert seen == expected

    async def test_keys_that_can_not_be_sorted_are_told_by_their_type(self, engine: Engine) -> None:
        with pytest.raises(TypeError, match=r"order_by gave keys that can't be sorted.*dict"):
            await ingest(engine, rows(3), copying(), order_by=lambda row: {"id": row[0]})
        assert await stored(engine) == []

    async def test_an_error_of_order_by_itself_is_raised_unchanged(self, engine: Engine) -> None:
        with pytest.raises(TypeError, match="NoneType"):
            await ingest(engine, rows(3, bad=(1,)), copying(), order_by=lambda row: len(row[1]))  # type: ignore[arg-type]

    async def test_upserts_of_several_workers_in_one_order_do_not_deadlock(self, engine: Engine) -> None:
        upsert = "INSERT INTO item VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET body = EXCLUDED.body"
        items = [(n * 37 % 50, f"{n}") for n in range(1000)]
        report = await ingest(
            engine, items, batch(execute_many(upsert)), size=50, workers=4, order_by=lambda row: row[0]
        )
        assert (report.written, report.retries) == (1000, 0)
        assert await stored(engine) == list(range(50))

    async def test_progress_is_told_after_each_chunk_and_at_the_end(self, engine: Engine) -> None:
        told: list[IngestReport] = []
        report = await ingest(engine, rows(50), copying(), size=10, workers=2, progress=told.append)
        assert [r.chunks for r in told] == [1, 2, 3, 4, 5, 5]
        assert [r.finished for r in told] == [False] * 5 + [True]
        assert told[-1].read == report.read == 50
        assert all(a.read <= b.read for a, b in itertools.pairwise(told))

    @pytest.mark.usefixtures("engine")
    async def test_an_observer_sees_chunks_and_the_end(self, database: str) -> None:
        events: list[Event] = []
        async with engine_on(database, observer=events.append) as watched:
            await ingest(watched, rows(25, bad=(3,)), copying(), size=10, workers=1)
        chunks = [e for e in events if isinstance(e, ChunkFinished)]
        assert [(e.chunk, e.read, e.written, e.rejected) for e in chunks] == [
            (0, 10, 9, 1), (1, 10, 10, 0), (2, 5, 5, 0),
        ]  # fmt: skip
        (end,) = [e for e in events if isinstance(e, IngestFinished)]
        assert (end.read, end.written, end.rejected, end.stopped) == (25, 24, 1, False)


class TestBackPressure:
    @pytest.mark.parametrize("asynchronous", [False, True])
    @pytest.mark.parametrize(("workers", "size"), [(1, 5), (3, 10)])
    async def test_the_source_is_never_read_further_than_the_workers_can_take(
        self, engine: Engine, workers: int, size: int, asynchronous: bool
    ) -> None:
        finished = 0
        ahead: list[int] = []

        def source() -> Iterator[Row]:
            for number, row in enumerate(rows(200), 1):
                ahead.append(number - finished)
                yield row

        def progress(report: IngestReport) -> None:
            nonlocal finished
            finished = report.read

        items: Any = as_stream(source()) if asynchronous else source()
        await ingest(engine, items, copying(), size=size, workers=workers, progress=progress)
        assert len(ahead) == 200
        assert max(ahead) <= (workers + 1) * size

    async def test_no_more_chunks_than_workers_are_in_flight(self, engine: Engine) -> None:
        running = most = 0

        @operation
        async def slow(conn: Any, row: Row) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await conn.execute("SELECT pg_sleep(0.002)")
            running -= 1
            await conn.execute("INSERT INTO item VALUES ($1, $2)", *row)

        await ingest(engine, rows(30), batch(each(slow)), size=2, workers=3)
        assert most == 3


class TestConnections:
    """Workers beyond the free connections wait for one, however long."""

    @pytest.mark.parametrize("ledger", [None, Ledger("x")], ids=["without", "with a ledger"])
    async def test_more_workers_than_connections_wait(
        self, engine: Engine, database: str, ledger: Ledger | None
    ) -> None:
        @operation
        async def slow(conn: Any, row: Row) -> None:
            await conn.execute("SELECT pg_sleep(0.02)")
            await conn.execute("INSERT INTO item VALUES ($1, $2)", *row)

        async with engine_on(database, max_size=1, acquire_timeout=0.02, max_waiting=0) as small:
            report = await ingest(small, rows(12), batch(each(slow)), size=3, workers=4, ledger=ledger)
            assert small.stats().acquire_timeouts == small.stats().shed == 0
        assert (report.chunks, report.written) == (4, 12)
        assert await stored(engine) == list(range(12))

    @pytest.mark.parametrize("ledger", [None, Ledger("x")], ids=["without", "with a ledger"])
    async def test_a_pool_that_others_have_taken_is_waited_for(
        self, engine: Engine, database: str, ledger: Ledger | None
    ) -> None:
        async with engine_on(database, max_size=1, acquire_timeout=0.02) as small:
            reports: list[IngestReport] = []

            async def run() -> None:
                reports.append(await ingest(small, rows(12), copying(), size=3, workers=2, ledger=ledger))

            async with anyio.create_task_group() as group, small.transaction():
                group.start_soon(run)
                while small.stats().waiting == 0:  # noqa: ASYNC110 - only the engine can tell
                    await asyncio.sleep(0)
                await asyncio.sleep(0.1)
            assert reports[0].written == 12
        assert await stored(engine) == list(range(12))

    async def test_a_wait_for_a_connection_can_be_cancelled(self, engine: Engine, database: str) -> None:
        async with engine_on(database, max_size=1) as small:
            async with small.transaction():
                with anyio.move_on_after(0.05) as scope:
                    await ingest(small, rows(12), copying(), size=3, workers=2)
            assert scope.cancelled_caught
            assert small.stats().waiting == small.stats().in_use == 0
        assert await stored(engine) == []


class TestLinger:
    async def test_a_chunk_that_is_not_full_goes_out_after_linger_seconds(self, engine: Engine) -> None:
        arrived = asyncio.Event()

        async def source() -> AsyncIterator[Row]:
            yield (1, "a")
            yield (2, "b")
            await arrived.wait()  # for as long as the first two are not in
            yield (3, "c")

        def progress(report: IngestReport) -> None:
            if report.read == 2:
                arrived.set()

        report = await ingest(
            engine, source(), copying(), size=100, workers=1, linger=0.01, progress=progress
        )
        assert (report.read, report.chunks) == (3, 2)
        assert await stored(engine) == [1, 2, 3]

    async def test_without_linger_a_chunk_waits_until_it_is_full(self, engine: Engine) -> None:
        report = await ingest(engine, as_stream(rows(25)), copying(), size=10, workers=1)
        assert report.chunks == 3

    async def test_a_full_chunk_does_not_wait_for_linger(self, engine: Engine) -> None:
        report = await ingest(engine, as_stream(rows(20)), copying(), size=10, workers=1, linger=60)
        assert report.chunks == 2


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"size": 0}, "size=0"),
            ({"size": True}, "size=True"),
            ({"size": 2.5}, "size=2.5"),
            ({"workers": 0}, "workers=0"),
            ({"workers": "4"}, "workers="),
            ({"skip_limit": -1}, "skip_limit=-1"),
            ({"linger": 0}, "linger=0"),
            ({"linger": -1}, "linger=-1"),
            ({"linger": 1, "ledger": Ledger("x")}, "linger and ledger"),
            ({"retry": 3}, "retry="),
        ],
        ids=str,
    )
    async def test_a_wrong_option_is_told_by_name_and_nothing_is_read(
        self, engine: Engine, options: dict[str, Any], match: str
    ) -> None:
        read = 0

        async def source() -> AsyncGenerator[Row, None]:
            nonlocal read
            read += 1
            yield (1, "x")

        stream = source()
        with pytest.raises(PolicyError, match=match):
            await ingest(engine, stream, copying(), **options)
        await stream.aclose()
        assert read == 0

    async def test_linger_needs_an_async_source(self, engine: Engine) -> None:
        with pytest.raises(PolicyError, match="async source"):
            await ingest(engine, rows(1), copying(), linger=1)

    @pytest.mark.parametrize("source", [None, 5, "text", b"bytes"], ids=repr)
    async def test_what_is_no_source_is_refused(self, engine: Engine, source: Any) -> None:
        with pytest.raises(PolicyError, match="the source is a"):
            await ingest(engine, source, copying())

    async def test_what_is_no_batch_is_refused(self, engine: Engine) -> None:
        wrong: Any = copy_into("item", columns=("id", "body"))
        with pytest.raises(PolicyError, match="can't be called"):
            await ingest(engine, rows(1), wrong)
