"""An engine: what it is made of, and how it opens a pool of its own."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    Engine,
    EngineClosed,
    PolicyError,
    Repair,
)
from tests.support.sessions import backend
from tests.support.waiting import until_gone

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "options",
    [
        {"acquire_timeout": 0},
        {"acquire_timeout": float("inf")},
        {"max_waiting": -1},
        {"max_waiting": True},
        {"max_waiting": 1.5},
        {"observer": "log"},
        {"leak_after": 0},
        {"verdicts": {"4000": Repair.NEVER}},
    ],
    ids=repr,
)
async def test_an_engine_of_options_that_are_not_allowed_is_not_made(
    options: dict[str, Any], pool: asyncpg.Pool
) -> None:
    with pytest.raises(PolicyError):
        Engine(pool, **options)


@pytest.mark.parametrize("wrong", [None, "postgresql://localhost/x", object()])
def test_an_object_that_is_no_pool_is_refused(wrong: Any) -> None:
    with pytest.raises(PolicyError, match="not an asyncpg pool"):
        Engine(wrong)


async def test_open_makes_the_pool_with_its_options_and_closes_it(dsn: str) -> None:
    async with Engine.open(
        dsn, min_size=1, max_size=3, server_settings={"application_name": "opened"}, acquire_timeout=0.5
    ) as engine:
        assert await engine.fetchval("SHOW application_name") == "opened"
        assert (engine.stats().max_size, engine.stats().size) == (3, 1)
        pid = await engine.run(backend)
    with pytest.raises(EngineClosed):
        await engine.run(backend)
    await until_gone(dsn, pid)
