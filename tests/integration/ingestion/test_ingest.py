"""`ingest` against a real server: whatever stops it, the table, the rejects and the report agree."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    Engine,
    Event,
    IngestReport,
    JsonlRejects,
    Ledger,
    PolicyError,
    Reject,
    RetriesExhausted,
    RetryPolicy,
    SkipLimitExceeded,
    batch,
    copy_into,
    copy_text,
    each,
    execute_many,
    ingest,
    operation,
)
from dbop_raw.events import ChunkFinished, IngestFinished
from dbop_raw.ingestion.ledger import install
from dbop_raw.testing import Fault, FaultProxy, Server, query
from dbop_raw.testing.server import run_sql

pytestmark = pytest.mark.anyio

QUICK = RetryPolicy(attempts=3, first_delay=0.001, max_delay=0.001)
Row = tuple[int, str | None]


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    run_sql(dsn, "CREATE TABLE item (id int PRIMARY KEY, body text NOT NULL)")
    yield dsn
    postgres_server.drop_database(dsn)


@asynccontextmanager
async def engine_on(dsn: str, **options: Any) -> AsyncIterator[Engine]:
    async with Engine.open(dsn, min_size=0, max_size=5, **options) as engine:
        yield engine


@pytest.fixture
async def engine(database: str) -> AsyncIterator[Engine]:
    async with engine_on(database) as engine:
        await engine.execute("TRUNCATE item; DROP TABLE IF EXISTS dbop_raw_ledger")
        tasks = running()
        yield engine
        assert engine.stats().in_use == 0, "a connection was not given back"
        assert engine.stats().waiting == 0
        assert running() <= tasks, "a task was left running"


def running() -> set[asyncio.Task[Any]]:
    """The tasks that are neither of the test's own making, nor a connect of the engine's that nobody needed."""
    ours = ("TestRunner", "Capacity._ask")
    return {task for task in asyncio.all_tasks() if not any(one in repr(task.get_coro()) for one in ours)}


@operation
async def add_item(conn: Any, row: Row) -> None:
    await conn.execute("INSERT INTO item VALUES ($1, $2)", *row)


def copying() -> Any:
    return batch(copy_into("item", columns=("id", "body")))


def rows(count: int, bad: Iterable[int] = (), start: int = 0) -> list[Row]:
    broken = frozenset(bad)
    return [(n, None if n in broken else f"body {n}") for n in range(start, start + count)]


async def as_stream(items: Iterable[Row]) -> AsyncIterator[Row]:
    for item in items:
        await asyncio.sleep(0)
        yield item


async def stored(engine: Engine) -> list[int]:
    return [row["id"] for row in await engine.fetch("SELECT id FROM item ORDER BY id")]


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.rejects: list[Reject] = []

    async def write(self, rejects: Sequence[Reject]) -> None:
        self.rejects.extend(rejects)

    @property
    def indexes(self) -> list[int]:
        return [reject.index for reject in self.rejects]


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


class TestRejectsFile:
    async def test_its_lines_are_json_and_the_file_is_its_owners_alone(
        self, engine: Engine, tmp_path: Path
    ) -> None:
        path = tmp_path / "rejects.jsonl"
        items: list[Any] = [(n, None if n % 3 == 1 else f"körper\n{n}") for n in range(30)]
        items[0] = (0, "lone \ud800 surrogate")
        items[2] = (b"\x00\xff", {1, 2})
        await ingest(engine, items, copying(), size=7, workers=2, rejects=JsonlRejects(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        expected = sorted({0, 2, *range(1, 30, 3)})
        assert sorted(line["index"] for line in lines) == expected
        found = {line["index"]: line for line in lines}
        assert found[4]["item"] == [4, None]
        assert (found[4]["sqlstate"], found[4]["condition"]) == ("23502", "not_null_violation")
        assert found[0]["item"] == [0, "lone \ud800 surrogate"]
        assert found[2]["item"][0] == "\\x00ff"
        assert set(found[4]) == {"index", "item", "sqlstate", "condition", "message", "constraint"}

    @pytest.mark.parametrize("before", [b"", b'{"index": 0}\n', b'{"index": 0}\n{"index": 17, "it'])
    async def test_it_appends_also_after_a_line_that_was_cut_off(
        self, engine: Engine, tmp_path: Path, before: bytes
    ) -> None:
        path = tmp_path / "rejects.jsonl"
        path.write_bytes(before)
        await ingest(engine, rows(5, bad=(2, 3)), copying(), rejects=JsonlRejects(path, sync=True))
        content = path.read_bytes()
        assert content.startswith(before)
        added = content[len(before) :].decode().strip().splitlines()
        assert [json.loads(line)["index"] for line in added] == [2, 3]
        assert (content[len(before) :].startswith(b"\n")) == (before[-1:] not in {b"", b"\n"})

    async def test_an_item_that_json_has_no_form_for_is_kept_by_its_repr(self, tmp_path: Path) -> None:
        circle: list[Any] = []
        circle.append(circle)
        path = tmp_path / "rejects.jsonl"
        bad = [{("a", 1): "b"}, circle]
        rejects = [
            Reject(index=n, item=item, sqlstate=None, condition="c", message="m")
            for n, item in enumerate(bad)
        ]
        await JsonlRejects(path).write(rejects)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["item"] for line in lines] == [repr(item) for item in bad]

    def test_a_path_that_can_not_be_written_is_told_before_the_work(self, tmp_path: Path) -> None:
        with pytest.raises(PolicyError, match="is a folder"):
            JsonlRejects(tmp_path)
        with pytest.raises(PolicyError, match="no folder"):
            JsonlRejects(tmp_path / "nowhere" / "rejects.jsonl")

    async def test_a_sink_that_fails_stops_the_ingest_and_the_report_is_true(self, engine: Engine) -> None:
        class Full:
            async def write(self, rejects: Sequence[Reject]) -> None:  # noqa: ARG002
                raise OSError(28, "no space left")

        told: list[IngestReport] = []
        with pytest.raises(OSError, match="no space"):
            await ingest(
                engine,
                rows(30, bad=(12,)),
                copying(),
                size=10,
                workers=1,
                rejects=Full(),
                progress=told.append,
            )
        assert len(await stored(engine)) == told[-1].written == 19
        assert (told[-1].chunks, told[-1].rolled_back, told[-1].finished) == (2, 0, False)


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

    async def test_two_at_once_share_the_work(self, engine: Engine) -> None:
        """Two processes with one ledger: a chunk is written by one of them."""
        reports: list[IngestReport] = []

        async def run() -> None:
            reports.append(await ingest(engine, rows(100), copying(), size=10, workers=2, ledger=Ledger("x")))

        async with anyio.create_task_group() as group:
            group.start_soon(run)
            group.start_soon(run)
        assert await stored(engine) == list(range(100))
        assert sum(report.chunks for report in reports) == 10
        assert sum(report.skipped for report in reports) == 10

    async def test_several_at_once_may_make_the_table(self, engine: Engine) -> None:
        async def make() -> None:
            await engine.run(lambda conn: install(Ledger("x"), conn), autocommit=True)

        for _ in range(10):
            await engine.execute("DROP TABLE IF EXISTS dbop_raw_ledger")
            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(make)

    async def test_another_size_or_source_is_refused(self, engine: Engine) -> None:
        await ingest(engine, rows(25), copying(), size=10, ledger=Ledger("x"))
        with pytest.raises(PolicyError, match="size=10, and now size=20"):
            await ingest(engine, rows(25), copying(), size=20, ledger=Ledger("x"))
        with pytest.raises(PolicyError, match="not the same"):
            await ingest(engine, rows(29), copying(), size=10, ledger=Ledger("x"))
        assert await stored(engine) == list(range(25))

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
    def test_a_wrong_name_is_refused(self, options: dict[str, str]) -> None:
        with pytest.raises(PolicyError):
            Ledger(**options)


class TestWhatStopsIt:
    async def test_one_reject_above_the_skip_limit_stops_it(self, engine: Engine) -> None:
        told: list[IngestReport] = []
        with pytest.raises(SkipLimitExceeded) as raised:
            await ingest(
                engine,
                rows(50, bad=(5, 25, 26)),
                copying(),
                size=10,
                workers=1,
                skip_limit=2,
                progress=told.append,
            )
        assert raised.value.limit == 2
        assert await stored(engine) == [n for n in range(20) if n != 5]
        assert (told[-1].chunks, told[-1].rejected, told[-1].rolled_back) == (2, 1, 1)
        assert not told[-1].finished

    async def test_the_skip_limit_holds_for_all_workers_together(self, engine: Engine) -> None:
        """Chunks in flight at the same time count each other's rejects."""
        arrived = 0
        all_here = anyio.Event()

        @operation
        async def meet(conn: Any, row: Row) -> None:
            nonlocal arrived
            if row[0] % 10 == 9:
                arrived += 1
                if arrived == 4:
                    all_here.set()
                await all_here.wait()
            await conn.execute("INSERT INTO item VALUES ($1, $2)", *row)

        kept = Kept()
        with pytest.raises(SkipLimitExceeded):
            await ingest(
                engine,
                rows(40, bad=(0, 10, 20, 30)),
                batch(each(meet)),
                size=10,
                workers=4,
                skip_limit=2,
                rejects=kept,
            )
        assert len(kept.rejects) <= 2
        assert len(await stored(engine)) <= 2 * 9

    async def test_skip_limit_rejects_are_allowed(self, engine: Engine) -> None:
        report = await ingest(engine, rows(50, bad=(5, 25)), copying(), size=10, workers=3, skip_limit=2)
        assert (report.rejected, report.finished) == (2, True)

    @pytest.mark.parametrize(("asynchronous", "linger"), [(False, None), (True, None), (True, 5.0)])
    async def test_an_error_of_the_source_is_raised_unchanged(
        self, engine: Engine, asynchronous: bool, linger: float | None
    ) -> None:
        closed = False

        def broken() -> Iterator[Row]:
            yield from rows(25)
            raise LookupError("no more")

        async def stream() -> AsyncIterator[Row]:
            nonlocal closed
            try:
                for row in broken():
                    yield row
            finally:
                closed = True

        source: Any = stream() if asynchronous else broken()
        told: list[IngestReport] = []
        with pytest.raises(LookupError, match="no more"):
            await ingest(engine, source, copying(), size=10, workers=1, linger=linger, progress=told.append)
        assert await stored(engine) == list(range(20))
        assert (told[-1].chunks, told[-1].finished) == (2, False)
        assert closed == asynchronous

    async def test_a_wrong_table_stops_it_at_once(self, engine: Engine) -> None:
        read = 0

        def source() -> Iterator[Row]:
            nonlocal read
            for row in rows(1000):
                read += 1
                yield row

        with pytest.raises(asyncpg.UndefinedTableError):
            await ingest(
                engine, source(), batch(copy_into("nowhere", columns=("id", "body"))), size=10, workers=2
            )
        assert read <= 40

    async def test_a_lost_connection_is_survived(
        self, engine: Engine, postgres_server: Server, database: str
    ) -> None:
        async with (
            FaultProxy(postgres_server.host, postgres_server.port) as proxy,
            engine_on(proxy.dsn(database)) as distant,
        ):
            proxy.inject(Fault("reset", when=query("COPY"), side="after", times=2))
            report = await ingest(distant, rows(100), copying(), size=10, workers=2, retry=QUICK)
        assert await stored(engine) == list(range(100))
        assert report.retries >= 1
        assert report.finished

    async def test_retries_that_are_used_up_stop_it(
        self, postgres_server: Server, database: str, engine: Engine
    ) -> None:
        async with (
            FaultProxy(postgres_server.host, postgres_server.port) as proxy,
            engine_on(proxy.dsn(database)) as distant,
        ):
            proxy.inject(Fault("reset", when=query("COPY"), times=None))
            with pytest.raises(RetriesExhausted):
                await ingest(distant, rows(10), copying(), size=10, retry=QUICK)
        assert await stored(engine) == []


async def stopped(
    start: Callable[[], Awaitable[Any]], when: Callable[[], Awaitable[Any]], *, by_task: bool
) -> None:
    """Start the work, and cancel it when `when` is over: by a scope of anyio, or a task of asyncio."""
    if by_task:
        task = asyncio.ensure_future(start())
        await when()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()
        return
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:

            async def cancel() -> None:
                await when()
                scope.cancel()

            group.start_soon(cancel)
            await start()
    assert scope.cancelled_caught


@pytest.mark.parametrize("by_task", [False, True], ids=["scope", "task"])
class TestCancellation:
    async def test_chunks_in_flight_are_rolled_back_and_the_report_says_how_many(
        self, engine: Engine, by_task: bool
    ) -> None:
        reached = 0
        both = asyncio.Event()
        told: list[IngestReport] = []

        @operation
        async def hang(conn: Any, row: Row) -> None:
            nonlocal reached
            await conn.execute("INSERT INTO item VALUES ($1, $2)", *row)
            if row[0] >= 20:
                reached += 1
                if reached == 2:
                    both.set()
                await conn.execute("SELECT pg_sleep(60)")

        await stopped(
            lambda: ingest(engine, rows(100), batch(each(hang)), size=10, workers=2, progress=told.append),
            both.wait,
            by_task=by_task,
        )
        assert await stored(engine) == list(range(20))
        assert (told[-1].chunks, told[-1].rolled_back, told[-1].finished) == (2, 2, False)

    @pytest.mark.parametrize("side", ["before", "after"])
    async def test_a_commit_on_its_way_is_waited_for_and_counted(
        self, engine: Engine, postgres_server: Server, database: str, side: Any, by_task: bool
    ) -> None:
        """Its chunk is in, so the report and the rejects say so."""
        told: list[IngestReport] = []
        kept = Kept()
        async with (
            FaultProxy(postgres_server.host, postgres_server.port) as proxy,
            engine_on(proxy.dsn(database)) as distant,
        ):
            fault = proxy.inject(Fault("delay", when=query("COMMIT"), side=side, seconds=0.2))
            await stopped(
                lambda: ingest(
                    distant,
                    rows(100, bad=(3,)),
                    copying(),
                    size=10,
                    workers=1,
                    rejects=kept,
                    progress=told.append,
                ),
                fault.wait,
                by_task=by_task,
            )
            assert distant.stats().in_use == 0
        assert await stored(engine) == [n for n in range(10) if n != 3]
        assert (told[-1].chunks, told[-1].written, told[-1].rejected) == (1, 9, 1)
        assert (told[-1].rolled_back, told[-1].finished) == (0, False)
        assert kept.indexes == [3]

    async def test_while_the_source_is_waited_for(self, engine: Engine, by_task: bool) -> None:
        waiting = asyncio.Event()
        closed = False

        async def source() -> AsyncIterator[Row]:
            nonlocal closed
            try:
                for row in rows(10):
                    yield row
                waiting.set()
                await asyncio.sleep(60)
            finally:
                closed = True

        for linger in (None, 60.0):
            waiting.clear()
            told: list[IngestReport] = []
            await engine.execute("TRUNCATE item")
            await stopped(
                lambda linger=linger, told=told: ingest(  # type: ignore[misc]
                    engine, source(), copying(), size=10, workers=3, linger=linger, progress=told.append
                ),
                waiting.wait,
                by_task=by_task,
            )
            assert closed
            assert await stored(engine) in ([], list(range(10)))
            assert told[-1].chunks * 10 == len(await stored(engine))
            assert not told[-1].finished


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
