"""`python -m bench cost` in tiny sizes: its report is whole. Nothing is timed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.cost import command
from bench.cost.layers import measure_layers
from bench.cost.profiles import profiles
from bench.cost.wire import measure_wire
from bench.place import database
from bench.quick import RUNS, faults_of_cost
from dbop_raw.testing import FaultProxy

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def dsn() -> Iterator[str]:
    with database(None, "bench_cost") as made:
        yield made


async def test_the_report_is_whole(dsn: str, tmp_path: Path) -> None:
    report = await command.measure(dsn, command.QUICK, quick=True)
    paths = report.write(tmp_path)
    assert {path.name for path in paths} == {"cost.md", "cost.json", "cost-profile.txt"}
    found = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))
    assert list(faults_of_cost(found)) == []
    text = (tmp_path / "cost.md").read_text(encoding="utf-8")
    assert "these figures mean nothing" in text
    assert dsn.rpartition("@")[2] not in text


async def test_no_layer_keeps_what_a_call_allocates() -> None:
    layers, depths = await measure_layers(rounds=1, calls=300)
    # A timer that was cancelled stays with the event loop until its time has come: a few blocks each.
    assert {layer.name: layer.kept for layer in layers + depths if layer.kept > 12} == {}


async def test_the_round_trips_in_the_table_are_those_on_the_wire(dsn: str) -> None:
    host, _, port = dsn.rpartition("@")[2].partition("/")[0].partition(":")
    async with FaultProxy(host, int(port)) as proxy:
        ways = await measure_wire(proxy.dsn(dsn), rounds=1, calls=2)
        declared = sum(way.trips for way in ways) * 7
        # Besides those of the calls: making the table, preparing the statement, counting its rows.
        assert declared <= proxy.round_trips <= declared + 12


async def test_the_profile_names_functions_and_no_folder_of_this_machine() -> None:
    text = await profiles(20)
    assert "dbop_raw/engine/engine.py" in text
    assert re.search(r"(?<![\w./])/\w+/", text) is None


def test_quick_runs_every_benchmark() -> None:
    assert [run.name for run in RUNS] == ["foundation", "pool", "peers", "cost"]
