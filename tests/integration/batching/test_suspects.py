"""Many rows with the same missing parents: set apart, and still each judged as a plain loop would."""

import random

import pytest

from dbop_raw import Engine
from tests.support.batching import COPY_WRITERS, as_items, make_batch, told

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

PARENTS = range(50)


def a_loop(rows: list[tuple[int, int | None]]) -> tuple[dict[int, int | None], list[tuple[int, str]]]:
    """What is written and what fails, row after row."""
    table: dict[int, int | None] = {}
    failed = []
    for index, (key, parent) in enumerate(rows):
        if key in table:
            failed.append((index, "23505"))
        elif parent is not None and parent not in PARENTS:
            failed.append((index, "23503"))
        else:
            table[key] = parent
    return table, failed


def make_rows(chance: random.Random, doubles: int, *, everyone: bool) -> list[tuple[int, int | None]]:
    """Rows of which many refer to the same two missing parents, and some repeat an id."""
    parents = [900, 901] if everyone else [None, *PARENTS, *([900, 901] * 8)]
    rows: list[tuple[int, int | None]] = [(n, chance.choice(parents)) for n in range(400)]
    for _ in range(doubles):
        rows[chance.randrange(200, 400)] = (chance.randrange(200), chance.choice([3, 900]))
    return rows


@pytest.mark.parametrize("writer", COPY_WRITERS)
@pytest.mark.parametrize("doubles", [0, 3, 40])
@pytest.mark.parametrize("everyone", [False, True])
async def test_batches_with_crowds_of_missing_parents_end_as_a_plain_loop_would(
    postgres_dsn: str, writer: str, doubles: int, everyone: bool
) -> None:
    """Four batches, each with what those before it taught."""
    chance = random.Random(f"{writer} {doubles} {everyone}")
    write = make_batch(writer, "child", ("id", "parent"))
    async with Engine.open(postgres_dsn, min_size=1, max_size=1) as engine:
        await engine.execute(
            "CREATE TABLE parent (id int PRIMARY KEY);"
            "INSERT INTO parent SELECT * FROM generate_series(0, 49);"
            "CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent)"
        )
        for _ in range(4):
            await engine.execute("TRUNCATE child")
            rows = make_rows(chance, doubles, everyone=everyone)
            table, failed = a_loop(rows)
            result = await engine.run(write(as_items(writer, rows)))
            found = {row["id"]: row["parent"] for row in await engine.fetch("SELECT * FROM child")}
            assert found == table
            assert told(result) == failed


async def test_a_table_that_refers_to_itself_is_not_reordered(postgres_dsn: str) -> None:
    write = make_batch("copy_into", "tree", ("id", "parent"))
    async with Engine.open(postgres_dsn, min_size=1, max_size=1) as engine:
        await engine.execute("CREATE TABLE tree (id int PRIMARY KEY, parent int REFERENCES tree)")
        lost = [(n, 1000) for n in range(100)]
        result = await engine.run(write(lost))
        assert len(result.failed) == 100
        # The same value again, but now its row is there, and comes first.
        result = await engine.run(write([(1000, None), *lost]))
        assert not result.failed
