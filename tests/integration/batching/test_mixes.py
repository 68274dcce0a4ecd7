"""Batches of mixed errors against a real server: the table and `failed` are what a plain loop would give.

The plain loop is a model in Python: one row after another, every constraint checked at once, a bad row left
out.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import Batch, BatchResult, Engine, pipe, retry
from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql
from tests.support.batching import QUICK, ROW_WRITERS, WRITERS, as_items, make_batch, told

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

COLUMNS = ("id", "code", "n", "parent", "later", "tag", "body")
SCHEMA = (
    "CREATE TABLE parent (id int PRIMARY KEY)",
    "INSERT INTO parent SELECT generate_series(0, 9)",
    """
    CREATE TABLE item (
        id bigint PRIMARY KEY,
        code text UNIQUE,
        n int CHECK (n >= 0),
        parent int REFERENCES parent,
        later int REFERENCES parent DEFERRABLE INITIALLY DEFERRED,
        tag text UNIQUE DEFERRABLE INITIALLY DEFERRED,
        body text NOT NULL
    )
    """,
)
ROLE = "dbop_raw_test_no_temp"

Row = tuple[Any, ...]


def item_batch(writer: str) -> Batch[Any, Any]:
    return make_batch(writer, "item", COLUMNS)


# ----------------------------------------------------------------------------------------------- the model


# What is wrong with a row, and what it gives: an SQLSTATE, or the name of the client's exception. Which of
# the two depends on who reads the value: the driver (a parameter, a binary COPY) or the server (text COPY).
FAULTS: dict[str, dict[str, str]] = {
    "not null": dict.fromkeys(WRITERS, "23502"),
    "check": dict.fromkeys(WRITERS, "23514"),
    "unique": dict.fromkeys(WRITERS, "23505"),
    "foreign key": dict.fromkeys(WRITERS, "23503"),
    "deferred unique": dict.fromkeys(WRITERS, "23505"),
    "deferred foreign key": dict.fromkeys(WRITERS, "23503"),
    "nul": dict.fromkeys(WRITERS, "22021"),
    "surrogate": {
        "each": "22000",
        "execute_many": "22000",
        "copy_into": "UnicodeEncodeError",
        "copy_text": "UnicodeEncodeError",
    },
    "type": {"each": "22000", "execute_many": "22000", "copy_into": "TypeError", "copy_text": "22P02"},
    "overflow": {
        "each": "22000",
        "execute_many": "22000",
        "copy_into": "OverflowError",
        "copy_text": "22003",
    },
}


@dataclass
class Case:
    items: list[Row]
    rows: list[Row]
    failed: list[tuple[int, str]]


def make_case(writer: str, size: int, share: float, seed: int) -> Case:
    """Random rows, and what a plain loop makes of them."""
    chance = random.Random(f"{writer} {size} {share} {seed}")
    kinds = [chance.choice(list(FAULTS)) if chance.random() < share else "fine" for _ in range(size)]
    if share and size and not any(kind != "fine" for kind in kinds):
        kinds[chance.randrange(size)] = chance.choice(list(FAULTS))
    items: list[Row] = []
    case = Case([], [], [])
    codes: set[str] = set()
    tags: set[str] = set()
    for index, kind in enumerate(kinds):
        row: dict[str, Any] = {
            "id": index,
            "code": f"code {index}",
            "n": chance.randrange(100),
            "parent": chance.choice([None, *range(10)]),
            "later": chance.choice([None, *range(10)]),
            "tag": f"tag {index}",
            "body": chance.choice(["", "x", "ä€𝄞", "tab\tnew\nline\rback\\slash \\N \\.", "'\"$$"]),
        }
        fault = _spoil(row, kind, items, chance)
        items.append(tuple(row[name] for name in COLUMNS))
        if row["code"] in codes or row["tag"] in tags:
            fault = "unique"
        elif fault in {"unique", "deferred unique"}:
            fault = None  # the one that it repeats was not written either
        if fault is None:
            case.rows.append(items[-1])
            codes.add(row["code"])
            tags.add(row["tag"])
        else:
            case.failed.append((index, FAULTS[fault][writer]))
    case.items = as_items(writer, items)
    return case


def _spoil(row: dict[str, Any], kind: str, before: Sequence[Row], chance: random.Random) -> str | None:
    """Make the row wrong in one way; gives the way."""
    if kind in {"unique", "deferred unique"}:
        if not before:
            return None
        name = "code" if kind == "unique" else "tag"
        row[name] = chance.choice(before)[COLUMNS.index(name)]
        return kind
    changes: dict[str, tuple[str, Any]] = {
        "not null": ("body", None),
        "check": ("n", -1),
        "foreign key": ("parent", 99),
        "deferred foreign key": ("later", 99),
        "nul": ("body", "a\0b"),
        "surrogate": ("body", "a\ud800b"),
        "type": ("n", "many"),
        "overflow": ("n", 2**40),
    }
    if kind not in changes:
        return None
    name, value = changes[kind]
    row[name] = value
    return kind


# ------------------------------------------------------------------------------------------- the databases


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    for statement in SCHEMA:
        run_sql(dsn, statement)
    yield dsn
    postgres_server.drop_database(dsn)


@pytest.fixture(scope="module")
def without_temp(database: str) -> Iterator[str]:
    """A role that may write the tables, and may not make anything in pg_temp."""
    name = database.rpartition("/")[2]
    for statement in (
        f"DROP ROLE IF EXISTS {ROLE}",
        f"CREATE ROLE {ROLE}",
        f'REVOKE TEMP ON DATABASE "{name}" FROM PUBLIC',
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {ROLE}",
    ):
        run_sql(database, statement)
    yield ROLE
    run_sql(database, f"DROP OWNED BY {ROLE}")
    run_sql(database, f"DROP ROLE {ROLE}")


@pytest.fixture
async def engine(database: str) -> AsyncIterator[Engine]:
    async with Engine.open(database, min_size=0, max_size=2) as engine:
        await engine.execute("TRUNCATE item")
        yield engine


@pytest.fixture
async def engine_without_temp(database: str, without_temp: str) -> AsyncIterator[Engine]:
    settings = {"role": without_temp}
    async with Engine.open(database, min_size=0, max_size=2, server_settings=settings) as engine:
        yield engine


async def check(engine: Engine, case: Case, result: BatchResult[Any, Any], writer: str) -> None:
    """Everything that a batch promises of its result."""
    assert told(result) == case.failed
    assert result.total == len(case.items) == result.written + len(result.failed)
    assert all(failed.item is case.items[failed.index] for failed in result.failed)
    rows = [tuple(row) for row in await engine.fetch(f"SELECT {', '.join(COLUMNS)} FROM item ORDER BY id")]
    assert rows == case.rows
    if writer == "each":
        lost = {index for index, _ in case.failed}
        assert result.results == tuple(None if n in lost else n for n in range(len(case.items)))
    else:
        assert result.results == ()


async def check_thrice(owner: Engine, engine: Engine, case: Case, writer: str) -> None:
    """Cold, then with what the first time taught, then inside a retry."""
    write = item_batch(writer)
    for op in (write(case.items), write(case.items), pipe(write(case.items), retry(QUICK))):
        await owner.execute("TRUNCATE item")
        await check(engine, case, await engine.run(op), writer)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.4], ids=["clean", "sparse", "dense"])
@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 65])
@pytest.mark.parametrize("writer", WRITERS)
async def test_a_small_mix_ends_as_a_plain_loop_would(
    engine: Engine, writer: str, size: int, share: float, seed: int
) -> None:
    await check_thrice(engine, engine, make_case(writer, size, share, seed), writer)


@pytest.mark.parametrize("share", [0.01, 0.3], ids=["sparse", "dense"])
@pytest.mark.parametrize("writer", WRITERS)
async def test_a_mix_of_1000_ends_as_a_plain_loop_would(engine: Engine, writer: str, share: float) -> None:
    await check_thrice(engine, engine, make_case(writer, 1000, share, 3), writer)


@pytest.mark.parametrize("share", [0.001, 0.1], ids=["sparse", "dense"])
@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_a_mix_of_10_000_ends_as_a_plain_loop_would(engine: Engine, writer: str, share: float) -> None:
    case = make_case(writer, 10_000, share, 4)
    await check(engine, case, await engine.run(item_batch(writer)(case.items)), writer)


@pytest.mark.parametrize("share", [0.02, 0.4], ids=["sparse", "dense"])
@pytest.mark.parametrize("size", [65, 400])
@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_a_mix_written_without_the_temp_privilege_ends_the_same(
    engine: Engine, engine_without_temp: Engine, writer: str, size: int, share: float
) -> None:
    """The server can't try row by row there: the search falls back to spans."""
    await check_thrice(engine, engine_without_temp, make_case(writer, size, share, 5), writer)


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_mix_inside_a_transaction_of_others_ends_the_same(engine: Engine, writer: str) -> None:
    """Deferred constraints can't wait for COMMIT there: more SQL follows."""
    case = make_case(writer, 300, 0.1, 6)
    write = item_batch(writer)
    async with engine.transaction() as conn:
        await conn.execute("INSERT INTO parent VALUES (1000)")
        result = await write(case.items)(conn)
        await conn.execute("DELETE FROM parent WHERE id = 1000")
    await check(engine, case, result, writer)


@pytest.mark.parametrize("writer", WRITERS)
async def test_two_batches_at_once_do_not_disturb_each_other(engine: Engine, writer: str) -> None:
    """One batch object, two connections: what it learned is shared, what it writes is not."""
    case = make_case(writer, 400, 0.1, 7)
    other = [_moved(row, writer) for row in case.items]
    write = item_batch(writer)
    results: dict[str, BatchResult[Any, Any]] = {}

    async def run(name: str, items: Sequence[Row]) -> None:
        results[name] = await engine.run(write(items))

    async with anyio.create_task_group() as group:
        group.start_soon(run, "first", case.items)
        group.start_soon(run, "second", other)
    assert told(results["first"]) == told(results["second"]) == case.failed
    assert await engine.fetchval("SELECT count(*) FROM item") == 2 * len(case.rows)


def _moved(row: Row, writer: str) -> Row:
    """The same row, somewhere else."""
    number = int(row[0]) + 1_000_000
    moved = {"id": str(number) if writer == "copy_text" else number}
    values = dict(zip(COLUMNS, row, strict=True)) | moved
    values["code"], values["tag"] = f"other {row[1]}", f"other {row[5]}"
    return tuple(values[name] for name in COLUMNS)


@pytest.mark.parametrize("writer", WRITERS)
def test_the_model_meets_every_kind_of_fault(writer: str) -> None:
    case = make_case(writer, 1000, 0.3, 3)
    assert {code for _, code in case.failed} >= {kind[writer] for kind in FAULTS.values()}
    assert 0 < len(case.rows) < 1000


def test_asyncpg_still_raises_its_data_error_on_the_client() -> None:
    """The codes above rest on it: the client's has no SQLSTATE of a server, and we give it the class's."""
    assert not issubclass(asyncpg.exceptions._base.DataError, asyncpg.PostgresError)
