"""A table of items that refuses rows as their bodies say, and an engine on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from dbop_raw import Engine
from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql

# A row is refused as its body says: `raise CODE`, `raise CODE once` (until a sequence has been drawn from),
# `lock N` (takes the row N of another table).
SCHEMA = (
    "CREATE TABLE other (id int PRIMARY KEY)",
    "INSERT INTO other VALUES (1), (2)",
    "CREATE SEQUENCE met",
    "CREATE TABLE item (id int PRIMARY KEY, body text NOT NULL)",
    """
    CREATE FUNCTION judge() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.body LIKE 'raise % once' THEN
            IF nextval('met') = 1 THEN
                RAISE EXCEPTION 'as asked' USING ERRCODE = split_part(NEW.body, ' ', 2);
            END IF;
        ELSIF NEW.body LIKE 'raise %' THEN
            RAISE EXCEPTION 'as asked' USING ERRCODE = split_part(NEW.body, ' ', 2);
        ELSIF NEW.body LIKE 'lock %' THEN
            PERFORM nextval('met');
            PERFORM FROM other WHERE id = split_part(NEW.body, ' ', 2)::int FOR UPDATE;
        END IF;
        RETURN NEW;
    END $$
    """,
    "CREATE TRIGGER judge BEFORE INSERT ON item FOR EACH ROW EXECUTE FUNCTION judge()",
)


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    for statement in SCHEMA:
        run_sql(dsn, statement)
    yield dsn
    postgres_server.drop_database(dsn)


@pytest.fixture
async def engine(database: str) -> AsyncIterator[Engine]:
    async with Engine.open(database, min_size=0, max_size=3) as engine:
        await engine.execute("TRUNCATE item; ALTER SEQUENCE met RESTART")
        yield engine
