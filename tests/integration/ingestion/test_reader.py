"""The source: nothing that it gave is lost, its clean-up is awaited, and neither for ever."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

import anyio
import pytest

from dbop_raw import Engine, IngestReport, SkipLimitExceeded, batch, each, ingest, operation
from dbop_raw.ingestion.reader import Chunk, Reader
from tests.support.ingesting import Row, as_stream, copying, rows, stored

pytestmark = pytest.mark.anyio


def broken(count: int) -> Iterator[Row]:
    yield from rows(count)
    raise LookupError("no more")


class TestASourceThatRaises:
    @pytest.mark.parametrize("workers", [1, 3])
    @pytest.mark.parametrize(("asynchronous", "linger"), [(False, None), (True, None), (True, 5.0)])
    async def test_loses_nothing_that_it_gave_before(
        self, engine: Engine, workers: int, asynchronous: bool, linger: float | None
    ) -> None:
        source: Any = as_stream(broken(25)) if asynchronous else broken(25)
        told: list[IngestReport] = []
        with pytest.raises(LookupError, match="no more"):
            await ingest(
                engine, source, copying(), size=10, workers=workers, linger=linger, progress=told.append
            )
        assert await stored(engine) == list(range(25))
        assert (told[-1].chunks, told[-1].written, told[-1].rolled_back) == (3, 25, 0)
        assert not told[-1].finished

    @pytest.mark.parametrize("linger", [None, 5.0])
    async def test_an_async_source_that_raises_at_once_is_heard(
        self, engine: Engine, linger: float | None
    ) -> None:
        with pytest.raises(LookupError, match="no more"):
            await ingest(engine, as_stream(broken(0)), copying(), linger=linger)
        assert await stored(engine) == []

    async def test_chunks_in_flight_are_finished(self, engine: Engine) -> None:
        """They were given before: other workers are at them while the source raises."""
        raised = asyncio.Event()

        async def source() -> AsyncIterator[Row]:
            for row in rows(25):
                yield row
            raised.set()
            raise LookupError("no more")

        @operation
        async def patient(conn: Any, row: Row) -> None:
            await raised.wait()
            await conn.execute("SELECT pg_sleep(0.001)")
            await conn.execute("INSERT INTO item VALUES ($1, $2)", *row)

        with pytest.raises(LookupError, match="no more"):
            await ingest(engine, source(), batch(each(patient)), size=10, workers=3)
        assert await stored(engine) == list(range(25))

    async def test_its_error_came_first_and_is_raised_though_a_chunk_fails_after_it(
        self, engine: Engine
    ) -> None:
        bad = [(n, None) for n in range(3)]

        def source() -> Iterator[Row]:
            yield from bad
            raise LookupError("no more")

        with pytest.raises(LookupError, match="no more") as caught:
            await ingest(engine, source(), copying(), size=10, workers=2, skip_limit=1)
        assert await stored(engine) == []
        assert "SkipLimitExceeded" in "".join(caught.value.__notes__)


class TestCleanUp:
    @pytest.mark.parametrize("linger", [None, 5.0])
    @pytest.mark.parametrize("early", [False, True], ids=["at the end", "when stopped"])
    async def test_an_async_source_is_closed_when_ingest_returns(
        self, engine: Engine, linger: float | None, early: bool
    ) -> None:
        """By ingest: we keep the source alive, so no collector could have done it."""
        closed = 0

        async def source() -> AsyncIterator[Row]:
            nonlocal closed
            try:
                for row in rows(500, bad=(3,)):
                    yield row
            finally:
                await asyncio.sleep(0.01)
                closed += 1

        stream: Any = source()
        if early:
            with pytest.raises(SkipLimitExceeded):
                await ingest(engine, stream, copying(), size=10, workers=2, linger=linger, skip_limit=0)
        else:
            await ingest(engine, stream, copying(), size=100, workers=2, linger=linger)
        assert closed == 1
        assert stream.ag_frame is None

    async def test_a_generator_is_closed_too(self, engine: Engine) -> None:
        closed = 0

        def source() -> Iterator[Row]:
            nonlocal closed
            try:
                yield from rows(500, bad=(3,))
            finally:
                closed += 1

        stream = source()
        with pytest.raises(SkipLimitExceeded):
            await ingest(engine, stream, copying(), size=10, skip_limit=0)
        assert closed == 1

    async def test_an_iterator_that_is_no_generator_can_be_gone_on_with(self, engine: Engine) -> None:
        """Nobody asked to close a file, or a reader of one."""
        stream = iter(rows(500, bad=(3,)))
        with pytest.raises(SkipLimitExceeded):
            await ingest(engine, stream, copying(), size=10, workers=1, skip_limit=0)
        assert next(stream)[0] == 10

    async def test_awaits_in_the_clean_up_of_a_cancelled_source_are_waited_for(self, engine: Engine) -> None:
        steps: list[str] = []
        waiting = asyncio.Event()

        async def source() -> AsyncIterator[Row]:
            try:
                yield (1, "a")
                waiting.set()
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)
                steps.append("closed")

        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:

                async def cancel() -> None:
                    await waiting.wait()
                    scope.cancel()

                group.start_soon(cancel)
                await ingest(engine, source(), copying())
        assert scope.cancelled_caught
        assert steps == ["closed"]

    @pytest.mark.parametrize("stubborn", [False, True], ids=["slow", "deaf to cancellation"])
    async def test_a_clean_up_that_does_not_end_is_left_and_reported(
        self, unheard: list[dict[str, Any]], *, stubborn: bool
    ) -> None:
        """With fail_after as the guard: without a bound this would never come back."""
        let_go = asyncio.Event()
        ended = asyncio.Event()

        async def source() -> AsyncIterator[int]:
            try:
                while True:
                    yield 1
            finally:
                while stubborn and not let_go.is_set():
                    try:
                        await let_go.wait()
                    except asyncio.CancelledError:
                        continue
                await let_go.wait()
                ended.set()

        reader = Reader(source(), 3, None)
        try:
            with anyio.fail_after(30):
                assert await reader.next() == Chunk(0, range(3), [1, 1, 1])
                await reader.close(patience=0.02)
            assert not ended.is_set()
            assert len(unheard) == 1
            assert "the source's clean-up" in unheard[0]["message"]
        finally:
            let_go.set()
        if stubborn:
            await ended.wait()
        await asyncio.sleep(0)

    @pytest.mark.parametrize("linger", [None, 5.0])
    async def test_one_task_runs_the_source_from_its_first_item_to_its_clean_up(
        self, engine: Engine, linger: float | None
    ) -> None:
        """So it may hold a task group or a timeout open over its items, whatever worker asks for them."""
        tasks: set[Any] = set()

        async def source() -> AsyncIterator[Row]:
            async with anyio.create_task_group(), asyncio.timeout(60):
                for row in rows(200):
                    tasks.add(asyncio.current_task())
                    await asyncio.sleep(0)
                    yield row
            tasks.add(asyncio.current_task())

        report = await ingest(engine, source(), copying(), size=7, workers=4, linger=linger)
        assert report.written == 200
        assert len(tasks) == 1

    @pytest.mark.parametrize("asynchronous", [False, True])
    async def test_an_error_of_the_clean_up_does_not_hide_the_first_error(
        self, engine: Engine, unheard: list[dict[str, Any]], asynchronous: bool
    ) -> None:
        def plain() -> Generator[Row, None, None]:
            try:
                yield from rows(500, bad=(3,))
            finally:
                raise LookupError("of the clean-up")

        async def stream() -> AsyncIterator[Row]:
            with contextlib.closing(plain()) as items:
                for row in items:
                    yield row

        with pytest.raises(SkipLimitExceeded):
            await ingest(engine, stream() if asynchronous else plain(), copying(), size=10, skip_limit=0)
        assert [str(one["exception"]) for one in unheard] == ["of the clean-up"]

    async def test_a_source_that_something_else_cancels_does_not_pass_for_its_end(
        self, engine: Engine
    ) -> None:
        async def source() -> AsyncIterator[Row]:
            for row in rows(13):
                yield row
            inner: Any = asyncio.ensure_future(asyncio.sleep(60))
            asyncio.get_running_loop().call_soon(inner.cancel)
            await inner

        with pytest.raises(RuntimeError, match="the source was cancelled"):
            await ingest(engine, source(), copying(), size=10)
        assert await stored(engine) == list(range(13))
