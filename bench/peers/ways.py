"""All ways, in the order of the report: the limits, the peers, ours."""

from __future__ import annotations

from bench.peers import bare, ours, retriers, with_dbop_core, with_psycopg, with_sqlalchemy
from bench.peers.peer import Single, Way

__all__ = ["PACKAGES", "SINGLES", "WAYS"]

WAYS: tuple[Way, ...] = (
    *bare.WAYS,
    *with_sqlalchemy.WAYS,
    *with_dbop_core.WAYS,
    *with_psycopg.WAYS,
    *ours.WAYS,
)
SINGLES: tuple[Single, ...] = (
    *bare.SINGLES,
    *retriers.SINGLES,
    *with_sqlalchemy.SINGLES,
    *with_psycopg.SINGLES,
    *with_dbop_core.SINGLES,
    *ours.SINGLES,
)
PACKAGES = (
    "dbop-raw",
    "asyncpg",
    "sqlalchemy",
    "greenlet",
    "psycopg",
    "psycopg-pool",
    "dbop-core",
    "tenacity",
    "stamina",
)
