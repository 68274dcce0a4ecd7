"""A table that refers to itself: a row is refused only where its parent is not there at the end.

The outcome is one by one, in order; but where order helps nobody (a row that refers to a later one), the
most rows that can be written are. The model: a row is written if it is good itself, and its parent is in the
table or is written.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest

from dbop_raw import Batch, BatchResult, Engine, SkipLimitExceeded, batch, copy_into, copy_text
from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql
from tests.support.batching import COPY_WRITERS, WRITERS, as_items, make_batch, told

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

COLUMNS = ("id", "parent", "land")
Row = tuple[int, int | None, int]


def tree_batch(writer: str, **options: Any) -> Batch[Any, Any]:
    return make_batch(writer, "tree", COLUMNS, **options)


def shuffled_tree(size: int, seed: int) -> list[Row]:
    """Row 0 is the root; each other has an earlier one for its parent; then all are shuffled."""
    chance = random.Random(seed)
    rows: list[Row] = [(0, None, 0), *((n, chance.randrange(n), 0) for n in range(1, size))]
    chance.shuffle(rows)
    return rows


def outcome(
    rows: Sequence[Row], there: Sequence[int] = (), lands: Sequence[int] = (0,)
) -> list[tuple[int, str]]:
    """Who must fail, where ids are not twice."""
    able = {row[0]: row for row in rows if row[2] in lands}
    written = set(there)
    grew = True
    while grew:
        more = {
            n for n, row in able.items() if n not in written and (row[1] is None or row[1] in written | {n})
        }
        written |= more
        grew = bool(more)
    return [(index, "23503") for index, row in enumerate(rows) if row[0] not in written]


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    run_sql(dsn, "CREATE TABLE land (id int PRIMARY KEY)")
    run_sql(
        dsn, "CREATE TABLE tree (id int PRIMARY KEY, parent int REFERENCES tree, land int REFERENCES land)"
    )
    run_sql(
        dsn,
        "CREATE TABLE wood (id int PRIMARY KEY, parent int REFERENCES wood, land int NOT NULL) "
        "PARTITION BY RANGE (id)",
    )
    run_sql(dsn, "CREATE TABLE wood_0 PARTITION OF wood FOR VALUES FROM (0) TO (1000)")
    run_sql(dsn, "CREATE TABLE wood_1 PARTITION OF wood FOR VALUES FROM (1000) TO (2000)")
    yield dsn
    postgres_server.drop_database(dsn)


@pytest.fixture
async def engine(database: str) -> AsyncIterator[Engine]:
    async with Engine.open(database, min_size=0, max_size=1) as engine:
        await engine.execute("TRUNCATE tree, land, wood; INSERT INTO land VALUES (0)")
        yield engine


async def stored(engine: Engine) -> list[int]:
    return [row["id"] for row in await engine.fetch("SELECT id FROM tree ORDER BY id")]


async def check(
    engine: Engine, rows: Sequence[Row], result: BatchResult[Any, Any], expected: list[Any]
) -> None:
    lost = {rows[index][0] for index, _ in expected}
    assert told(result) == expected
    assert await stored(engine) == sorted({row[0] for row in rows} - lost)
    assert result.written == len(rows) - len(expected)


# -------------------------------------------------------------------------------------------- a shuffled tree


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_shuffled_tree_is_written_whole(engine: Engine, writer: str) -> None:
    rows = shuffled_tree(200, 1)
    result = await engine.run(tree_batch(writer)(as_items(writer, rows)))
    await check(engine, rows, result, [])
    if writer == "each":
        assert list(result.results) == [row[0] for row in rows]


@pytest.mark.parametrize("writer", WRITERS)
async def test_one_bad_leaf_of_a_shuffled_tree_costs_itself_only(engine: Engine, writer: str) -> None:
    rows = shuffled_tree(1000, 2)
    parents = {row[1] for row in rows}
    index = next(i for i, row in enumerate(rows) if i > 500 and row[0] not in parents)
    rows[index] = (rows[index][0], 5000, 0)
    result = await engine.run(tree_batch(writer)(as_items(writer, rows)))
    await check(engine, rows, result, [(index, "23503")])


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_bad_row_of_a_shuffled_tree_takes_its_descendants_with_it_and_nobody_else(
    engine: Engine, writer: str
) -> None:
    rows = [(n, 5000 if n in {3, 40} else parent, land) for n, parent, land in shuffled_tree(300, 3)]
    expected = outcome(rows)
    assert 2 < len(expected) < 280
    write = tree_batch(writer)
    for _ in range(3):
        await engine.execute("TRUNCATE tree")
        await check(engine, rows, await engine.run(write(as_items(writer, rows))), expected)


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_row_that_another_error_refused_takes_its_descendants_with_it(
    engine: Engine, writer: str
) -> None:
    """23502, 23514 or a misfit: whoever refers to the row has no parent then."""
    rows = [(n, parent, 9 if n in {3, 40} else 0) for n, parent, _ in shuffled_tree(300, 3)]
    result = await engine.run(tree_batch(writer)(as_items(writer, rows)))
    await check(engine, rows, result, outcome(rows))


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_long_chain_that_comes_backwards_is_written_whole(engine: Engine, writer: str) -> None:
    rows: list[Row] = [(n, n - 1 if n else None, 0) for n in reversed(range(150))]
    rows.insert(75, (1000, 5000, 0))
    result = await engine.run(tree_batch(writer)(as_items(writer, rows)))
    await check(engine, rows, result, [(75, "23503")])


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_row_that_is_its_own_parent_is_written(engine: Engine, writer: str) -> None:
    rows: list[Row] = [(1, 1, 0), (2, 5000, 0), (3, 3, 0), (4, 1, 0)]
    await check(engine, rows, await engine.run(tree_batch(writer)(as_items(writer, rows))), [(1, "23503")])


@pytest.mark.parametrize("bad", [False, True], ids=["alone", "beside a bad row"])
@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_rows_that_need_each_other_are_copied_whatever_comes_with_them(
    engine: Engine, writer: str, bad: bool
) -> None:
    """One COPY checks them at its end, so that they can be written: then they are, also beside a bad one."""
    rows: list[Row] = [(n, None, 0) for n in range(30)]
    rows[3], rows[14], rows[28] = (101, 102, 0), (102, 103, 0), (103, 101, 0)
    if bad:
        rows[20] = (500, 5000, 0)
    result = await engine.run(tree_batch(writer)(as_items(writer, rows)))
    await check(engine, rows, result, [(20, "23503")] if bad else [])


@pytest.mark.parametrize("writer", WRITERS)
async def test_rows_that_only_came_before_their_parents_do_not_count_for_the_skip_limit(
    engine: Engine, writer: str
) -> None:
    rows = shuffled_tree(100, 4)
    rows.insert(50, (1000, 5000, 0))
    result = await engine.run(tree_batch(writer, skip_limit=1)(as_items(writer, rows)))
    await check(engine, rows, result, [(50, "23503")])
    await engine.execute("TRUNCATE tree")
    with pytest.raises(SkipLimitExceeded) as raised:
        await engine.run(tree_batch(writer, skip_limit=0)(as_items(writer, rows)))
    assert [failed.index for failed in raised.value.failed] == [50]
    assert await stored(engine) == []


@pytest.mark.parametrize("writer", WRITERS)
async def test_inside_a_transaction_of_others_a_shuffled_tree_ends_the_same(
    engine: Engine, writer: str
) -> None:
    rows = shuffled_tree(200, 5)
    rows.insert(7, (1000, 5000, 0))
    async with engine.transaction() as conn:
        result = await tree_batch(writer)(as_items(writer, rows))(conn)
        await conn.execute("INSERT INTO land VALUES (77)")
    await check(engine, rows, result, [(7, "23503")])


# -------------------------------------------------------------------------- what was learned, and then reused


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_parent_that_was_suspected_keeps_its_children(engine: Engine, writer: str) -> None:
    """Land 9 was refused, so its rows are expected to fail; now it is there, and their children come after
    them.
    """
    write = tree_batch(writer)
    lesson: list[Row] = [(n, None, 9 if n % 2 else 0) for n in range(400)]
    for _ in range(3):
        await engine.execute("TRUNCATE tree")
        result = await engine.run(write(as_items(writer, lesson)))
        assert told(result) == [(n, "23503") for n in range(1, 400, 2)]
    await engine.execute("TRUNCATE tree; INSERT INTO land VALUES (9)")
    rows: list[Row] = [row for n in range(500) for row in ((n, None, 9), (1000 + n, n, 0))]
    await check(engine, rows, await engine.run(write(as_items(writer, rows))), [])


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_parent_that_was_missing_is_not_held_against_its_children(
    engine: Engine, writer: str
) -> None:
    """Refused once, for a row that was not there; it is there in the next batch, or comes in it."""
    write = tree_batch(writer)
    orphans: list[Row] = [(n, 1000 + n % 3, 0) for n in range(300)]
    result = await engine.run(write(as_items(writer, orphans)))
    assert len(result.failed) == 300
    rows: list[Row] = [(1000, None, 0), *orphans, (1001, 1000, 0)]
    await check(engine, rows, await engine.run(write(as_items(writer, rows))), outcome(rows))


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_doubled_id_costs_the_later_row_also_where_children_come_first(
    engine: Engine, writer: str
) -> None:
    """Rows that are tried again later don't take the place of those that were written in their turn."""
    rows: list[Row] = [(2, 1, 0), (1, None, 0), (1, None, 0), (3, 5000, 0), (4, 2, 0)]
    result = await engine.run(tree_batch(writer)(as_items(writer, rows)))
    assert told(result) == [(2, "23505"), (3, "23503")]
    assert await stored(engine) == [1, 2, 4]


@pytest.mark.parametrize("make", [copy_into, copy_text])
async def test_a_partitioned_tree_is_known_to_refer_to_itself(engine: Engine, make: Any) -> None:
    """There the error names a partition, which refers to the table above it."""
    write = batch(make("wood", columns=COLUMNS))
    name = make.__name__
    orphans: list[Row] = [(n, 1000 + n % 3, 0) for n in range(300)]
    result = await engine.run(write(as_items(name, orphans)))
    assert len(result.failed) == 300
    rows: list[Row] = [(1000, None, 0), *orphans, (1001, 1000, 0)]
    result = await engine.run(write(as_items(name, rows)))
    assert told(result) == [(1 + n, "23503") for n in range(2, 300, 3)]
    assert await engine.fetchval("SELECT count(*) FROM wood") == 202
