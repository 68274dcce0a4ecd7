"""The ledger: run again, nothing is written twice and nothing is lost; another job is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from dbop_raw import (
    Engine,
    IngestReport,
    JsonlRejects,
    Ledger,
    PolicyError,
    ingest,
)
from dbop_raw.ingestion.ledger import install
from dbop_raw.testing import Fault, FaultProxy, Server, query
from tests.support.ingesting import Kept, Row, copying, engine_on, rows, stored

pytestmark = pytest.mark.anyio


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
