"""A workload of the user's own: a file of SQL, or an operation in a Python module."""

from __future__ import annotations

import sys
import types
from random import Random

import pytest

from dbop_raw import operation
from dbop_raw.driver.connection import Connection
from dbop_raw.sizing.options import BadOption
from dbop_raw.sizing.workloads import find_workload, parse_script


def test_a_script_takes_pgbench_variables() -> None:
    script = parse_script(
        "\\set id random(1, 5)\n\\set n random(-3, -3)\nSELECT :n::int, :id, ':id'::text;\n"
    )
    assert script.variables == (("id", 1, 5), ("n", -3, -3))
    values = script.draw(Random(1))
    assert 1 <= values["id"] <= 5
    assert script.literal({"id": 2, "n": -3}).startswith("SELECT (-3)::int, 2")
    text, used = script.prepared()
    assert used == ("id", "n")
    assert text.startswith("SELECT $2::bigint::int, $1::bigint")


def test_a_variable_that_is_not_used_is_no_parameter() -> None:
    text, used = parse_script("\\set a random(1, 2)\n\\set b random(1, 2)\nSELECT :b").prepared()
    assert (text, used) == ("SELECT $1::bigint", ("b",))


@pytest.mark.parametrize(
    "text", ["", "-- nothing\n;", "\\sleep 1\nSELECT 1", "\\set a random(2, 1)\nSELECT 1"]
)
def test_a_script_that_cannot_be_run_is_refused(text: str) -> None:
    with pytest.raises(BadOption):
        parse_script(text)


@operation
async def ping(conn: Connection) -> object:
    return await conn.fetchval("SELECT 1")


@operation
async def add(conn: Connection, one: int, other: int) -> object:
    return await conn.fetchval("SELECT $1 + $2", one, other)


async def plain(conn: Connection) -> object:
    return await conn.fetchval("SELECT 1")


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("dbop_raw_own_workload")
    vars(module).update(
        ping=ping,
        made=ping(),
        plain=plain,
        add=add,
        drawn=lambda rng: add(rng.random(), 1),
        number=5,
        broken=object,
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


@pytest.mark.parametrize("name", ["ping", "made", "plain", "drawn"])
def test_an_operation_of_ones_own_is_a_workload(own_module: str, name: str) -> None:
    request = find_workload(f"{own_module}:{name}").make(Random(1))
    assert request.transaction
    assert callable(request.operation)


@pytest.mark.parametrize("name", ["add", "number", "missing"])
def test_what_is_no_operation_is_refused(own_module: str, name: str) -> None:
    with pytest.raises(BadOption, match=name):
        find_workload(f"{own_module}:{name}")


def test_what_makes_no_operation_is_refused(own_module: str) -> None:
    with pytest.raises(BadOption, match="not an operation"):
        find_workload(f"{own_module}:broken").make(Random(1))


@pytest.mark.parametrize("name", ["nonsense", "missing/own.sql", "no_such_module_here:name", ":", "x:"])
def test_a_workload_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(BadOption, match="--workload"):
        find_workload(name)
