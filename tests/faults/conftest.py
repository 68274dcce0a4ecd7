"""What the fault tests share: a seed that is printed, how long to go on, and a server that may be broken."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from dbop_raw.testing import Server
from tests.support.servers import own_server

# How much longer than in the normal run (1.0): 10 makes each storm ten times as long.
SCALE = float(os.environ.get("DBOP_RAW_FAULT_SCALE", "1"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed of this test's chances: DBOP_RAW_SEED where it is set, else a new one; printed either way.

    It is in pytest's report of a failure, so that the same chances can be taken again: those of the test, and
    the jitter of retries. What the machine does in between is not repeated.
    """
    value = int(os.environ.get("DBOP_RAW_SEED") or random.SystemRandom().randrange(2**31))
    print(f"DBOP_RAW_SEED={value}")  # noqa: T201 - a failure shows it
    random.seed(value)
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture(scope="session")
def scale() -> float:
    return SCALE


@pytest.fixture(scope="module")
def fragile_server() -> Iterator[Server]:
    """A server of this module's own, which its tests may crash."""
    with own_server() as server:
        yield server


@pytest.fixture
def fragile_dsn(fragile_server: Server) -> Iterator[str]:
    fragile_server.start()
    dsn = fragile_server.create_database()
    yield dsn
    fragile_server.start()
    fragile_server.drop_database(dsn)
