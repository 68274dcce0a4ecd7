"""The rejects: nothing that was set aside is lost, whatever it is."""

from __future__ import annotations

import errno
import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dbop_raw import (
    Engine,
    Event,
    IngestReport,
    JsonlRejects,
    Ledger,
    PolicyError,
    Reject,
    batch,
    each,
    ingest,
    operation,
)
from tests.support.ingesting import Kept, Row, copying, engine_on, rows, stored

pytestmark = pytest.mark.anyio


def rejected(item: object) -> Reject:
    return Reject(index=0, item=item, sqlstate=None, condition="c", message="m")


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


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

    async def test_numbers_that_json_does_not_know_are_kept_as_postgres_writes_them(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "rejects.jsonl"
        item = (1, float("nan"), [float("inf"), -float("inf")], {"x": float("nan"), "y": 2.5})
        await JsonlRejects(path).write([rejected(item)])
        line = json.loads(path.read_text(), parse_constant=_refuse)
        assert line["item"] == [1, "NaN", ["Infinity", "-Infinity"], {"x": "NaN", "y": 2.5}]

    async def test_a_record_is_kept_by_its_columns(self, engine: Engine, tmp_path: Path) -> None:
        path = tmp_path / "rejects.jsonl"
        record = await engine.fetchrow("SELECT 1 AS id, 'x' AS body, 'NaN'::float8 AS size")
        await JsonlRejects(path).write([rejected(record)])
        assert json.loads(path.read_text())["item"] == {"id": 1, "body": "x", "size": "NaN"}

    @pytest.mark.parametrize("ledger", [None, Ledger("x")], ids=["without", "with a ledger"])
    async def test_what_can_not_be_printed_is_kept_by_its_type(
        self, engine: Engine, tmp_path: Path, ledger: Ledger | None
    ) -> None:
        """Its chunk is committed, or would be: too late to fail for the want of a text."""

        class Silent:
            def __repr__(self) -> str:
                raise ValueError("no words")

        class Endless:
            def __repr__(self) -> str:
                raise RecursionError("too deep")

        items: list[Any] = [*rows(3), (3, Silent()), (4, {Silent(): 1}), (5, Endless()), *rows(4, start=6)]
        path = tmp_path / "rejects.jsonl"
        report = await ingest(engine, items, copying(), rejects=JsonlRejects(path), ledger=ledger)
        assert (report.written, report.rejected) == (7, 3)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["index"] for line in lines] == [3, 4, 5]
        assert lines[0]["item"] == [3, "a Silent that can't be printed: ValueError"]
        assert lines[1]["item"] == "a tuple that can't be printed: ValueError"
        assert lines[2]["item"] == [5, "a Endless that can't be printed: RecursionError"]

    async def test_an_error_without_words_is_kept_too(self, engine: Engine) -> None:
        class Mute(Exception):
            def __str__(self) -> str:
                raise ValueError("no words")

        @operation
        async def fail(conn: Any, row: Row) -> None:
            await conn.execute("INSERT INTO item VALUES ($1, $2)", *row)
            if row[0] == 1:
                raise Mute

        kept = Kept()
        report = await ingest(engine, rows(3), batch(each(fail)), rejects=kept)
        assert (report.written, report.rejected) == (2, 1)
        assert kept.rejects[0].message == "a Mute that can't be printed: ValueError"

    async def test_a_full_disk_is_told_by_the_files_name_and_what_to_do(self, engine: Engine) -> None:
        told: list[IngestReport] = []
        with pytest.raises(OSError, match="make room") as raised:
            await ingest(
                engine,
                rows(30, bad=(12,)),
                copying(),
                size=10,
                workers=1,
                rejects=JsonlRejects("/dev/full"),
                progress=told.append,
            )
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, "/dev/full")
        assert "/dev/full" in str(raised.value)
        assert len(await stored(engine)) == told[-1].written == 19

    async def test_a_full_disk_under_a_ledger_rolls_the_chunk_back_and_costs_no_retry(
        self, engine: Engine, database: str
    ) -> None:
        """The error is the sink's: the connection is well, and another would not help."""
        events: list[Event] = []
        async with engine_on(database, observer=events.append) as watched:
            with pytest.raises(OSError, match="make room") as raised:
                await ingest(
                    watched,
                    rows(30, bad=(12,)),
                    copying(),
                    size=10,
                    workers=1,
                    rejects=JsonlRejects("/dev/full"),
                    ledger=Ledger("x"),
                )
            assert (watched.stats().retries, watched.stats().evicted) == (0, 0)
        assert isinstance(raised.value.__cause__, OSError), "what the write itself raised"
        assert await stored(engine) == list(range(10))

    async def test_a_file_that_can_not_be_opened_is_told_by_its_name(self, tmp_path: Path) -> None:
        path = tmp_path / "gone" / "rejects.jsonl"
        path.parent.mkdir()
        sink = JsonlRejects(path)
        path.parent.rmdir()
        with pytest.raises(FileNotFoundError) as raised:
            await sink.write([rejected((1,))])
        assert raised.value.filename == str(path)

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
