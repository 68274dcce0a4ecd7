"""What a batch refuses: rows that don't fit, and where it can't be run. A misfit costs its item only."""

from __future__ import annotations

from collections import deque

import pytest

from dbop_raw import Engine, PolicyError
from tests.support.batching import (
    COPY_WRITERS,
    WRITERS,
    Way,
    both_ways,
    count,
    in_spans,
    item_batch,
    items_for,
    told,
)

pytestmark = pytest.mark.anyio


@both_ways
@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_a_row_of_another_width_costs_its_item_only(engine: Engine, writer: str, way: Way) -> None:
    """The driver would cut a longer one short without a word."""
    items = items_for(writer, {}, 10)
    items[2] = (*items[2], "more")
    items[5] = items[5][:1]
    items[7] = 7
    items[8] = "ab"
    result = await engine.run(way(item_batch(writer))(items))
    assert told(result) == [(2, "ValueError"), (5, "ValueError"), (7, "TypeError"), (8, "TypeError")]
    assert await count(engine) == 6


@both_ways
async def test_too_few_or_too_many_parameters_cost_their_item_only(engine: Engine, way: Way) -> None:
    items = items_for("execute_many", {}, 10)
    items[2] = (*items[2], "more")
    items[5] = items[5][:1]
    result = await engine.run(way(item_batch("execute_many"))(items))
    assert [failed.index for failed in result.failed] == [2, 5]
    assert await count(engine) == 8


@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_a_misfit_costs_its_item_only_where_much_was_sent_before_it_was_found(
    engine: Engine, writer: str
) -> None:
    items = items_for(writer, {}, 10_000)
    items[5_000] = (*items[5_000], "more")
    items[9_000] = items[9_000][:1]
    items[9_500] = (items[9_500][0], 7)
    result = await engine.run(in_spans(item_batch(writer))(items))
    assert told(result) == [(5_000, "ValueError"), (9_000, "ValueError"), (9_500, "TypeError")]
    assert await count(engine) == 9_997


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_sequence_that_can_not_be_cut_is_taken(engine: Engine, writer: str) -> None:
    items = deque(items_for(writer, {3: None}))
    result = await engine.run(item_batch(writer)(items))
    assert told(result) == [(3, "23502")]
    assert await count(engine) == 99


async def test_a_batch_needs_a_transaction(engine: Engine) -> None:
    with pytest.raises(PolicyError, match="needs a transaction"):
        await engine.run(item_batch("each")(items_for("each", {})), autocommit=True)
