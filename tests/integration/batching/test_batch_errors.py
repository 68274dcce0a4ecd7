"""What stops a batch, what is tried again, and what costs one item only: against a real server."""

from __future__ import annotations

import datetime as dt
import decimal
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import asyncpg
import pytest

from dbop_raw import (
    Batch,
    BatchResult,
    Engine,
    Event,
    PolicyError,
    Repair,
    RetriesExhausted,
    RetryPolicy,
    Rule,
    SkipLimitExceeded,
    batch,
    copy_into,
    copy_text,
    each,
    execute_many,
    operation,
    pipe,
    retry,
    timeout,
)
from dbop_raw.batching.costs import CostModel
from dbop_raw.events import Retried
from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql

pytestmark = pytest.mark.anyio

P = RetryPolicy(attempts=3, first_delay=0.001, max_delay=0.001)
WRITERS = ("each", "execute_many", "copy_into", "copy_text")
ROW_WRITERS = ("execute_many", "copy_into", "copy_text")

# A table whose trigger refuses a row as its body says: `raise CODE`, `raise CODE once` (until a sequence has
# been drawn from), `lock N` (takes the row N of another table).
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
COLUMNS = ("id", "body")
INSERT = "INSERT INTO item (id, body) VALUES ($1, $2)"


@operation
async def add_item(conn: Any, row: tuple[int, str]) -> int:
    return int(await conn.fetchval(INSERT + " RETURNING id", *row))


def make_batch(writer: str, **options: Any) -> Batch[Any, Any]:
    makers: dict[str, Callable[[], Any]] = {
        "each": lambda: each(add_item),
        "execute_many": lambda: execute_many(INSERT),
        "copy_into": lambda: copy_into("item", columns=COLUMNS),
        "copy_text": lambda: copy_text("item", columns=COLUMNS),
    }
    return batch(makers[writer](), **options)


def prefer_rows(write: Batch[Any, Any]) -> Batch[Any, Any]:
    """As if earlier batches had been full of bad rows, and rows cheap to try alone."""
    write._costs = CostModel(seen=1000, bad=500, attempt=1e-3, row=1e-5, row_alone=1e-6)
    return write


def never_rows(write: Batch[Any, Any]) -> Batch[Any, Any]:
    """As if the server could not try row by row."""
    write._costs = CostModel(rows_possible=False)
    return write


def items_for(writer: str, bodies: Mapping[int, str | None], total: int = 100) -> list[Any]:
    rows = [(n, bodies.get(n, "fine")) for n in range(total)]
    return [(str(n), body) for n, body in rows] if writer == "copy_text" else rows


def told(result: BatchResult[Any, Any]) -> list[tuple[int, str]]:
    return [
        (failed.index, failed.verdict.sqlstate or type(failed.error).__name__) for failed in result.failed
    ]


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    for statement in SCHEMA:
        run_sql(dsn, statement)
    yield dsn
    postgres_server.drop_database(dsn)


@asynccontextmanager
async def engine_on(dsn: str, **options: Any) -> AsyncIterator[Engine]:
    async with Engine.open(dsn, min_size=0, max_size=3, **options) as engine:
        yield engine


@pytest.fixture
async def engine(database: str) -> AsyncIterator[Engine]:
    async with engine_on(database) as engine:
        await engine.execute("TRUNCATE item; ALTER SEQUENCE met RESTART")
        yield engine


async def count(engine: Engine, table: str = "item") -> int:
    return int(await engine.fetchval(f"SELECT count(*) FROM {table}"))


@pytest.mark.parametrize("rows", [prefer_rows, never_rows], ids=["row by row", "in spans"])
@pytest.mark.parametrize("writer", WRITERS)
class TestWhatStopsABatch:
    async def test_a_wrong_statement_stops_it_at_once(self, engine: Engine, writer: str, rows: Any) -> None:
        """Class 42: every row would meet it."""
        started = 0

        async def wrong(conn: Any) -> None:
            nonlocal started
            started += 1
            await conn.execute("INSERT INTO nowhere VALUES (1)")

        writers = {
            "each": each(lambda _: wrong),
            "execute_many": execute_many("INSERT INTO nowhere VALUES ($1::int, $2::text)"),
            "copy_into": copy_into("nowhere", columns=COLUMNS),
            "copy_text": copy_text("nowhere", columns=COLUMNS),
        }
        write: Batch[Any, Any] = rows(batch(writers[writer], retry=P))  # type: ignore[arg-type]
        with pytest.raises(asyncpg.UndefinedTableError):
            await engine.run(write(items_for(writer, {})))
        assert started <= 1

    @pytest.mark.parametrize("code", ["53100", "42883", "57014", "53400"])
    async def test_an_error_that_all_share_is_never_blamed_on_rows(
        self, engine: Engine, writer: str, rows: Any, code: str
    ) -> None:
        write = rows(make_batch(writer, retry=P))
        with pytest.raises(asyncpg.PostgresError) as raised:
            await engine.run(write(items_for(writer, {40: f"raise {code}", 41: "raise 23514"})))
        assert raised.value.sqlstate == code
        assert await count(engine) == 0

    @pytest.mark.parametrize("code", ["40001", "40P01", "53200"])
    async def test_what_needs_a_new_transaction_leaves_the_batch_and_the_run_tries_all_again(
        self, engine: Engine, writer: str, rows: Any, code: str
    ) -> None:
        events: list[Event] = []
        async with engine_on(engine_dsn(engine), observer=events.append) as watched:
            write = rows(make_batch(writer, retry=P))
            result = await watched.run(
                write(items_for(writer, {40: f"raise {code} once", 41: "raise 23514"}))
            )
        assert told(result) == [(41, "23514")]
        assert await count(engine) == 99
        assert [e.level for e in events if isinstance(e, Retried)] == ["transaction"]

    async def test_without_a_policy_it_is_raised_unchanged(
        self, engine: Engine, writer: str, rows: Any
    ) -> None:
        with pytest.raises(asyncpg.SerializationError):
            await engine.run(rows(make_batch(writer))(items_for(writer, {40: "raise 40001"})))
        assert await count(engine) == 0

    async def test_skip_limit_items_may_fail_and_one_more_undoes_all(
        self, engine: Engine, writer: str, rows: Any
    ) -> None:
        bad = dict.fromkeys((3, 50, 98), "raise 23514")
        with pytest.raises(SkipLimitExceeded) as raised:
            await engine.run(rows(make_batch(writer, skip_limit=2))(items_for(writer, bad)))
        assert raised.value.limit == 2
        assert [failed.index for failed in raised.value.failed] == [3, 50, 98]
        assert await count(engine) == 0
        result = await engine.run(rows(make_batch(writer, skip_limit=3))(items_for(writer, bad)))
        assert [failed.index for failed in result.failed] == [3, 50, 98]
        assert await count(engine) == 97

    async def test_with_a_skip_limit_of_0_the_first_bad_item_stops_it(
        self, engine: Engine, writer: str, rows: Any
    ) -> None:
        with pytest.raises(SkipLimitExceeded):
            await engine.run(rows(make_batch(writer, skip_limit=0))(items_for(writer, {99: None})))
        assert await count(engine) == 0

    async def test_an_engines_own_row_makes_an_internal_error_an_items_failure(
        self, engine: Engine, writer: str, rows: Any
    ) -> None:
        """A distributed engine tells of a NOT NULL violation with XX000."""
        items = items_for(writer, {7: "raise XX000", 70: "raise XX000"})
        with pytest.raises(asyncpg.InternalServerError):
            await engine.run(rows(make_batch(writer))(items))
        verdicts = {"XX000": Rule(Repair.NEVER, item=True)}
        async with engine_on(engine_dsn(engine), verdicts=verdicts) as distributed:
            result = await distributed.run(rows(make_batch(writer))(items))
        assert told(result) == [(7, "XX000"), (70, "XX000")]
        assert await count(engine) == 98

    async def test_an_engines_own_row_makes_an_items_failure_stop_the_batch(
        self, engine: Engine, writer: str, rows: Any
    ) -> None:
        async with engine_on(engine_dsn(engine), verdicts={"23514": Rule(Repair.NEVER)}) as strict:
            with pytest.raises(asyncpg.CheckViolationError):
                await strict.run(rows(make_batch(writer))(items_for(writer, {7: "raise 23514"})))
        assert await count(engine) == 0

    async def test_one_batch_follows_the_rows_of_the_engine_that_runs_it(
        self, engine: Engine, writer: str, rows: Any
    ) -> None:
        write = rows(make_batch(writer))
        items = items_for(writer, {7: "raise UE001", 70: "raise 23514"})
        result = await engine.run(write(items))
        assert told(result) == [(7, "UE001"), (70, "23514")]
        await engine.execute("TRUNCATE item")
        async with engine_on(engine_dsn(engine), verdicts={"UE001": Rule(Repair.NEVER)}) as strict:
            with pytest.raises(asyncpg.PostgresError) as raised:
                await strict.run(rows(write)(items))
        assert raised.value.sqlstate == "UE001"

    async def test_a_code_of_the_users_own_costs_its_item_only(
        self, engine: Engine, writer: str, rows: Any
    ) -> None:
        write = rows(make_batch(writer))
        result = await engine.run(write(items_for(writer, {0: "raise P0001", 99: "raise UE001"})))
        assert told(result) == [(0, "P0001"), (99, "UE001")]
        assert str(result.failed[0].error) == "as asked"


def engine_dsn(engine: Engine) -> str:
    """Where the engine's pool connects to."""
    pool: Any = engine._capacity._pool
    dsn: str = pool._connect_args[0]
    return dsn


@pytest.mark.parametrize("rows", [prefer_rows, never_rows], ids=["row by row", "in spans"])
@pytest.mark.parametrize("writer", WRITERS)
class TestWhatIsTriedAgainAtTheSavepoint:
    async def test_an_item_that_outlasts_its_tries_fails_alone_and_stays_transient(
        self, engine: Engine, database: str, writer: str, rows: Any
    ) -> None:
        """A row locked by another session: the batch waits lock_timeout, `attempts` times, for that item."""
        events: list[Event] = []
        blocker = await asyncpg.connect(database)
        try:
            await blocker.execute("BEGIN; SELECT FROM other WHERE id = 1 FOR UPDATE")
            async with engine_on(database, observer=events.append) as watched:
                op = pipe(
                    rows(make_batch(writer, retry=P))(
                        items_for(writer, {5: "lock 1", 6: "lock 2", 7: None}, 20)
                    ),
                    timeout(20, lock=0.03),
                )
                result = await watched.run(op)
        finally:
            await blocker.close()
        assert told(result) == [(5, "55P03"), (7, "23502")]
        assert result.failed[0].verdict.transient
        assert not result.failed[1].verdict.transient
        assert result.written == 18 == await count(engine)
        assert result.retries == P.attempts - 1
        assert [e.level for e in events if isinstance(e, Retried)] == ["savepoint"] * (P.attempts - 1)

    async def test_a_passing_failure_costs_nothing_but_time(
        self, engine: Engine, writer: str, rows: Any
    ) -> None:
        write = rows(make_batch(writer, retry=P))
        result = await engine.run(write(items_for(writer, {5: "raise 55P03 once", 9: "raise 23514"})))
        assert told(result) == [(9, "23514")]
        assert await count(engine) == 99

    async def test_without_a_policy_it_is_not_tried_again(
        self, engine: Engine, writer: str, rows: Any
    ) -> None:
        result = await engine.run(rows(make_batch(writer))(items_for(writer, {5: "raise 55P03"})))
        assert told(result) == [(5, "55P03")]
        assert result.retries == 0
        assert await count(engine) == 99


class TestOperationsOfTheirOwn:
    async def test_results_stand_at_their_items_index(self, engine: Engine) -> None:
        async def square(conn: Any, number: int) -> int:
            if number % 3 == 0:
                await conn.execute("SELECT 1/0")
            return int(await conn.fetchval("SELECT $1::int * $1::int", number))

        def make(number: int) -> Callable[[Any], Any]:
            return lambda conn: square(conn, number)

        result = await engine.run(batch(each(make))(range(100)))
        assert result.results == tuple(n * n if n % 3 else None for n in range(100))
        assert [failed.index for failed in result.failed] == list(range(0, 100, 3))
        assert [failed.item for failed in result.failed] == list(range(0, 100, 3))
        assert {failed.verdict.sqlstate for failed in result.failed} == {"22012"}

    async def test_an_items_own_retry_is_final_for_the_item(self, engine: Engine) -> None:
        """Its tries are not multiplied by the batch's; the verdict tells of the error behind."""
        started = 0

        @operation
        async def locked(conn: Any, number: int) -> int:
            nonlocal started
            if number == 3:
                started += 1
                await conn.execute("INSERT INTO item VALUES (3, 'raise 55P03')")
            return number

        def make(number: int) -> Any:
            return pipe(locked(number), retry(P))

        result = await engine.run(batch(each(make), retry=P)([0, 1, 2, 3]))
        assert [failed.index for failed in result.failed] == [3]
        assert isinstance(result.failed[0].error, RetriesExhausted)
        assert result.failed[0].verdict.sqlstate == "55P03"
        assert result.failed[0].verdict.transient
        assert started == P.attempts

    async def test_an_error_of_the_users_code_costs_its_item_only(self, engine: Engine) -> None:
        async def body(conn: Any, number: int) -> int:
            await conn.execute("INSERT INTO item VALUES ($1, 'x')", number)
            if number == 2:
                raise LookupError(number)
            return number

        def make(number: int) -> Callable[[Any], Any]:
            if number == 4:
                raise KeyError(number)
            return lambda conn: body(conn, number)

        result = await engine.run(batch(each(make))(range(6)))
        assert told(result) == [(2, "LookupError"), (4, "KeyError")]
        assert result.results == (0, 1, None, 3, None, 5)
        assert await count(engine) == 4

    async def test_an_item_that_swallows_an_error_of_its_own_stops_the_batch(self, engine: Engine) -> None:
        """Its transaction has failed unseen: nothing of the batch may be taken for written."""

        async def body(conn: Any, number: int) -> int:
            await conn.execute("INSERT INTO item VALUES ($1, 'x')", number)
            if number == 2:
                with pytest.raises(asyncpg.PostgresError):
                    await conn.execute("SELECT 1/0")
            return number

        def make(number: int) -> Callable[[Any], Any]:
            return lambda conn: body(conn, number)

        with pytest.raises(Exception, match=r"aborted|ROLLBACK"):
            await engine.run(batch(each(make))(range(3)))
        assert await count(engine) == 0


class TestDeferredConstraints:
    TREE = "CREATE TABLE node (id int PRIMARY KEY, up int REFERENCES node DEFERRABLE INITIALLY DEFERRED)"
    ADD = "INSERT INTO node VALUES ($1, $2)"

    @pytest.fixture
    async def tree(self, engine: Engine) -> AsyncIterator[Engine]:
        await engine.execute("DROP TABLE IF EXISTS node")
        await engine.execute(self.TREE)
        yield engine
        await engine.execute("DROP TABLE node")

    def write(self, writer: str, **options: Any) -> Batch[Any, Any]:
        @operation
        async def add(conn: Any, row: Sequence[Any]) -> None:
            await conn.execute(self.ADD, *row)

        makers: dict[str, Any] = {
            "each": each(add),
            "execute_many": execute_many(self.ADD),
            "copy_into": copy_into("node", columns=("id", "up")),
        }
        return batch(makers[writer], **options)

    @pytest.mark.parametrize("writer", ["each", "execute_many", "copy_into"])
    async def test_a_row_may_refer_to_a_later_one(self, tree: Engine, writer: str) -> None:
        result = await tree.run(self.write(writer)([(1, 2), (2, 3), (3, None)]))
        assert result.failed == ()
        assert await count(tree, "node") == 3

    @pytest.mark.parametrize("writer", ["each", "execute_many", "copy_into"])
    async def test_and_still_may_where_another_row_refers_to_nothing(self, tree: Engine, writer: str) -> None:
        """The one is blamed, and the others are not for having been early."""
        rows = [(1, 2), (2, 3), (3, None), (4, 99), (5, 4), (6, 3)]
        result = await tree.run(self.write(writer)(rows))
        assert told(result) == [(3, "23503"), (4, "23503")]
        assert [row["id"] for row in await tree.fetch("SELECT id FROM node ORDER BY id")] == [1, 2, 3, 6]

    @pytest.mark.parametrize("writer", ["each", "execute_many", "copy_into"])
    async def test_rows_that_were_only_early_do_not_count_for_the_skip_limit(
        self, tree: Engine, writer: str
    ) -> None:
        rows = [(1, 2), (2, 3), (3, None), (4, 99)]
        result = await tree.run(self.write(writer, skip_limit=1)(rows))
        assert told(result) == [(3, "23503")]
        with pytest.raises(SkipLimitExceeded) as raised:
            await tree.run(self.write(writer, skip_limit=0)([(11, 12), (12, None), (13, 99)]))
        assert [failed.index for failed in raised.value.failed] == [2]
        assert await count(tree, "node") == 3

    @pytest.mark.parametrize("writer", ["each", "execute_many", "copy_into"])
    async def test_inside_a_transaction_they_are_blamed_before_the_block_goes_on(
        self, tree: Engine, writer: str
    ) -> None:
        async with tree.transaction() as conn:
            result = await self.write(writer)([(1, 2), (2, None), (3, 99)])(conn)
            assert told(result) == [(2, "23503")]
            await conn.execute("INSERT INTO node VALUES (4, 1)")
        assert await count(tree, "node") == 3

    async def test_after_a_clean_batch_the_rest_of_the_transaction_may_still_be_early(
        self, tree: Engine
    ) -> None:
        """The check must not change the caller's transaction for good."""
        async with tree.transaction() as conn:
            await self.write("execute_many")([(1, None)])(conn)
            await conn.execute("INSERT INTO node VALUES (2, 3)")
            await conn.execute("INSERT INTO node VALUES (3, NULL)")
        assert await count(tree, "node") == 3

    async def test_what_was_violated_before_the_batch_is_not_blamed_on_it(self, tree: Engine) -> None:
        async def body(conn: Any) -> None:
            await conn.execute("INSERT INTO node VALUES (1, 99)")
            await self.write("execute_many")([(2, None)])(conn)

        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await tree.run(body)
        assert await count(tree, "node") == 0


# ------------------------------------------------------------------------- COPY, and row by row: the same


HOSTILE = "we\"ird; DROP TABLE item; -- $$ ' \\ ä %s {0}"
TYPES = (
    "DROP SCHEMA IF EXISTS types CASCADE",
    "CREATE SCHEMA types",
    "CREATE TYPE types.mood AS ENUM ('ok', 'sad')",
    "CREATE DOMAIN types.small AS int CHECK (VALUE < 100)",
    "CREATE DOMAIN types.brief AS varchar(3)",
    "CREATE DOMAIN types.briefer AS types.brief CHECK (VALUE <> 'no')",
    """
    CREATE TABLE types.all_of_them (
        id int GENERATED ALWAYS AS IDENTITY,
        given bigint NOT NULL,
        twice bigint GENERATED ALWAYS AS (given * 2) STORED,
        short varchar(3),
        mood types.mood,
        small types.small,
        price numeric(8, 2),
        doc jsonb,
        raw bytea,
        at timestamptz,
        flag boolean DEFAULT true,
        fixed char(2),
        brief types.briefer,
        bits bit(2),
        tiny "char",
        span interval(0)
    )
    """,
)
TYPE_COLUMNS = ("id", "given", "short", "mood", "small", "price", "doc", "raw", "at", "fixed", "brief")
AT = dt.datetime(2026, 2, 28, 23, 59, 59, 123456, tzinfo=dt.UTC)


def typed_rows(writer: str) -> tuple[list[Any], list[tuple[int, str]]]:
    """Rows of all types, of which some do not fit; and how they fail."""
    good: dict[str, Any] = {
        "short": "abc",
        "mood": "ok",
        "small": 5,
        "price": decimal.Decimal("12.34"),
        "doc": json.dumps({"a": [1, None]}),
        "raw": b"\x00\xff",
        "at": AT,
        "fixed": "ab",
        "brief": "abc",
    }
    bad: dict[int, tuple[str, Any, str, str]] = {
        3: ("short", "abcd", "22001", "22001"),
        # Binary, the server reads all values of a column at once: it can't try these row by row.
        **({8: ("mood", "angry", "22P02", "22P02")} if writer == "copy_text" else {}),
        13: ("small", 100, "23514", "23514"),
        18: ("price", decimal.Decimal("1e7"), "22003", "22003"),
        **({23: ("doc", "{broken", "22P02", "22P02")} if writer == "copy_text" else {}),
        28: ("fixed", "abc", "22001", "22001"),
        29: ("brief", "abcd", "22001", "22001"),
        30: ("brief", "no", "23514", "23514"),
        33: ("given", None, "23502", "23502"),
        38: ("id", None, "23502", "23502"),
        43: ("short", "ab \N{SNOWMAN} ", "22001", "22001"),
    }
    rows, failed = [], []
    for n in range(60):
        row = {"id": 100 + n, "given": n, **good, "at": AT + dt.timedelta(days=n)}
        if n % 7 == 0:
            row |= dict.fromkeys(good)
        if n == 50:
            row["short"] = "ab     "  # too long by spaces only: they are cut, as SQL says
        if n in bad:
            name, value, binary, text = bad[n]
            row[name] = value
            failed.append((n, text if writer == "copy_text" else binary))
        rows.append(tuple(row[name] for name in TYPE_COLUMNS))
    return ([tuple(_text(v) for v in row) for row in rows] if writer == "copy_text" else rows), failed


def _text(value: Any) -> str | None:
    if value is None:
        return None
    return "\\x" + value.hex() if isinstance(value, bytes) else str(value)


@pytest.mark.parametrize("writer", ["copy_into", "copy_text"])
class TestCopyAndRowByRowAreTheSame:
    async def both(
        self, engine: Engine, make: Callable[[], Batch[Any, Any]], items: Sequence[Any], table: str
    ) -> tuple[list[tuple[int, str]], list[Any]]:
        """The failures and the rows, of which it is asserted that both ways give the same."""
        found = []
        for prepare in (never_rows, prefer_rows):
            await engine.execute(f"TRUNCATE {table} RESTART IDENTITY")
            write = prepare(make())
            result = await engine.run(write(items))
            rows = [tuple(row) for row in await engine.fetch(f"SELECT * FROM {table} AS t ORDER BY t::text")]
            found.append((told(result), rows))
            if prepare is prefer_rows:
                assert cast("Any", write._writer)._in_server, "the server was never asked to try row by row"
                assert write._costs.rows_possible
        assert found[0] == found[1]
        return found[0]

    async def test_for_identity_generated_enum_domain_numeric_json_bytea_and_time(
        self, engine: Engine, writer: str
    ) -> None:
        for statement in TYPES:
            await engine.execute(statement)
        make = copy_into if writer == "copy_into" else copy_text
        items, expected = typed_rows(writer)
        failed, rows = await self.both(
            engine,
            lambda: batch(make("all_of_them", columns=TYPE_COLUMNS, schema="types")),
            items,
            "types.all_of_them",
        )
        assert failed == expected
        assert len(rows) == 60 - len(expected)
        assert {row[0] for row in rows} == {100 + n for n in range(60)} - {100 + n for n, _ in expected}
        assert all(row[2] == row[1] * 2 and row[10] for row in rows)
        assert {row[11] for row in rows} == {"ab", None}
        await engine.execute("DROP SCHEMA types CASCADE")

    async def test_for_hostile_names(self, engine: Engine, writer: str) -> None:
        quoted = '"' + HOSTILE.replace('"', '""') + '"'
        relation = f"{quoted}.{quoted}"
        await engine.execute(f"DROP SCHEMA IF EXISTS {quoted} CASCADE; CREATE SCHEMA {quoted}")
        await engine.execute(f'CREATE TABLE {relation} ({quoted} int PRIMARY KEY, d_first text, "d_1" int)')
        make = copy_into if writer == "copy_into" else copy_text
        rows: list[Any] = [(n if n % 5 else 0, "x", n) for n in range(50)]
        if writer == "copy_text":
            rows = [tuple(map(str, row)) for row in rows]
        failed, _ = await self.both(
            engine,
            lambda: batch(make(HOSTILE, columns=(HOSTILE, "d_first", "d_1"), schema=HOSTILE)),
            rows,
            relation,
        )
        assert failed == [(n, "23505") for n in range(5, 50, 5)]
        await engine.execute(f"DROP SCHEMA {quoted} CASCADE")

    async def test_for_a_partitioned_table_and_a_view(self, engine: Engine, writer: str) -> None:
        """Routed rows fail in a partition, whose name is another."""
        await engine.execute(
            "DROP TABLE IF EXISTS measured CASCADE; "
            "CREATE TABLE measured (id int PRIMARY KEY, v int CHECK (v > 0)) PARTITION BY RANGE (id); "
            "CREATE TABLE measured_0 PARTITION OF measured FOR VALUES FROM (0) TO (50); "
            "CREATE TABLE measured_1 PARTITION OF measured FOR VALUES FROM (50) TO (100)"
        )
        make = copy_into if writer == "copy_into" else copy_text
        rows: list[Any] = [(n, 0 if n % 11 == 1 else 1) for n in range(110)]
        if writer == "copy_text":
            rows = [tuple(map(str, row)) for row in rows]
        failed, found = await self.both(
            engine, lambda: batch(make("measured", columns=("id", "v"))), rows, "measured"
        )
        assert failed == [(n, "23514") for n in range(110) if n % 11 == 1 or n >= 100]
        assert len(found) == 110 - len(failed)
        await engine.execute("DROP TABLE measured")

    async def test_for_triggers_that_change_or_drop_rows(self, engine: Engine, writer: str) -> None:
        await engine.execute(
            "DROP TABLE IF EXISTS judged; CREATE TABLE judged (id int PRIMARY KEY, v text); "
            "CREATE OR REPLACE FUNCTION rework() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF NEW.v = 'drop' THEN RETURN NULL; END IF; NEW.v := upper(NEW.v); RETURN NEW; END $$; "
            "CREATE TRIGGER t BEFORE INSERT ON judged FOR EACH ROW EXECUTE FUNCTION rework()"
        )
        make = copy_into if writer == "copy_into" else copy_text
        rows: list[Any] = [(n if n != 7 else 6, "drop" if n % 10 == 0 else "x") for n in range(40)]
        if writer == "copy_text":
            rows = [tuple(map(str, row)) for row in rows]
        failed, found = await self.both(
            engine, lambda: batch(make("judged", columns=("id", "v"))), rows, "judged"
        )
        assert failed == [(7, "23505")]
        assert {row[1] for row in found} == {"X"}
        assert len(found) == 40 - 4 - 1

    async def test_after_a_column_has_changed_its_type(self, engine: Engine, writer: str) -> None:
        """What was learned of the table must not change a value on its way: '007' is no number now."""
        await engine.execute(
            "DROP TABLE IF EXISTS changing; CREATE TABLE changing (id int PRIMARY KEY, v int)"
        )
        make = copy_into if writer == "copy_into" else copy_text
        write = batch(make("changing", columns=("id", "v")))
        seven: Any = "7" if writer == "copy_text" else 7
        first: list[Any] = [(n if n % 5 else 0, seven) for n in range(30)]
        if writer == "copy_text":
            first = [(str(n), v) for n, v in first]
        assert (await engine.run(prefer_rows(write)(first))).written == 25
        await engine.execute("TRUNCATE changing")
        await engine.execute("ALTER TABLE changing ALTER v TYPE text")
        second: list[Any] = [(n if n % 5 else 0, "007") for n in range(30)]
        if writer == "copy_text":
            second = [(str(n), v) for n, v in second]
        for _ in range(2):
            await engine.execute("TRUNCATE changing")
            result = await engine.run(prefer_rows(write)(second))
            assert told(result) == [(n, "23505") for n in range(5, 30, 5)]
            assert {row["v"] for row in await engine.fetch("SELECT v FROM changing")} == {"007"}
        assert cast("Any", write._writer)._in_server, "the server was never asked again"
        await engine.execute("DROP TABLE changing")


class TestArrays:
    @pytest.mark.parametrize("writer", ROW_WRITERS)
    async def test_array_columns_are_written_and_isolated(self, engine: Engine, writer: str) -> None:
        await engine.execute("DROP TABLE IF EXISTS lists; CREATE TABLE lists (id int PRIMARY KEY, v int[])")
        rows: list[Any] = [(n if n % 9 else 0, list(range(n % 4))) for n in range(60)]
        makers: dict[str, Any] = {
            "execute_many": execute_many("INSERT INTO lists VALUES ($1, $2)"),
            "copy_into": copy_into("lists", columns=("id", "v")),
            "copy_text": copy_text("lists", columns=("id", "v")),
        }
        if writer == "copy_text":
            rows = [(str(n), "{" + ",".join(map(str, v)) + "}") for n, v in rows]
        result = await engine.run(prefer_rows(batch(makers[writer]))(rows))
        assert told(result) == [(n, "23505") for n in range(9, 60, 9)]
        found = await engine.fetch("SELECT id, v FROM lists ORDER BY id")
        assert [(row["id"], row["v"]) for row in found] == [
            (n, list(range(n % 4))) for n in range(60) if n % 9 or n == 0
        ]


class TestAHostileSearchPath:
    """Functions, operators and tables of the same names, in a schema that is searched first."""

    TRAP = (
        "DROP SCHEMA IF EXISTS trap CASCADE; CREATE SCHEMA trap",
        "CREATE TABLE trap.sprung (what text)",
        # Every function that a helper of ours could call by a bare name.
        *(
            f"CREATE FUNCTION trap.{name}({arguments}) RETURNS {returns} LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION 'trapped: {name}' USING ERRCODE = '53100'; END $$"
            for name, arguments, returns in (
                ("array_length", "anyarray, int", "int"),
                ("array_length", "int[], int", "int"),
                ("array_length", "text[], int", "int"),
                ("substr", "text, int, int", "text"),
                ("to_regproc", "text", "regproc"),
                ("format_type", "oid, int", "text"),
                ("current_setting", "text", "text"),
                ("set_config", "text, text, boolean", "text"),
                ("unnest", "int[]", "setof int"),
                ("unnest", "text[]", "setof text"),
            )
        ),
        *(
            f"CREATE FUNCTION trap.bad_{name}({left}, {right}) RETURNS {returns} LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'trapped: operator' USING ERRCODE = '53100'; END $$; "
            f"CREATE OPERATOR trap.{sign} (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = trap.bad_{name})"
            for name, sign, left, right, returns in (
                ("plus", "+", "int", "int", "int"),
                ("minus", "-", "int", "int", "int"),
                ("times", "*", "int", "int", "int"),
                ("over", "/", "int", "int", "int"),
                ("le", "<=", "int", "int", "boolean"),
                ("lt", "<", "int", "int", "boolean"),
                ("gt", ">", "int", "int", "boolean"),
                ("ge", ">=", "int", "int", "boolean"),
                ("same", "=", "int", "int", "boolean"),
                ("eq", "=", "text", "text", "boolean"),
                ("ne", "<>", "oid", "oid", "boolean"),
            )
        ),
        "CREATE TABLE trap.pg_attribute (attname text)",
        "CREATE TABLE trap.pg_type (oid oid)",
        "CREATE TYPE trap.text AS ENUM ('trapped')",
    )

    @staticmethod
    async def walk_into_it(conn: Any) -> None:
        """The driver's own look-up of array types is not safe there: it comes first."""
        await conn.fetch("SELECT $1::int4[], $2::text[]", [1], ["x"])
        await conn.execute("SET search_path TO trap, pg_catalog, public")

    @staticmethod
    async def stay(_: Any) -> None:
        """No RESET ALL: the path is for the whole session."""

    @pytest.mark.parametrize("rows", [prefer_rows, never_rows], ids=["row by row", "in spans"])
    @pytest.mark.parametrize("writer", WRITERS)
    async def test_changes_nothing(self, engine: Engine, database: str, writer: str, rows: Any) -> None:
        for statement in self.TRAP:
            await engine.execute(statement)
        # The user's own trigger is not ours to protect: a table without one.
        await engine.execute("CREATE TABLE trap.target (id int PRIMARY KEY, body pg_catalog.text NOT NULL)")
        try:
            async with engine_on(database, init=self.walk_into_it, reset=self.stay) as hostile:
                await self.write_all(hostile, writer, rows)
            assert await count(engine, "trap.sprung") == 0
        finally:
            await engine.execute("DROP SCHEMA trap CASCADE")

    async def write_all(self, hostile: Engine, writer: str, rows: Any) -> None:
        insert = "INSERT INTO trap.target (id, body) VALUES ($1, $2)"

        @operation
        async def add(conn: Any, row: Sequence[Any]) -> None:
            await conn.execute(insert, *row)

        makers: dict[str, Any] = {
            "each": each(lambda row: pipe(add(row), timeout(10, lock=1))),
            "execute_many": execute_many(insert),
            "copy_into": copy_into("target", columns=COLUMNS, schema="trap"),
            "copy_text": copy_text("target", columns=COLUMNS, schema="trap"),
        }
        bodies = {3: None, 50: "\0", 51: None}
        write = rows(batch(makers[writer], retry=P))
        result = await hostile.run(pipe(write(items_for(writer, bodies)), timeout(20), retry(P)))
        assert told(result) == [(3, "23502"), (50, "22021"), (51, "23502")]
        if rows is prefer_rows and writer != "each":
            assert write._costs.rows_possible, "it fell back: then nothing was tested"


class _BeginsOnce:
    """A record whose opening SQL works only once: as where another process was first with the same row."""

    def opening(self) -> str:
        return "SELECT 1 / (2 - nextval('met'))"

    def capture(self, conn: Any) -> None:
        pass

    async def at_work(self, conn: Any) -> bool:
        raise NotImplementedError

    async def look_up(self, conn: Any) -> None:
        pass


@pytest.mark.parametrize("writer", WRITERS)
async def test_what_fails_to_begin_anew_is_no_fault_of_an_item(engine: Engine, writer: str) -> None:
    """The first span is undone by ROLLBACK and BEGIN, and what is opened with BEGIN may fail then."""
    write = never_rows(make_batch(writer))
    with pytest.raises(asyncpg.DivisionByZeroError):
        await engine.run_recorded(write(items_for(writer, {0: None}, 10)), _BeginsOnce())
    assert await count(engine) == 0


class TestWhatIsRefused:
    @pytest.mark.parametrize("writer", ["copy_into", "copy_text"])
    async def test_a_row_of_another_width_costs_its_item_only(self, engine: Engine, writer: str) -> None:
        """The driver would cut a longer one short without a word."""
        items = items_for(writer, {}, 10)
        items[2] = (*items[2], "more")
        items[5] = items[5][:1]
        items[7] = 7
        items[8] = "ab"
        for prepare in (never_rows, prefer_rows):
            await engine.execute("TRUNCATE item")
            result = await engine.run(prepare(make_batch(writer))(items))
            assert told(result) == [(2, "ValueError"), (5, "ValueError"), (7, "TypeError"), (8, "TypeError")]
            assert await count(engine) == 6

    async def test_a_row_of_another_width_costs_its_item_only_with_parameters_too(
        self, engine: Engine
    ) -> None:
        items = items_for("execute_many", {}, 10)
        items[2] = (*items[2], "more")
        items[5] = items[5][:1]
        for prepare in (never_rows, prefer_rows):
            await engine.execute("TRUNCATE item")
            result = await engine.run(prepare(make_batch("execute_many"))(items))
            assert [failed.index for failed in result.failed] == [2, 5]
            assert await count(engine) == 8

    @pytest.mark.parametrize("writer", ["copy_into", "copy_text"])
    async def test_so_it_does_where_much_was_sent_before_it_was_found(
        self, engine: Engine, writer: str
    ) -> None:
        items = items_for(writer, {}, 10_000)
        items[5_000] = (*items[5_000], "more")
        items[9_000] = items[9_000][:1]
        items[9_500] = (items[9_500][0], 7)
        result = await engine.run(never_rows(make_batch(writer))(items))
        assert told(result) == [(5_000, "ValueError"), (9_000, "ValueError"), (9_500, "TypeError")]
        assert await count(engine) == 9_997

    @pytest.mark.parametrize("writer", WRITERS)
    async def test_a_sequence_need_not_be_one_that_can_be_cut(self, engine: Engine, writer: str) -> None:
        items = deque(items_for(writer, {3: None}))
        result = await engine.run(make_batch(writer)(items))
        assert told(result) == [(3, "23502")]
        assert await count(engine) == 99

    async def test_items_must_be_a_sequence(self) -> None:
        for items in (iter([1]), {1, 2}, "ab", b"ab", (n for n in [1])):
            with pytest.raises(TypeError, match="sequence"):
                make_batch("each")(items)  # type: ignore[arg-type]

    async def test_a_batch_needs_a_transaction(self, engine: Engine) -> None:
        with pytest.raises(PolicyError, match="needs a transaction"):
            await engine.run(make_batch("each")(items_for("each", {})), autocommit=True)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"skip_limit": -1}, "skip_limit=-1"),
            ({"skip_limit": True}, "skip_limit"),
            ({"retry": 3}, "retry=3"),
        ],
    )
    def test_options_are_checked_when_it_is_made(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(PolicyError, match=match):
            make_batch("each", **options)

    def test_what_is_no_writer_is_refused(self) -> None:
        for writer in (add_item, "INSERT …", None):
            with pytest.raises(PolicyError, match="give a writer"):
                batch(writer)  # type: ignore[arg-type]

    @pytest.mark.parametrize("columns", [(), "id", ("id", "id"), (1,), ("a\0",)])
    def test_columns_are_checked_when_it_is_made(self, columns: Any) -> None:
        with pytest.raises(PolicyError):
            copy_into("item", columns=columns)
