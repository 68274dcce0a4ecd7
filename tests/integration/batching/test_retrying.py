"""What a batch tries again from its savepoint, and for how long: against a real server."""

from __future__ import annotations

import asyncpg
import pytest

from dbop_raw import Engine, Event, pipe, timeout
from dbop_raw.events import Retried
from tests.support.batching import QUICK, WRITERS, Way, both_ways, count, item_batch, items_for, told

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@both_ways
@pytest.mark.parametrize("writer", WRITERS)
class TestAFailureThatASavepointRepairs:
    async def test_an_item_that_outlasts_its_attempts_fails_alone_and_stays_transient(
        self, database: str, engine: Engine, writer: str, way: Way
    ) -> None:
        """A row locked by another session: the batch waits lock_timeout, `attempts` times, for that item."""
        events: list[Event] = []
        blocker = await asyncpg.connect(database)
        try:
            await blocker.execute("BEGIN; SELECT FROM other WHERE id = 1 FOR UPDATE")
            async with Engine.open(database, min_size=0, observer=events.append) as watched:
                write = way(item_batch(writer, retry=QUICK))
                op = pipe(
                    write(items_for(writer, {5: "lock 1", 6: "lock 2", 7: None}, 20)), timeout(20, lock=0.03)
                )
                result = await watched.run(op)
        finally:
            await blocker.close()
        assert told(result) == [(5, "55P03"), (7, "23502")]
        assert result.failed[0].verdict.transient
        assert not result.failed[1].verdict.transient
        assert result.written == 18 == await count(engine)
        assert result.retries == QUICK.attempts - 1
        assert [e.level for e in events if isinstance(e, Retried)] == ["savepoint"] * (QUICK.attempts - 1)

    async def test_a_failure_that_passes_costs_no_item(self, engine: Engine, writer: str, way: Way) -> None:
        write = way(item_batch(writer, retry=QUICK))
        result = await engine.run(write(items_for(writer, {5: "raise 55P03 once", 9: "raise 23514"})))
        assert told(result) == [(9, "23514")]
        assert await count(engine) == 99

    async def test_a_batch_without_a_policy_does_not_try_again(
        self, engine: Engine, writer: str, way: Way
    ) -> None:
        result = await engine.run(way(item_batch(writer))(items_for(writer, {5: "raise 55P03"})))
        assert told(result) == [(5, "55P03")]
        assert result.retries == 0
        assert await count(engine) == 99
