"""Whatever stops an ingest, the table, the rejects and the report agree."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    Engine,
    IngestReport,
    Reject,
    RetriesExhausted,
    RetryPolicy,
    SkipLimitExceeded,
    batch,
    copy_into,
    each,
    ingest,
    operation,
)
from dbop_raw.testing import Fault, FaultProxy, Server, query
from tests.support.ingesting import Kept, Row, copying, engine_on, rows, stored

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

QUICK = RetryPolicy(attempts=3, first_delay=0.001, max_delay=0.001)


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


class Broken:
    """A sink or a progress that fails."""

    def __init__(self, *, after: int = 0) -> None:
        self.after = after
        self.told: list[IngestReport] = []

    async def write(self, rejects: Sequence[Reject]) -> None:  # noqa: ARG002
        raise LookupError("of the sink")

    def progress(self, report: IngestReport) -> None:
        self.told.append(report)
        if len(self.told) > self.after:
            raise LookupError("of progress")


class TestAnErrorOfACallbackNeverHidesTheFirst:
    async def test_of_progress_at_the_end_after_a_chunk_failed(
        self, engine: Engine, unheard: list[dict[str, Any]]
    ) -> None:
        with pytest.raises(SkipLimitExceeded):
            await ingest(
                engine, rows(10, bad=(3,)), copying(), size=10, skip_limit=0, progress=Broken().progress
            )
        assert [str(one["exception"]) for one in unheard] == ["of progress"]

    async def test_of_progress_after_a_chunk_stops_it_and_is_raised(
        self, engine: Engine, unheard: list[dict[str, Any]]
    ) -> None:
        broken = Broken(after=1)
        with pytest.raises(LookupError, match="of progress"):
            await ingest(engine, rows(50), copying(), size=10, workers=1, progress=broken.progress)
        assert await stored(engine) == list(range(20))
        assert [(r.chunks, r.rolled_back) for r in broken.told] == [(1, 0), (2, 0), (2, 0)]
        assert len(unheard) == 1, "it raised once more, at the end"

    async def test_of_progress_at_the_end_of_all_is_raised(self, engine: Engine) -> None:
        with pytest.raises(LookupError, match="of progress"):
            await ingest(engine, rows(20), copying(), size=10, workers=1, progress=Broken(after=2).progress)
        assert await stored(engine) == list(range(20))

    @pytest.mark.parametrize("by_task", [False, True], ids=["scope", "task"])
    async def test_of_progress_does_not_swallow_a_cancellation(
        self, engine: Engine, by_task: bool, unheard: list[dict[str, Any]]
    ) -> None:
        waiting = asyncio.Event()

        async def source() -> AsyncIterator[Row]:
            yield (1, "a")
            waiting.set()
            await asyncio.sleep(60)

        await stopped(
            lambda: ingest(engine, source(), copying(), progress=Broken().progress),
            waiting.wait,
            by_task=by_task,
        )
        assert [str(one["exception"]) for one in unheard] == ["of progress"]

    @pytest.mark.parametrize("by_task", [False, True], ids=["scope", "task"])
    @pytest.mark.parametrize("which", ["rejects", "progress"])
    async def test_of_either_when_a_cancelled_chunk_is_committed_all_the_same(
        self,
        engine: Engine,
        postgres_server: Server,
        database: str,
        by_task: bool,
        which: str,
        unheard: list[dict[str, Any]],
    ) -> None:
        broken = Broken()
        options: dict[str, Any] = {which: broken if which == "rejects" else broken.progress}
        async with (
            FaultProxy(postgres_server.host, postgres_server.port) as proxy,
            engine_on(proxy.dsn(database)) as distant,
        ):
            fault = proxy.inject(Fault("delay", when=query("COMMIT"), side="before", seconds=0.2))
            await stopped(
                lambda: ingest(distant, rows(10, bad=(3,)), copying(), **options), fault.wait, by_task=by_task
            )
        assert len(await stored(engine)) == 9
        assert {str(one["exception"]) for one in unheard} == {f"of {which.replace('rejects', 'the sink')}"}
