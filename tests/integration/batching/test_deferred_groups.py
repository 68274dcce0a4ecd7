"""Items that stand or fall together.

Deferred constraints over several rows, and `batch(writer, together=key)`.

A constraint that looks at several rows at once (two rows that swap a unique value, a journal that must
balance) can't be checked row by row. With `together=` the group is the failure boundary; without it, what
must fall does, and few others.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import asyncpg
import pytest

import dbop_raw
from dbop_raw import (
    Batch,
    BatchResult,
    DbopError,
    Engine,
    PolicyError,
    SkipLimitExceeded,
    batch,
    each,
    execute_many,
    operation,
)
from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql
from tests.support.batching import QUICK, WRITERS, as_items, make_writer, told

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

COLUMNS = ("id", "journal", "amount")
SCHEMA = (
    "CREATE TABLE line (id int PRIMARY KEY, journal int NOT NULL, amount int NOT NULL CHECK (amount <> 13))",
    """
    CREATE FUNCTION balances() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF (SELECT sum(amount) FROM line WHERE journal = NEW.journal) <> 0 THEN
            RAISE EXCEPTION 'journal % does not balance', NEW.journal USING ERRCODE = '23514';
        END IF;
        RETURN NULL;
    END $$
    """,
    (
        "CREATE CONSTRAINT TRIGGER balances AFTER INSERT ON line DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION balances()"
    ),
    "CREATE TABLE seat (id int PRIMARY KEY, place int UNIQUE DEFERRABLE INITIALLY DEFERRED)",
    "CREATE TABLE part (id int PRIMARY KEY, of int NOT NULL, size int NOT NULL CHECK (size > 0))",
    "CREATE SEQUENCE met",
)

Row = tuple[int, int, int]


def together(writer: Any, key: Any, **options: Any) -> Batch[Any, Any]:
    make: Any = batch
    made: Batch[Any, Any] = make(writer, together=key, **options)
    return made


def group_failed() -> type[Exception]:
    found: type[Exception] = vars(dbop_raw)["GroupFailed"]
    return found


def line_writer(kind: str) -> Any:
    return make_writer(kind, "line", COLUMNS)


def journal_of(item: Any) -> int:
    return int(item[1])


def journals(count: int, unbalanced: Sequence[int] = (), *, mixed: bool = False) -> list[Row]:
    """Three lines each, whose sum is 0 and no part's is; of those that are unbalanced, no part's at all."""
    rows = [
        (3 * j + n, j, amount)
        for j in range(count)
        for n, amount in enumerate((50, 30, -70) if j in unbalanced else (50, 30, -80))
    ]
    if mixed:
        random.Random(count).shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    for statement in SCHEMA:
        run_sql(dsn, statement)
    yield dsn
    postgres_server.drop_database(dsn)


@pytest.fixture
async def engine(database: str) -> AsyncIterator[Engine]:
    async with Engine.open(database, min_size=0, max_size=1) as engine:
        await engine.execute(
            "TRUNCATE line, seat, part; ALTER SEQUENCE met RESTART; "
            "INSERT INTO seat SELECT n, n FROM generate_series(0, 39) AS n"
        )
        yield engine


async def stored_journals(engine: Engine) -> dict[int, int]:
    """How many lines each has."""
    rows = await engine.fetch("SELECT journal, count(*) AS n FROM line GROUP BY journal")
    return {row["journal"]: row["n"] for row in rows}


async def end(engine: Engine, op: Any, *, inside: bool) -> BatchResult[Any, Any]:
    """Run it up to COMMIT; or inside a transaction that goes on."""
    if not inside:
        result: BatchResult[Any, Any] = await engine.run(op)
        return result
    async with engine.transaction() as conn:
        result = await op(conn)
        await conn.execute("INSERT INTO part VALUES (1, 1, 1)")
    return result


INSIDE = pytest.mark.parametrize("inside", [False, True], ids=["checked at COMMIT", "inside a transaction"])


# ------------------------------------------------------------------------ without `together`: few others fall


@INSIDE
@pytest.mark.parametrize("writer", WRITERS)
async def test_journals_that_balance_are_written(engine: Engine, writer: str, inside: bool) -> None:
    rows = journals(20, mixed=True)
    result = await end(engine, batch(line_writer(writer))(as_items(writer, rows)), inside=inside)
    assert told(result) == []
    assert await stored_journals(engine) == dict.fromkeys(range(20), 3)


@INSIDE
@pytest.mark.parametrize("count", [4, 40])
@pytest.mark.parametrize("writer", WRITERS)
async def test_a_journal_that_does_not_balance_takes_few_others_with_it(
    engine: Engine, writer: str, count: int, inside: bool
) -> None:
    """Nobody said what belongs together, so what lies around it may fall too; but not each line of all
    journals.
    """
    bad = count // 2
    rows = journals(count, [bad])
    result = await end(engine, batch(line_writer(writer))(as_items(writer, rows)), inside=inside)
    fallen = {failed.index for failed in result.failed}
    assert fallen >= {3 * bad, 3 * bad + 1, 3 * bad + 2}
    assert {failed.verdict.sqlstate for failed in result.failed} == {"23514"}
    assert len(fallen) <= 3 + 3 * count // 4
    kept = {row[1] for index, row in enumerate(rows) if index not in fallen}
    assert await stored_journals(engine) == dict.fromkeys(kept, 3)


SWAP = "UPDATE seat SET place = $2 WHERE id = $1"


def swap_writer(kind: str) -> Any:
    @operation
    async def move(conn: Any, row: tuple[int, int]) -> None:
        await conn.execute(SWAP, *row)

    return {"each": each(move), "execute_many": execute_many(SWAP)}[kind]


def swaps(pairs: int) -> list[tuple[int, int]]:
    return [move for n in range(pairs) for move in ((2 * n, 2 * n + 1), (2 * n + 1, 2 * n))]


@INSIDE
@pytest.mark.parametrize("writer", ["each", "execute_many"])
async def test_swaps_beside_a_seat_that_is_taken_are_done(engine: Engine, writer: str, inside: bool) -> None:
    """One item asks for a seat that nobody leaves: it falls, and none of those who swap."""
    moves = [*swaps(5), (30, 35), (12, 13), (13, 12)]
    result = await end(engine, batch(swap_writer(writer))(moves), inside=inside)
    assert told(result) == [(10, "23505")]
    found = {row["id"]: row["place"] for row in await engine.fetch("SELECT id, place FROM seat")}
    assert found == {n: n for n in range(40)} | dict(swaps(5)) | {12: 13, 13: 12}


# --------------------------------------------------------------------------------- with `together`: the group


@INSIDE
@pytest.mark.parametrize("mixed", [False, True], ids=["in a row", "mixed"])
@pytest.mark.parametrize("writer", WRITERS)
async def test_a_journal_that_does_not_balance_falls_alone(
    engine: Engine, writer: str, mixed: bool, inside: bool
) -> None:
    rows = journals(40, [3, 21, 22], mixed=mixed)
    write = together(line_writer(writer), journal_of)
    for _ in range(2):
        await engine.execute("TRUNCATE line, part")
        result = await end(engine, write(as_items(writer, rows)), inside=inside)
        lost = [index for index, row in enumerate(rows) if row[1] in {3, 21, 22}]
        assert [failed.index for failed in result.failed] == lost
        assert await stored_journals(engine) == dict.fromkeys(set(range(40)) - {3, 21, 22}, 3)
        assert result.written == 120 - 9
        for journal in (3, 21, 22):
            group: list[Any] = [f.error for f in result.failed if journal_of(f.item) == journal]
            own = [error for error in group if isinstance(error, asyncpg.CheckViolationError)]
            assert own
            companions = [error for error in group if error not in own]
            assert all(type(error) is group_failed() for error in companions)
            assert all(error.__cause__ in own for error in companions)
            assert f"journal {journal} " in str(own[0])


def part_writer(kind: str) -> Any:
    return make_writer(kind, "part", ("id", "of", "size"))


@pytest.mark.parametrize("mixed", [False, True], ids=["in a row", "mixed"])
@pytest.mark.parametrize("share", [0, 1, 30, 100])
@pytest.mark.parametrize("writer", WRITERS)
async def test_an_item_that_is_refused_takes_its_group_and_nobody_else(
    engine: Engine, writer: str, share: int, mixed: bool
) -> None:
    """Groups of one to five; the refused item has the server's error, its companions one that names it as
    cause.
    """
    chance = random.Random(share)
    groups = [(of, chance.randint(1, 5)) for of in range(100)]
    bad = set(chance.sample(range(100), share))
    rows: list[Row] = []
    for of, size in groups:
        worst = chance.randrange(size) if of in bad else None
        rows += [(10 * of + n, of, 0 if n == worst else 1) for n in range(size)]
    if mixed:
        chance.shuffle(rows)
    items = as_items(writer, rows)
    write = together(part_writer(writer), journal_of)
    for _ in range(3):
        await engine.execute("TRUNCATE part")
        result = await engine.run(write(items))
        assert [failed.index for failed in result.failed] == [
            i for i, row in enumerate(rows) if row[1] in bad
        ]
        found = [row["id"] for row in await engine.fetch("SELECT id FROM part ORDER BY id")]
        assert found == sorted(row[0] for row in rows if row[1] not in bad)
        own = {journal_of(f.item): f.error for f in result.failed if rows[f.index][2] == 0}
        assert {type(error) for error in own.values()} <= {asyncpg.CheckViolationError}
        for failed in result.failed:
            if rows[failed.index][2] != 0:
                assert type(failed.error) is group_failed()
                assert failed.error.__cause__ is own[journal_of(failed.item)]
                assert not failed.verdict.transient
        if writer == "each":
            lost = {failed.index for failed in result.failed}
            assert list(result.results) == [None if i in lost else row[0] for i, row in enumerate(rows)]


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_misfit_takes_its_group_too(engine: Engine, writer: str) -> None:
    """What the client can't send."""
    rows: list[Any] = [(n, n // 3, 1) for n in range(30)]
    items = as_items(writer, rows)
    items[10] = (items[10][0], items[10][1], object())
    result = await engine.run(together(part_writer(writer), journal_of)(items))
    assert [failed.index for failed in result.failed] == [9, 10, 11]
    assert [type(failed.error) is group_failed() for failed in result.failed] == [True, False, True]
    assert {failed.error.__cause__ for failed in result.failed if failed.index != 10} == {
        result.failed[1].error
    }
    assert await engine.fetchval("SELECT count(*) FROM part") == 27


@INSIDE
@pytest.mark.parametrize("writer", ["each", "execute_many"])
async def test_a_swap_with_a_seat_that_is_taken_falls_with_its_group(
    engine: Engine, writer: str, inside: bool
) -> None:
    moves = [*swaps(5), (30, 35), (31, 30), (12, 13), (13, 12)]
    write = together(swap_writer(writer), lambda move: move[0] // 2)
    result = await end(engine, write(moves), inside=inside)
    assert [failed.index for failed in result.failed] == [10, 11]
    found = {row["id"]: row["place"] for row in await engine.fetch("SELECT id, place FROM seat")}
    assert found == {n: n for n in range(40)} | dict(swaps(5)) | {12: 13, 13: 12}


@pytest.mark.parametrize("writer", WRITERS)
async def test_an_item_that_only_collides_with_a_group_that_falls_is_written(
    engine: Engine, writer: str
) -> None:
    rows: list[Row] = [(5, 1, 1), (5, 2, 1), (6, 2, 1), (7, 1, 0)]
    result = await engine.run(together(part_writer(writer), journal_of)(as_items(writer, rows)))
    assert [failed.index for failed in result.failed] == [0, 3]
    assert [row["of"] for row in await engine.fetch("SELECT of FROM part")] == [2, 2]


@pytest.mark.parametrize("writer", WRITERS)
async def test_companions_count_for_the_skip_limit(engine: Engine, writer: str) -> None:
    rows = [(n, n // 3, 0 if n == 10 else 1) for n in range(30)]
    items = as_items(writer, rows)
    with pytest.raises(SkipLimitExceeded) as raised:
        await engine.run(together(part_writer(writer), journal_of, skip_limit=2)(items))
    assert [failed.index for failed in raised.value.failed] == [9, 10, 11]
    assert await engine.fetchval("SELECT count(*) FROM part") == 0
    result = await engine.run(together(part_writer(writer), journal_of, skip_limit=3)(items))
    assert len(result.failed) == 3


async def test_a_group_that_waits_for_a_lock_is_tried_again_as_one(engine: Engine) -> None:
    @operation
    async def add(conn: Any, row: Row) -> None:
        await conn.execute("INSERT INTO part (id, of, size) VALUES ($1, $2, $3)", *row)
        if row[0] == 10 and await conn.fetchval("SELECT nextval('met')") == 1:
            await conn.execute("DO $$ BEGIN RAISE EXCEPTION 'busy' USING ERRCODE = '55P03'; END $$")

    rows = [(n, n // 3, 1) for n in range(30)]
    result = await engine.run(together(each(add), journal_of, retry=QUICK)(rows))
    assert told(result) == []
    assert result.retries == 1
    assert await engine.fetchval("SELECT count(*) FROM part") == 30


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_key_that_can_not_be_told_costs_its_item_only(engine: Engine, writer: str) -> None:
    def key(item: Any) -> Any:
        if int(item[0]) == 4:
            raise LookupError("no key")
        return [] if int(item[0]) == 7 else item[1]

    rows = [(n, n // 3, 1) for n in range(30)]
    result = await engine.run(together(part_writer(writer), key)(as_items(writer, rows)))
    assert [(f.index, type(f.error)) for f in result.failed] == [(4, LookupError), (7, TypeError)]
    assert await engine.fetchval("SELECT count(*) FROM part") == 28


def test_what_is_no_key_function_is_refused_when_the_batch_is_made() -> None:
    for key in ("id", 1, ("id",)):
        with pytest.raises(PolicyError, match="together"):
            together(part_writer("copy_into"), key)


async def test_a_companions_error_survives_pickling_and_is_ours(engine: Engine) -> None:
    rows = [(n, n // 3, 0 if n == 1 else 1) for n in range(6)]
    result = await engine.run(together(part_writer("copy_into"), journal_of)(rows))
    error = result.failed[0].error
    assert isinstance(error, DbopError)
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    fields: Callable[[Any], Any] = lambda one: {k: v for k, v in vars(one).items() if not k.startswith("_")}  # noqa: E731
    assert fields(copied).keys() == fields(error).keys()
