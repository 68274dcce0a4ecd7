"""What stops a batch, and what costs one item only: against a real server, in each way of trying rows."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from dbop_raw import Engine, Event, Repair, Rule, SkipLimitExceeded, batch, each
from dbop_raw.events import Retried
from tests.support.batching import (
    ITEM_COLUMNS,
    QUICK,
    WRITERS,
    Way,
    both_ways,
    count,
    in_spans,
    item_batch,
    items_for,
    make_writer,
    told,
)

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@both_ways
@pytest.mark.parametrize("writer", WRITERS)
class TestAnErrorThatEveryItemWouldMeet:
    async def test_a_wrong_statement_stops_the_batch_at_once(
        self, engine: Engine, writer: str, way: Way
    ) -> None:
        """Class 42: every row would meet it."""
        started = 0

        async def wrong(conn: Any) -> None:
            nonlocal started
            started += 1
            await conn.execute("INSERT INTO nowhere VALUES (1)")

        writes = each(lambda _: wrong) if writer == "each" else make_writer(writer, "nowhere", ITEM_COLUMNS)
        with pytest.raises(asyncpg.UndefinedTableError):
            await engine.run(way(batch(writes, retry=QUICK))(items_for(writer, {})))
        assert started <= 1

    @pytest.mark.parametrize("code", ["53100", "42883", "57014", "53400"])
    async def test_an_error_that_all_share_is_never_blamed_on_rows(
        self, engine: Engine, writer: str, way: Way, code: str
    ) -> None:
        write = way(item_batch(writer, retry=QUICK))
        with pytest.raises(asyncpg.PostgresError) as raised:
            await engine.run(write(items_for(writer, {40: f"raise {code}", 41: "raise 23514"})))
        assert raised.value.sqlstate == code
        assert await count(engine) == 0


@both_ways
@pytest.mark.parametrize("writer", WRITERS)
class TestAnErrorThatNeedsANewTransaction:
    @pytest.mark.parametrize("code", ["40001", "40P01", "53200"])
    async def test_it_leaves_the_batch_and_the_run_starts_the_whole_again(
        self, database: str, engine: Engine, writer: str, way: Way, code: str
    ) -> None:
        events: list[Event] = []
        async with Engine.open(database, min_size=0, observer=events.append) as watched:
            write = way(item_batch(writer, retry=QUICK))
            result = await watched.run(
                write(items_for(writer, {40: f"raise {code} once", 41: "raise 23514"}))
            )
        assert told(result) == [(41, "23514")]
        assert await count(engine) == 99
        assert [e.level for e in events if isinstance(e, Retried)] == ["transaction"]

    async def test_it_is_raised_unchanged_without_a_policy(
        self, engine: Engine, writer: str, way: Way
    ) -> None:
        with pytest.raises(asyncpg.SerializationError):
            await engine.run(way(item_batch(writer))(items_for(writer, {40: "raise 40001"})))
        assert await count(engine) == 0


@both_ways
@pytest.mark.parametrize("writer", WRITERS)
class TestTheSkipLimit:
    BAD = dict.fromkeys((3, 50, 98), "raise 23514")

    async def test_as_many_items_as_the_limit_may_fail(self, engine: Engine, writer: str, way: Way) -> None:
        result = await engine.run(way(item_batch(writer, skip_limit=3))(items_for(writer, self.BAD)))
        assert [failed.index for failed in result.failed] == [3, 50, 98]
        assert await count(engine) == 97

    async def test_one_failure_more_than_the_limit_undoes_the_batch(
        self, engine: Engine, writer: str, way: Way
    ) -> None:
        with pytest.raises(SkipLimitExceeded) as raised:
            await engine.run(way(item_batch(writer, skip_limit=2))(items_for(writer, self.BAD)))
        assert raised.value.limit == 2
        assert [failed.index for failed in raised.value.failed] == [3, 50, 98]
        assert await count(engine) == 0

    async def test_a_limit_of_0_stops_the_batch_at_its_first_bad_item(
        self, engine: Engine, writer: str, way: Way
    ) -> None:
        with pytest.raises(SkipLimitExceeded):
            await engine.run(way(item_batch(writer, skip_limit=0))(items_for(writer, {99: None})))
        assert await count(engine) == 0


@both_ways
@pytest.mark.parametrize("writer", WRITERS)
class TestTheVerdictsOfTheEngine:
    async def test_a_row_of_the_engines_own_makes_an_internal_error_an_items_failure(
        self, database: str, engine: Engine, writer: str, way: Way
    ) -> None:
        """A distributed engine tells of a NOT NULL violation with XX000."""
        items = items_for(writer, {7: "raise XX000", 70: "raise XX000"})
        with pytest.raises(asyncpg.InternalServerError):
            await engine.run(way(item_batch(writer))(items))
        verdicts = {"XX000": Rule(Repair.NEVER, item=True)}
        async with Engine.open(database, min_size=0, verdicts=verdicts) as distributed:
            result = await distributed.run(way(item_batch(writer))(items))
        assert told(result) == [(7, "XX000"), (70, "XX000")]
        assert await count(engine) == 98

    async def test_a_row_of_the_engines_own_makes_an_items_failure_stop_the_batch(
        self, database: str, engine: Engine, writer: str, way: Way
    ) -> None:
        async with Engine.open(database, min_size=0, verdicts={"23514": Rule(Repair.NEVER)}) as strict:
            with pytest.raises(asyncpg.CheckViolationError):
                await strict.run(way(item_batch(writer))(items_for(writer, {7: "raise 23514"})))
        assert await count(engine) == 0

    async def test_one_batch_follows_the_verdicts_of_each_engine_that_runs_it(
        self, database: str, engine: Engine, writer: str, way: Way
    ) -> None:
        write = way(item_batch(writer))
        items = items_for(writer, {7: "raise UE001", 70: "raise 23514"})
        result = await engine.run(write(items))
        assert told(result) == [(7, "UE001"), (70, "23514")]
        await engine.execute("TRUNCATE item")
        async with Engine.open(database, min_size=0, verdicts={"UE001": Rule(Repair.NEVER)}) as strict:
            with pytest.raises(asyncpg.PostgresError) as raised:
                await strict.run(way(write)(items))
        assert raised.value.sqlstate == "UE001"

    async def test_a_code_of_the_users_own_costs_its_item_only(
        self, engine: Engine, writer: str, way: Way
    ) -> None:
        write = way(item_batch(writer))
        result = await engine.run(write(items_for(writer, {0: "raise P0001", 99: "raise UE001"})))
        assert told(result) == [(0, "P0001"), (99, "UE001")]
        assert str(result.failed[0].error) == "as asked"


class _BeginsOnce:
    """A record whose opening SQL works only once: as where another process was first with the same row."""

    def opening(self) -> str:
        return "SELECT 1 / (2 - nextval('met'))"

    def capture(self, conn: Any) -> None:
        pass

    async def at_work(self, conn: Any) -> bool:
        raise NotImplementedError

    async def look_up(self, conn: Any) -> None:
        pass


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_transaction_that_fails_to_begin_anew_is_no_fault_of_an_item(
    engine: Engine, writer: str
) -> None:
    """The first span is undone by ROLLBACK and BEGIN, and what is opened with BEGIN may fail then."""
    write = in_spans(item_batch(writer))
    with pytest.raises(asyncpg.DivisionByZeroError):
        await engine.run_recorded(write(items_for(writer, {0: None}, 10)), _BeginsOnce())
    assert await count(engine) == 0
