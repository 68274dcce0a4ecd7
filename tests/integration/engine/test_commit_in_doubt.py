"""COMMIT in doubt: resolved by looking it up, never guessed, and never a wrong "committed"."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    CommitUnknown,
    Event,
    RetriesExhausted,
    RetryPolicy,
    events,
)
from dbop_raw.testing import Fault, Injected, Message, message, query
from dbop_raw.testing.server import run_sql
from tests.support.doubt import ACTIONS, PLACES, WAYS, Action, Place, Way, World, at_commit
from tests.support.policies import QUICK

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("action", ACTIONS)
async def test_a_lost_commit_that_is_not_resolved_is_commit_unknown_after_one_attempt(
    action: Action, where: Place, world: World
) -> None:
    world.proxy.inject(at_commit(action, where))
    deadline = 0.3 if action == "hang" else None
    with pytest.raises(CommitUnknown):
        await world.engine.run(world.body, retry=QUICK, deadline=deadline)
    assert world.starts == 1
    stats = world.engine.stats()
    assert (stats.commits_in_doubt, stats.evicted, stats.in_use, stats.retries) == (1, 1, 0, 0)
    assert len(world.seen.of(events.CommitInDoubt)) == 1
    assert world.seen.of(events.RolledBack) == world.seen.of(events.Committed) == []
    assert world.outcomes() == []
    assert world.rows() == (1 if where == "before the client" else 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("action", ACTIONS)
async def test_a_commit_that_was_done_gives_the_bodys_result_and_no_second_run(
    action: Action, way: Way, world: World
) -> None:
    engine = await world.engine_by(way)
    world.proxy.inject(at_commit(action, "before the client"))
    deadline = 1.5 if action == "hang" else None
    result = await engine.run(world.body, resolve_commit=True, deadline=deadline)
    assert result == "result of start 1"
    assert (world.starts, world.rows()) == (1, 1)
    assert world.outcomes() == ["committed"]
    stats = engine.stats()
    assert (stats.commits_in_doubt, stats.commits_found_committed, stats.commits_found_aborted) == (1, 1, 0)
    assert stats.in_use == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("action", ACTIONS)
async def test_a_commit_that_was_not_done_runs_again_and_writes_once(
    action: Action, way: Way, world: World
) -> None:
    engine = await world.engine_by(way)
    world.proxy.inject(at_commit(action, "before the server"))
    deadline = 3 if action == "hang" else None
    result = await engine.run(world.body, resolve_commit=True, deadline=deadline)
    assert result == "result of start 2"
    assert (world.starts, world.rows()) == (2, 1)
    assert world.outcomes() == ["aborted"]
    stats = engine.stats()
    assert (stats.commits_in_doubt, stats.commits_found_committed, stats.commits_found_aborted) == (1, 0, 1)
    assert stats.in_use == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", PLACES)
async def test_a_commit_that_hangs_and_is_lost_later_is_resolved_without_a_deadline(
    where: Place, way: Way, world: World
) -> None:
    engine = await world.engine_by(way)
    hung = world.proxy.inject(at_commit("hang", where))
    task = asyncio.ensure_future(engine.run(world.body, resolve_commit=True))
    await hung.wait()
    await anyio.sleep(0.05)
    assert not task.done()
    world.proxy.drop_all("reset")
    await task
    assert world.rows() == 1
    assert world.starts == (1 if where == "before the client" else 2)


@pytest.mark.parametrize("way", WAYS)
async def test_several_commits_in_doubt_at_once_are_resolved_each_for_itself(way: Way, world: World) -> None:
    engine = await world.engine_by(way)
    world.proxy.inject(at_commit("reset", "before the client"))
    world.proxy.inject(at_commit("reset", "before the server", times=2))
    results = await asyncio.gather(
        *(engine.run(functools.partial(world.body, n=n), resolve_commit=True) for n in range(1, 9))
    )
    assert len(results) == 8
    assert run_sql(world.dsn, "SELECT array_agg(n ORDER BY n) FROM t") == list(range(1, 9))
    assert engine.stats().commits_in_doubt == 3
    assert sorted(world.outcomes()) in (["aborted", "aborted", "committed"], ["aborted"] * 3)


@pytest.mark.parametrize("way", WAYS)
async def test_a_commit_that_is_lost_each_time_runs_three_times_and_no_more(way: Way, world: World) -> None:
    engine = await world.engine_by(way)
    world.proxy.inject(at_commit("reset", "before the server", times=None))
    with pytest.raises(RetriesExhausted) as caught:
        await engine.run(world.body, resolve_commit=True)
    assert (caught.value.attempts, world.starts, world.rows()) == (3, 3, 0)


@pytest.mark.parametrize("way", WAYS)
async def test_a_policy_says_how_often_a_lost_commit_runs_again(way: Way, world: World) -> None:
    engine = await world.engine_by(way)
    world.proxy.inject(at_commit("reset", "before the server", times=None))
    policy = RetryPolicy(attempts=2, first_delay=0.001)
    with pytest.raises(RetriesExhausted):
        await engine.run(world.body, retry=policy, resolve_commit=True)
    assert world.starts == 2


@pytest.mark.parametrize("way", WAYS)
async def test_a_look_up_waits_until_the_server_can_be_reached_again(way: Way, world: World) -> None:
    port = world.proxy.server_port

    def unreachable_for_a_while(event: Event) -> None:
        if isinstance(event, events.CommitInDoubt):
            world.make_unreachable()
            asyncio.get_running_loop().call_later(0.2, setattr, world.proxy, "server_port", port)

    engine = await world.engine_by(way, on_event=unreachable_for_a_while)
    world.proxy.inject(at_commit("reset", "before the client"))
    assert await engine.run(world.body, resolve_commit=True) == "result of start 1"
    assert world.rows() == 1


async def test_a_look_up_that_finds_no_server_until_the_deadline_is_commit_unknown(world: World) -> None:
    def unreachable(event: Event) -> None:
        if isinstance(event, events.CommitInDoubt):
            world.make_unreachable()

    engine = world.new_engine(on_event=unreachable)
    world.proxy.inject(at_commit("reset", "before the client"))
    with anyio.fail_after(5), pytest.raises(CommitUnknown):
        await engine.run(world.body, resolve_commit=True, deadline=0.6)
    assert world.starts == 1


async def test_an_engine_that_closes_during_the_look_up_does_not_say_that_nothing_was_sent(
    world: World,
) -> None:
    closing: list[asyncio.Task[Any]] = []

    def unreachable_and_closed(event: Event) -> None:
        if isinstance(event, events.CommitInDoubt):
            world.make_unreachable()
            closing.append(asyncio.ensure_future(engine.close(timeout=0.05)))

    engine = world.new_engine(on_event=unreachable_and_closed)
    world.proxy.inject(at_commit("reset", "before the client"))
    with anyio.fail_after(5), pytest.raises(CommitUnknown):
        await engine.run(world.body, resolve_commit=True)
    await closing[0]
    assert world.rows() == 1


@pytest.mark.parametrize("where", PLACES)
async def test_a_transaction_block_whose_commit_is_lost_is_commit_unknown(where: Place, world: World) -> None:
    world.proxy.inject(at_commit("reset", where))
    with pytest.raises(CommitUnknown) as caught:
        async with world.engine.transaction() as conn:
            await world.body(conn)
    assert isinstance(caught.value.__cause__, asyncpg.PostgresConnectionError)
    assert world.engine.stats().commits_in_doubt == 1


@pytest.mark.parametrize("action", ["cut", "reset"])
async def test_an_autocommitted_statement_whose_answer_is_lost_is_commit_unknown(
    action: Action, world: World
) -> None:
    world.proxy.inject(Fault(action, when=query("INSERT"), side="after"))
    with pytest.raises(CommitUnknown):
        await world.engine.run(world.body, autocommit=True, retry=QUICK)
    assert world.starts == 1


@pytest.mark.parametrize("resolve", [False, True])
async def test_a_deadline_bounds_a_commit_that_hangs(resolve: bool, world: World) -> None:
    """With resolve the server hangs too, so that nothing can be looked up."""
    await world.pool.fetchval("SELECT 1")
    world.proxy.inject(at_commit("hang", "before the client"))
    if resolve:
        world.proxy.inject(Fault("hang", when=message("client", "startup"), times=None))
    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(CommitUnknown):
        await world.engine.run(world.body, deadline=0.4, resolve_commit=resolve)
    assert loop.time() - started < 0.4 + 0.3 + 0.3
    assert world.starts == 1
    world.proxy.heal()


@pytest.mark.parametrize(
    ("place", "message", "taken"),
    [
        ("before the client", Message(1, "server", "C", 1, b"COMMIT\0"), True),
        ("before the client", Message(1, "server", "C", 1, b"ROLLBACK\0"), False),
        ("before the server", Message(1, "client", "Q", 1, b"", "COMMIT"), True),
    ],
)
def test_a_fault_at_a_commit_meets_the_commit(place: Place, message: Message, taken: bool) -> None:
    """Guards the guards: a fault that never fires would make the tests above pass for nothing."""
    assert Injected(at_commit("cut", place)).takes(message) is taken
