"""The rejects: nothing that was set aside is lost, whatever it is."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dbop_raw import (
    Engine,
    IngestReport,
    JsonlRejects,
    PolicyError,
    Reject,
    ingest,
)
from tests.support.ingesting import copying, rows, stored

pytestmark = pytest.mark.anyio


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
