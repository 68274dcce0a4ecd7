"""Deferred constraints: rows may come in any order, and what is violated in the end is blamed on its item."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from dbop_raw import Batch, Engine, SkipLimitExceeded
from tests.support.batching import count, make_batch, told

pytestmark = pytest.mark.anyio

# One for each kind of writer. (copy_text differs from copy_into by its values only.)
each_kind = pytest.mark.parametrize("writer", ["each", "execute_many", "copy_into"])


@pytest.fixture
async def tree(engine: Engine) -> AsyncIterator[Engine]:
    await engine.execute(
        "DROP TABLE IF EXISTS node; "
        "CREATE TABLE node (id int PRIMARY KEY, up int REFERENCES node DEFERRABLE INITIALLY DEFERRED)"
    )
    yield engine
    await engine.execute("DROP TABLE node")


def node_batch(writer: str, **options: Any) -> Batch[Any, Any]:
    return make_batch(writer, "node", ("id", "up"), **options)


@each_kind
async def test_a_row_may_refer_to_a_later_one(tree: Engine, writer: str) -> None:
    result = await tree.run(node_batch(writer)([(1, 2), (2, 3), (3, None)]))
    assert result.failed == ()
    assert await count(tree, "node") == 3


@each_kind
async def test_a_row_may_refer_to_a_later_one_where_another_refers_to_nothing(
    tree: Engine, writer: str
) -> None:
    """The one is blamed, and the others are not for having been early."""
    rows = [(1, 2), (2, 3), (3, None), (4, 99), (5, 4), (6, 3)]
    result = await tree.run(node_batch(writer)(rows))
    assert told(result) == [(3, "23503"), (4, "23503")]
    assert [row["id"] for row in await tree.fetch("SELECT id FROM node ORDER BY id")] == [1, 2, 3, 6]


@each_kind
async def test_rows_that_were_only_early_do_not_count_for_the_skip_limit(tree: Engine, writer: str) -> None:
    result = await tree.run(node_batch(writer, skip_limit=1)([(1, 2), (2, 3), (3, None), (4, 99)]))
    assert told(result) == [(3, "23503")]
    assert await count(tree, "node") == 3


@each_kind
async def test_a_row_that_refers_to_nothing_counts_for_the_skip_limit(tree: Engine, writer: str) -> None:
    with pytest.raises(SkipLimitExceeded) as raised:
        await tree.run(node_batch(writer, skip_limit=0)([(11, 12), (12, None), (13, 99)]))
    assert [failed.index for failed in raised.value.failed] == [2]
    assert await count(tree, "node") == 0


@each_kind
async def test_a_batch_inside_a_transaction_blames_items_before_the_block_goes_on(
    tree: Engine, writer: str
) -> None:
    async with tree.transaction() as conn:
        result = await node_batch(writer)([(1, 2), (2, None), (3, 99)])(conn)
        assert told(result) == [(2, "23503")]
        await conn.execute("INSERT INTO node VALUES (4, 1)")
    assert await count(tree, "node") == 3


async def test_a_clean_batch_leaves_constraints_deferred_for_the_rest_of_the_transaction(
    tree: Engine,
) -> None:
    """The check must not change the caller's transaction for good."""
    async with tree.transaction() as conn:
        await node_batch("execute_many")([(1, None)])(conn)
        await conn.execute("INSERT INTO node VALUES (2, 3)")
        await conn.execute("INSERT INTO node VALUES (3, NULL)")
    assert await count(tree, "node") == 3


async def test_what_was_violated_before_the_batch_is_not_blamed_on_it(tree: Engine) -> None:
    async def body(conn: Any) -> None:
        await conn.execute("INSERT INTO node VALUES (1, 99)")
        await node_batch("execute_many")([(2, None)])(conn)

    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await tree.run(body)
    assert await count(tree, "node") == 0
