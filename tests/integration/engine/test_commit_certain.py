"""COMMITs that are in no doubt, though an answer or a line was lost: refused, only read, or never sent."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    events,
)
from dbop_raw.testing import Fault, query
from dbop_raw.testing.server import run_sql
from tests.support.doubt import ACTIONS, PLACES, Action, Place, World, at_commit
from tests.support.policies import QUICK

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]

LOST = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)


@pytest.mark.parametrize("resolve", [False, True])
async def test_a_commit_that_the_server_refuses_is_its_error(resolve: bool, world: World) -> None:
    async def twice(conn: Any) -> None:
        world.starts += 1
        await conn.execute("INSERT INTO late VALUES (1), (1)")

    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await world.engine.run(twice, retry=QUICK, resolve_commit=resolve)
    assert caught.value.constraint_name == "only_once"
    stats = world.engine.stats()
    assert (world.starts, stats.commits_in_doubt, stats.evicted) == (1, 0, 0)
    assert run_sql(world.dsn, "SELECT count(*) FROM late") == 0


class Look:
    """A body that only reads."""

    def __init__(self) -> None:
        self.starts = 0

    async def __call__(self, conn: Any) -> int:
        self.starts += 1
        found: int = await conn.fetchval("SELECT 7")
        return found


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("action", ACTIONS)
async def test_a_read_only_run_whose_line_is_lost_is_the_drivers_error(
    action: Action, where: Place, world: World
) -> None:
    world.proxy.inject(at_commit(action, where))
    look = Look()

    deadline = 0.3 if action == "hang" else None
    with pytest.raises((*LOST, TimeoutError)):
        await world.engine.run(look, readonly=True, resolve_commit=True, deadline=deadline)
    assert look.starts == 1
    assert world.engine.stats().commits_in_doubt == 0
    assert world.seen.of(events.CommitInDoubt) == []


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("action", ["cut", "reset"])
async def test_a_read_only_run_whose_line_is_lost_is_tried_again(
    action: Action, where: Place, world: World
) -> None:
    world.proxy.inject(at_commit(action, where))
    look = Look()

    assert await world.engine.run(look, readonly=True, retry=QUICK) == 7
    assert look.starts == 2


@pytest.mark.parametrize("action", ["cut", "reset"])
async def test_a_run_whose_line_is_lost_before_its_commit_is_tried_again(
    action: Action, world: World
) -> None:
    lost = world.proxy.inject(Fault(action, when=query("INSERT"), side="after"))
    assert await world.engine.run(world.body, retry=QUICK) == "result of start 2"
    assert (world.starts, world.rows(), lost.fired) == (2, 1, 1)
    assert world.engine.stats().commits_in_doubt == 0
