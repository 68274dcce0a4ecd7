"""Commit tokens: their table, what writes and purges it, and that nothing of theirs stays in the session."""

from __future__ import annotations

import functools
from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    CommitTokens,
    Engine,
    PolicyError,
)
from tests.support.doubt import TOKENS, WAYS, Way, World, at_commit

pytestmark = pytest.mark.anyio


MINE = CommitTokens(table="Tokens of mine", schema="some where", keep=3600)
COUNT = 'SELECT count(*) FROM "some where"."Tokens of mine"'


@pytest.fixture
async def engine(world: World) -> Engine:
    """An engine whose token table is in a schema of its own, and has no token."""
    await world.pool.execute('DROP SCHEMA IF EXISTS "some where" CASCADE; CREATE SCHEMA "some where"')
    engine = world.new_engine(MINE)
    await engine.run(MINE.install)
    return engine


async def test_installing_the_token_table_again_keeps_its_tokens(engine: Engine, world: World) -> None:
    await engine.run(world.body, resolve_commit=True)
    await engine.run(MINE.install)
    assert await engine.fetchval(COUNT) == 1


@pytest.mark.parametrize(("resolve", "tokens"), [(True, 1), (False, 0)])
async def test_only_a_run_that_resolves_writes_a_token(
    resolve: bool, tokens: int, engine: Engine, world: World
) -> None:
    await engine.run(world.body, resolve_commit=resolve)
    assert await engine.fetchval(COUNT) == tokens


async def test_purge_deletes_the_tokens_that_are_older_than_they_are_kept(
    engine: Engine, world: World
) -> None:
    for n in range(3):
        await engine.run(functools.partial(world.body, n=n), resolve_commit=True)
    assert await engine.run(MINE.purge) == 0
    await engine.execute('UPDATE "some where"."Tokens of mine" SET at = at - interval \'2 hours\' WHERE true')
    await engine.run(functools.partial(world.body, n=4), resolve_commit=True)
    assert await engine.run(MINE.purge) == 3
    assert await engine.fetchval(COUNT) == 1


async def test_a_token_table_with_odd_names_resolves_too(world: World) -> None:
    tokens = CommitTokens(table="T'\"; --", schema="public")
    engine = world.new_engine(tokens)
    await engine.run(tokens.install)
    world.proxy.inject(at_commit("reset", "before the client"))
    assert await engine.run(world.body, resolve_commit=True) == "result of start 1"


async def test_a_token_table_that_is_not_there_is_the_servers_error(world: World) -> None:
    engine = world.new_engine(CommitTokens(table="nowhere"))
    with pytest.raises(asyncpg.UndefinedTableError):
        await engine.run(world.body, resolve_commit=True)
    assert world.rows() == 0


async def test_a_rolled_back_run_leaves_no_token(world: World) -> None:
    engine = await world.engine_by("token")
    before = await engine.fetchval(f"SELECT count(*) FROM {TOKENS.table}")

    async def fails(conn: Any) -> None:
        await world.body(conn)
        raise LookupError

    with pytest.raises(LookupError):
        await engine.run(fails, resolve_commit=True)
    assert await engine.fetchval(f"SELECT count(*) FROM {TOKENS.table}") == before


@pytest.mark.parametrize(
    "options", [{"table": ""}, {"table": "x" * 64}, {"keep": 0}, {"schema": "a\0"}], ids=repr
)
def test_tokens_that_are_not_allowed_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        CommitTokens(**options)


@pytest.mark.parametrize("way", WAYS)
async def test_the_application_name_is_the_sessions_again_after_a_run_that_resolves(
    way: Way, world: World
) -> None:
    engine = await world.engine_by(way)
    before = await engine.fetchval("SHOW application_name")
    await engine.run(lambda conn: conn.execute("SELECT 1"), resolve_commit=True)
    assert await engine.fetchval("SHOW application_name") == before
