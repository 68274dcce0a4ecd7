"""A user's codecs: what a batch sends goes through them, always; what is our own never does.

Every kind of value, with and without codecs, is in `test_same_whatever_the_way.py`; here is what that can't
say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from dbop_raw import Engine, Ledger, RetryPolicy, batch, copy_into, execute_many, ingest
from dbop_raw.events import Event, Retried
from tests.support.batching import ROW_WRITERS, as_items, make_writer, told

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

INSERT = "INSERT INTO t (id, must, v) VALUES ($1, $2, $3)"
COLUMNS = ("id", "must", "v")
P = RetryPolicy(attempts=4, first_delay=0.001, max_delay=0.001)


async def documented_jsonb(conn: Any) -> None:
    await conn.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")


async def binary_jsonb(conn: Any) -> None:
    await conn.set_type_codec(
        "jsonb",
        encoder=lambda value: b"\x01" + json.dumps(value).encode(),
        decoder=lambda data: json.loads(bytes(data)[1:]),
        schema="pg_catalog",
        format="binary",
    )


async def case_of_text(conn: Any) -> None:
    """Whatever goes through it is seen at once: capitals on the way in, small letters on the way out."""
    for name in ("text", "varchar"):
        await conn.set_type_codec(
            name, encoder=str.upper, decoder=str.lower, schema="pg_catalog", format="text"
        )


async def strange_numbers(conn: Any) -> None:
    """Whole numbers that mean something else to the user."""
    for name in ("int4", "int8"):
        await conn.set_type_codec(
            name,
            encoder=lambda value: str(value + 1000),
            decoder=lambda text: f"number {text}",
            schema="pg_catalog",
            format="text",
        )


def half_bad(values: Sequence[Any]) -> list[tuple[int, int | None, Any]]:
    return [(n, None if n % 2 else n, value) for n, value in enumerate(values)]


@pytest.mark.parametrize(
    "values",
    [
        [[n] for n in range(40)],
        [[n, n + 1] for n in range(40)],
        [[[n], [n]] for n in range(40)],
        [[] for _ in range(40)],
        [["a", None] for _ in range(40)],
    ],
    ids=["lists of one", "lists of two", "lists of lists", "empty lists", "lists with a null"],
)
@pytest.mark.parametrize("writer", ["execute_many", "copy_into"])
async def test_a_list_under_a_jsonb_codec_is_stored_as_that_list(
    postgres_dsn: str, writer: str, values: list[Any]
) -> None:
    """The codec of asyncpg's documentation; for COPY, the same in binary.

    Never taken for an array's dimensions.
    """
    copies = writer == "copy_into"
    async with Engine.open(
        postgres_dsn, min_size=0, max_size=1, init=binary_jsonb if copies else documented_jsonb
    ) as engine:
        await engine.execute("CREATE TABLE t (id int PRIMARY KEY, must int NOT NULL, v jsonb)")
        write = batch(copy_into("t", columns=COLUMNS) if copies else execute_many(INSERT))
        for _ in range(3):
            await engine.execute("TRUNCATE t")
            result = await engine.run(write(half_bad(values)))
            assert told(result) == [(n, "23502") for n in range(1, 40, 2)]
            found = await engine.fetch("SELECT id, v FROM t ORDER BY id")
            assert [tuple(row) for row in found] == [(n, values[n]) for n in range(0, 40, 2)]


async def test_a_text_codec_that_copy_can_not_use_stops_the_batch_at_once(postgres_dsn: str) -> None:
    """asyncpg's binary COPY takes no text codec. All rows would meet it; the connection is in good health."""
    events: list[Event] = []
    async with Engine.open(
        postgres_dsn, min_size=0, max_size=1, init=documented_jsonb, observer=events.append
    ) as engine:
        await engine.execute("CREATE TABLE t (id int PRIMARY KEY, must int NOT NULL, v jsonb)")
        write = batch(copy_into("t", columns=COLUMNS), retry=P)
        with pytest.raises(asyncpg.InternalClientError, match="no binary format encoder"):
            await engine.run(write(half_bad([[1, 2]] * 10)))
        assert [event for event in events if isinstance(event, Retried)] == []
        assert engine.stats().evicted == 0
        assert await engine.fetchval("SELECT count(*) FROM t") == 0


async def test_one_batch_object_uses_the_codecs_of_the_connection_that_it_runs_on(postgres_dsn: str) -> None:
    """What it learned on an engine with other codecs changes nothing."""
    write = batch(execute_many(INSERT))
    async with (
        Engine.open(postgres_dsn, min_size=0, max_size=1) as plain,
        Engine.open(postgres_dsn, min_size=0, max_size=1, init=documented_jsonb) as coded,
    ):
        await plain.execute("CREATE TABLE t (id int PRIMARY KEY, must int NOT NULL, v jsonb)")
        for engine, value, stored in ((plain, "[1, 2]", "[1, 2]"), (coded, [3, 4], "[3, 4]")) * 2:
            await plain.execute("TRUNCATE t")
            result = await engine.run(write(half_bad([value] * 40)))
            assert told(result) == [(n, "23502") for n in range(1, 40, 2)]
            found = await plain.fetch("SELECT DISTINCT v::text AS v FROM t")
            assert [row["v"] for row in found] == [stored]


@pytest.mark.parametrize("writer", ["execute_many", "copy_into"])
async def test_a_value_that_a_codec_can_not_encode_costs_its_item_only(
    postgres_dsn: str, writer: str
) -> None:
    copies = writer == "copy_into"
    async with Engine.open(
        postgres_dsn, min_size=0, max_size=1, init=binary_jsonb if copies else documented_jsonb
    ) as engine:
        await engine.execute("CREATE TABLE t (id int PRIMARY KEY, must int NOT NULL, v jsonb)")
        write = batch(copy_into("t", columns=COLUMNS) if copies else execute_many(INSERT))
        values: list[Any] = [{"n": n} for n in range(40)]
        values[4] = values[30] = {1, 2}
        for _ in range(2):
            await engine.execute("TRUNCATE t")
            result = await engine.run(write(half_bad(values)))
            assert [failed.index for failed in result.failed] == sorted({4, 30, *range(1, 40, 2)})
            assert await engine.fetchval("SELECT count(*) FROM t") == 18


@pytest.mark.parametrize("of", ["enum", "extension's type"])
async def test_a_codec_for_a_type_of_the_users_own_is_used_whatever_share_is_bad(
    postgres_dsn: str, of: str
) -> None:
    """The driver keeps a codec of its own for such a type in the same place: it is told from the user's."""
    type_, value, stored = ("mood", 1, "sad") if of == "enum" else ("ltree", ("a", "b"), "a.b")

    async def coded(conn: Any) -> None:
        def encode(given: Any) -> str:
            return ["ok", "sad"][given] if of == "enum" else ".".join(given)

        await conn.set_type_codec(type_, encoder=encode, decoder=str, schema="public", format="text")

    async with Engine.open(postgres_dsn, min_size=0, max_size=1) as plain:
        await plain.execute("CREATE EXTENSION ltree; CREATE TYPE mood AS ENUM ('ok', 'sad')")
        await plain.execute(f"CREATE TABLE t (id int PRIMARY KEY, must int NOT NULL, v {type_})")
        write = batch(execute_many(INSERT))
        async with Engine.open(postgres_dsn, min_size=0, max_size=1, init=coded) as engine:
            for using, given in ((engine, value), (plain, stored)) * 2:
                await plain.execute("TRUNCATE t")
                result = await using.run(write(half_bad([given] * 40)))
                assert told(result) == [(n, "23502") for n in range(1, 40, 2)]
                found = await plain.fetch("SELECT DISTINCT v::text AS v FROM t")
                assert [row["v"] for row in found] == [stored]


class TestWhatIsOurOwnGoesThroughNoCodec:
    """Names, codes and numbers that we send and read ourselves."""

    TABLE = (
        "CREATE FUNCTION judge() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.id % 2 = 1 THEN "
        "RAISE EXCEPTION 'As Asked' USING ERRCODE = 'UE001', CONSTRAINT = 'My_Rule'; END IF; "
        "RETURN NEW; END $$; "
        "CREATE TABLE t (id numeric PRIMARY KEY, v uuid); "
        "CREATE TRIGGER judge BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION judge()"
    )

    @pytest.mark.parametrize("init", [case_of_text, strange_numbers], ids=["text", "numbers"])
    @pytest.mark.parametrize("writer", ROW_WRITERS)
    async def test_codes_names_and_places_of_failed_rows_are_the_servers(
        self, postgres_dsn: str, writer: str, init: Any
    ) -> None:
        async with Engine.open(postgres_dsn, min_size=0, max_size=1, init=init) as engine:
            await engine.execute(self.TABLE)
            rows = as_items(writer, [(n, None) for n in range(100)])
            write = batch(make_writer(writer, "t", ("id", "v")))
            for _ in range(2):
                await engine.execute("TRUNCATE t")
                result = await engine.run(write(rows))
                assert told(result) == [(n, "UE001") for n in range(1, 100, 2)]
                errors: list[Any] = [failed.error for failed in result.failed]
                assert {error.constraint_name for error in errors} == {"My_Rule"}
                assert {error.message for error in errors} == {"As Asked"}

    @pytest.mark.parametrize("init", [case_of_text, strange_numbers], ids=["text", "numbers"])
    async def test_a_ledger_knows_its_chunks_again(self, postgres_dsn: str, init: Any) -> None:
        async with (
            Engine.open(postgres_dsn, min_size=0, max_size=2, init=init) as engine,
            Engine.open(postgres_dsn, min_size=0, max_size=1) as plain,
        ):
            await plain.execute("CREATE TABLE t (id numeric PRIMARY KEY, v uuid)")
            for skipped in (0, 5):
                report = await ingest(
                    engine,
                    [(n, None) for n in range(50)],
                    batch(copy_into("t", columns=("id", "v"))),
                    size=10,
                    workers=2,
                    ledger=Ledger("Events-1"),
                )
                assert (report.read, report.written, report.rejected) == (50, 50 - 10 * skipped, 0)
                assert (report.skipped, report.chunks) == (skipped, 5 - skipped)
            assert await plain.fetchval("SELECT count(*) FROM t") == 50
            assert await plain.fetchval("SELECT DISTINCT name FROM dbop_raw_ledger") == "Events-1"
