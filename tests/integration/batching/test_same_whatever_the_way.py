"""What a batch stores and whom it blames does not depend on the way that it took.

It is what one by one gives.

For each kind of column, each writer, whatever share of the rows is bad and whatever the batch learned before.
The judge (`tests/support/one_by_one.py`) writes each row by itself with bare asyncpg.
"""

from __future__ import annotations

import datetime as dt
import decimal
import ipaddress
import json
import random
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dbop_raw.testing import Server
from tests.support.batching import ROW_WRITERS, make_batch, told
from tests.support.one_by_one import (
    HISTORIES,
    Blamed,
    Engines,
    History,
    Init,
    Row,
    engines_on,
    one_by_one,
    teach,
)

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

Number = decimal.Decimal
BINARY = ("copy_into", "execute_many")
EXECUTED = ("execute_many",)


# ------------------------------------------------------------------------------------------------- the codecs


async def documented_jsonb(conn: Any) -> None:
    """As asyncpg's own documentation shows it; a text codec, which binary COPY refuses."""
    for name in ("json", "jsonb"):
        await conn.set_type_codec(name, encoder=json.dumps, decoder=json.loads, schema="pg_catalog")


async def binary_jsonb(conn: Any) -> None:
    """The same for binary COPY: jsonb's wire format is a version and the text."""
    await conn.set_type_codec(
        "jsonb",
        encoder=lambda value: b"\x01" + json.dumps(value).encode(),
        decoder=lambda data: json.loads(bytes(data)[1:]),
        schema="pg_catalog",
        format="binary",
    )


async def shouting_text(conn: Any) -> None:
    """A codec that changes what is stored, so that one sees whether it was used."""
    for name in ("text", "varchar"):
        await conn.set_type_codec(
            name,
            encoder=lambda value: value.upper().encode(),
            decoder=lambda data: bytes(data).decode(),
            schema="pg_catalog",
            format="binary",
        )


async def doubled_int(conn: Any) -> None:
    """The same for integers: as text of another number."""
    await conn.set_type_codec(
        "int8", encoder=lambda value: str(2 * value), decoder=int, schema="pg_catalog", format="text"
    )


async def cents(conn: Any) -> None:
    """Money as an integer of cents, in binary: an int8 of its own meaning."""
    await conn.set_type_codec(
        "int8",
        encoder=lambda value: round(value * 100).to_bytes(8, "big", signed=True),
        decoder=lambda data: int.from_bytes(bytes(data), "big", signed=True) / 100,
        schema="pg_catalog",
        format="binary",
    )


async def time_as_tuple(conn: Any) -> None:
    """asyncpg's third format: microseconds since 2000 in a tuple."""
    await conn.set_type_codec(
        "timestamptz",
        encoder=lambda value: (value,),
        decoder=lambda value: value[0],
        schema="pg_catalog",
        format="tuple",
    )


async def vector_as_list(conn: Any) -> None:
    """As for pgvector."""
    await conn.set_type_codec(
        "vector",
        encoder=lambda value: "[" + ",".join(map(str, value)) + "]",
        decoder=str,
        schema="public",
        format="text",
    )


async def hstore_as_dict(conn: Any) -> None:
    """asyncpg's own codec for an extension."""
    await conn.set_builtin_type_codec("hstore", schema="public", codec_name="pg_contrib.hstore")


# -------------------------------------------------------------------------------------------------- the kinds


@dataclass(frozen=True, repr=False)
class Kind:
    """A kind of column, and values for it."""

    name: str
    column: str
    """As in CREATE TABLE; the column is called v."""
    good: Sequence[Any]
    bad: Sequence[Any] = ()
    """Refused by the server when it stores them."""
    misfits: Sequence[Any] = ()
    """Refused by the client, or by the server when it reads them: not to be tried together with others."""
    texts: Sequence[str | None] | None = None
    """`good` for copy_text; None: what str() gives."""
    bad_texts: Sequence[str] | None = None
    """`bad` for copy_text; None: what str() gives."""
    misfit_texts: Sequence[Any] = (7, "a\0b")
    """`misfits` for copy_text."""
    writers: Sequence[str] = ROW_WRITERS
    init: Init | None = None
    columns: Sequence[str] = ("id", "must", "v")
    shown: str = "t::text"
    plain: bool = True
    """Can a view's trigger pass all its columns on?"""

    def __repr__(self) -> str:
        return f"<Kind {self.name}>"

    def values(self, writer: str, which: Literal["good", "bad", "misfits"]) -> Sequence[Any]:
        plain: Sequence[Any] = {"good": self.good, "bad": self.bad, "misfits": self.misfits}[which]
        if writer != "copy_text":
            return plain
        given = {"good": self.texts, "bad": self.bad_texts, "misfits": self.misfit_texts}[which]
        return [None if value is None else str(value) for value in plain] if given is None else given


AT = dt.datetime(2026, 2, 28, 23, 59, 59, 123456, tzinfo=dt.UTC)
DAY = dt.date(2026, 2, 28)
HARD_TEXTS = (
    "",
    "x",
    "ä€𝄞",
    "NULL",
    "null",
    '"',
    "\\",
    "{}",
    '{"a"}',
    "a\tb\nc\rd",
    "\\N",
    "\\.",
    " x ",
    ",",
)

TYPES = (
    "CREATE TYPE mood AS ENUM ('ok', 'sad', 'so-so', 'NULL')",
    "CREATE DOMAIN small AS int CHECK (VALUE < 100)",
    "CREATE DOMAIN brief AS varchar(3) CHECK (VALUE <> 'no')",
    "CREATE DOMAIN briefer AS brief",
    "CREATE DOMAIN ints AS int[] CHECK (cardinality(VALUE) < 4)",
    "CREATE DOMAIN doc AS jsonb CHECK (VALUE <> '[13]')",
    "CREATE TYPE pair AS (n int, word text)",
    "CREATE DOMAIN good_pair AS pair CHECK ((VALUE).n > 0)",
    "CREATE EXTENSION hstore",
    "CREATE EXTENSION citext",
    "CREATE EXTENSION vector",
    "CREATE EXTENSION ltree",
)

KINDS = (
    Kind("int", "int CHECK (v <> 13)", (0, -5, 2**31 - 1, None, True), (13,), ("many", 2**40, 1.5),
         texts=("0", "-5", " 7 ", None), bad_texts=("13", "many", "99999999999", "", "1.5")),
    Kind("smallint", "smallint CHECK (v <> 13)", (0, -(2**15), None), (13,), (2**15,)),
    Kind("bigint", "bigint CHECK (v <> 13)", (0, -(2**63), 2**63 - 1, None), (13,), (2**63,)),
    Kind("numeric", "numeric(8, 2)", (Number("12.34"), Number("0.005"), 7, 0.1, Number("NaN"), None),
         (Number("1e7"), Number("Infinity")), ("many", object())),
    Kind("float8", "float8 CHECK (v <> 13)", (0.1, -0.0, float("nan"), float("inf"), float("-inf"), 5e-324,
         1.7976931348623157e308, 3, None), (13.0,), ("many",)),
    Kind("float4", "float4 CHECK (v <> 13)", (0.1, float("nan"), float("inf"), 1e-45, None), (13.0,), ("many",
         1e39), bad_texts=("13", "1e39")),
    Kind("text", "text CHECK (v <> 'no')", (*HARD_TEXTS, None), ("no",), (7, "a\0b", "a\ud800b"),
         misfit_texts=(7, "a\0b", "a\ud800b")),
    Kind("varchar", "varchar(3)", ("abc", "ab     ", "ä€𝄞", None), ("abcd", "ab \N{SNOWMAN} "), (7,)),
    Kind("char", "char(3)", ("abc", "a", "ab     ", None), ("abcd",), (7,)),
    Kind("one byte char", '"char"', (b"a", b"\xff", None), (), ("a", 7), texts=("a", "", None)),
    Kind("name", "name", ("abc", None), (), (7, "x" * 70, "a\0b"), texts=("abc", "x" * 70, None)),
    Kind("citext", "citext CHECK (v <> 'no')", ("abc", "Ä", None), ("NO",), (7,), writers=("execute_many",
         "copy_text")),
    Kind("bool", "boolean CHECK (v)", (True, None), (False,), (1, "yes"), texts=("yes", "t", None)),
    Kind("date", "date CHECK (v > '1900-01-01')", (DAY, dt.date.max, None), (dt.date.min,), ("2026-02-28",),
         texts=("2026-02-28", "infinity", None), bad_texts=("0001-01-01", "2026-02-30", "someday")),
    Kind("time", "time(0)", (dt.time(23, 59, 59, 999999), dt.time(0), None), (), ("noon",),
         bad_texts=("25:00",)),
    Kind("timestamp", "timestamp(3)", (AT.replace(tzinfo=None), None), (), (DAY, "now")),
    Kind("timestamptz", "timestamptz CHECK (v > '1900-01-01')", (AT, AT.astimezone(),
         dt.datetime.max.replace(tzinfo=dt.UTC), None), (dt.datetime(1850, 1, 1, tzinfo=dt.UTC),),
         ("2026-02-28",), texts=("2026-02-28 12:00+02", "infinity", None)),
    Kind("interval", "interval(0)", (dt.timedelta(days=40, seconds=1.7), dt.timedelta(0), None), (),
         ("1 day",), texts=("40 days 1.7 s", None), bad_texts=("a while",)),
    Kind("json", "json", ('{"a": [1, null]}', "[1, 2]", '"x"', "null", None), (), ("{broken", "", {}, [1, 2]),
         bad_texts=("{broken", "")),
    Kind("jsonb", "jsonb CHECK (v <> '[13]')", ('{"a": [1, null]}', "[1, 2]", '"x"', "null", None), ("[13]",),
         ("{broken", "", {}, [1, 2]), bad_texts=("{broken", "", "[13]")),
    Kind("jsonb under the documented codec", "jsonb CHECK (v <> '[13]')", ([1, 2], [[1], [2]], [], [[]], ["a",
         None], {"a": [1]}, "x", 1, True, [{"a": []}], None), ([13],), ({1, 2},), texts=("[1, 2]", "{}",
         None), init=documented_jsonb, writers=("execute_many", "copy_text")),
    Kind("objects alone under the documented codec", "jsonb CHECK (v <> '{}')", ({"a": [1]}, {"b": {}}),
         ({},), ({1, 2},), init=documented_jsonb, writers=EXECUTED),
    Kind("lists alone under the documented codec", "jsonb", ([1, 2], [3, 4], [5, 6]), (), (),
         init=documented_jsonb, writers=EXECUTED),
    Kind("lists of one under the documented codec", "jsonb", ([1], [2], ["x"], [{}]), (), (),
         init=documented_jsonb, writers=EXECUTED),
    Kind("lists alone under a binary codec", "jsonb", ([1, 2], [3, 4], [5, 6]), (), (), init=binary_jsonb,
         writers=BINARY),
    Kind("json under the documented codec", "json", ([1, 2], [[1], [2]], {"a": [1]}, "x"), (), ({1, 2},),
         init=documented_jsonb, writers=EXECUTED),
    Kind("jsonb under a binary codec", "jsonb CHECK (v <> '[13]')", ([1, 2], [[1], [2]], [], ["a", None],
         {"a": [1]}, "x", 1, None), ([13],), ({1, 2},), init=binary_jsonb, writers=BINARY),
    Kind("jsonb domain under the documented codec", "doc", ([1, 2], [[3]], {"a": 1}, None), ([13],), ({1,
         2},), init=documented_jsonb, writers=EXECUTED),
    Kind("jsonb array under the documented codec", "jsonb[]", ([[1, 2], [3]], [{"a": 1}], [], None), (), (),
         init=documented_jsonb, writers=EXECUTED),
    Kind("text under a codec", "text CHECK (v <> 'NO')", ("abc", "ä", "", None), ("no",), (7,),
         init=shouting_text, writers=BINARY),
    Kind("varchar under a codec", "varchar(3)", ("abc", "ab", None), ("abcd",), (7,), init=shouting_text,
         writers=BINARY),
    Kind("bigint under a text codec", "bigint CHECK (v <> 26)", (1, 2, None), (13,), (), init=doubled_int,
         writers=EXECUTED),
    Kind("bigint under a binary codec", "bigint CHECK (v <> 1300)", (1, 2.5, None), (13,), ("x",), init=cents,
         writers=BINARY),
    Kind("timestamptz under a tuple codec", "timestamptz", (0, 10**15, None), (), (AT,), init=time_as_tuple,
         writers=BINARY),
    Kind("vector under a codec", "vector(2)", ([1, 2], [3.5, 4], None), ([1, 2, 3],), (7,),
         init=vector_as_list, writers=EXECUTED),
    Kind("vectors of one length under a codec", "vector(2)", ([1, 2], [3, 4]), (), (), init=vector_as_list,
         writers=EXECUTED),
    Kind("hstore", "hstore", ({"a": "b"}, {}, {"a": None}, None), (), (7,), texts=('"a"=>"b"', "", None),
         misfit_texts=("a=", 7), init=hstore_as_dict),
    Kind("int array", "int[]", ([], [1], [1, 2], [[1, 2], [3, 4]], [None], None), (), (["x"], 7, [[1], [2,
         3]]), texts=("{}", "{1,2}", "{{1,2},{3,4}}", "{NULL}", None), bad_texts=("{x}", "1", "{{1},{2,3}}")),
    Kind("int arrays of one length", "int[] CHECK (v[1] <> 13)", ([1, 2], [3, 4], [5, 6]), ([13, 0],), (),
         texts=("{1,2}",)),
    Kind("text array", "text[]", (list(HARD_TEXTS), [], [""], None), (), (["a\0b"], [7]), texts=("{}",
         '{"a b",NULL,"NULL"}', None), bad_texts=("{",)),
    Kind("enum array", "mood[]", (["ok"], [], ["sad", "ok"], None), (), (["angry"], [7]), texts=("{ok}",
         None), bad_texts=("{angry}",)),
    Kind("array domain", "ints", ([], [1], [1, 2, 3], None), ([1, 2, 3, 4],), (["x"],), texts=("{1}", None),
         bad_texts=("{1,2,3,4}",)),
    Kind("enum", "mood", ("ok", "sad", "so-so", "NULL", None), (), ("angry", "", 7), bad_texts=("angry", "")),
    Kind("domain", "small", (5, -5, None), (100,), ("x",)),
    Kind("domain of a domain", "briefer", ("abc", "x", None), ("abcd", "no"), (7,)),
    Kind("composite", "pair", ((1, "x"), (None, 'q"u,o)te'), (2, None), None), (), ((1, "a\0b"), (1,), ("x",
         "y"), 7), texts=("(1,x)", "(,)", None), bad_texts=("(x,y)", "(1)")),
    Kind("composites of one shape", "pair", ((1, "x"), (2, "y")), (), (), writers=BINARY),
    Kind("composite domain", "good_pair", ((1, "x"), (7, "y"), None), ((0, "x"),), (("x", "y"),),
         texts=("(1,x)", None), bad_texts=("(0,x)",)),
    Kind("composite array", "pair[]", ([(1, "x")], [], [(1, "x"), (2, "y")], None), (), ([7],),
         texts=('{"(1,x)"}', None), bad_texts=("{x}",)),
    Kind("range", "int4range", (asyncpg.Range(1, 5), asyncpg.Range(empty=True), (1, 2), None), (), ("x", [1,
         2, 3]), texts=("[1,5)", "empty", None), bad_texts=("[5,1)", "x")),
    Kind("ranges as tuples", "int4range", ((1, 2), (3, 4)), (), (), writers=BINARY),
    Kind("multirange", "int4multirange", ([asyncpg.Range(1, 5)], [], None), (), (7,), texts=("{[1,5)}", "{}",
         None), bad_texts=("{[5,1)}",)),
    Kind("multiranges of one length", "int4multirange", ([asyncpg.Range(1, 5)], [asyncpg.Range(2, 3)]), (),
         (), writers=BINARY),
    Kind("bytea", "bytea CHECK (v <> 'no')", (b"\x00\xff", b"", bytearray(b"x"), memoryview(b"yz"), None),
         (b"no",), ("x", 7), texts=("\\x00ff", "", "abc", None), bad_texts=("\\x0", "no")),
    Kind("uuid", "uuid", (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000001", None), (), ("zz", 7),
         bad_texts=("zz",)),
    Kind("inet", "inet", (ipaddress.ip_interface("10.0.0.1/8"), ipaddress.ip_address("::1"), "10.0.0.1",
         None), (), ("zz", 7), bad_texts=("zz",)),
    Kind("cidr", "cidr", (ipaddress.ip_network("10.0.0.0/31"), ipaddress.ip_network("::/127"), None), (),
         (7,), bad_texts=("10.0.0.1/8",)),
    Kind("macaddr", "macaddr", ("08:00:2b:01:02:03", None), (), ("zz", 7), bad_texts=("zz",),
         writers=("execute_many", "copy_text")),
    Kind("bits", "bit(2)", (asyncpg.BitString.from_int(2, 2), None), (asyncpg.BitString.from_int(5, 3),),
         (7,), texts=("10", None), bad_texts=("101", "1x")),
    Kind("point", "point", (asyncpg.Point(1, 2), (3, 4), None), (), (7, ("x", "y")), texts=("(1,2)", None),
         bad_texts=("(1)",)),
    Kind("points as tuples", "point", ((1, 2), (3, 4)), (), (), writers=BINARY),
    Kind("box", "box", (asyncpg.Box((1, 2), (3, 4)), ((5, 6), (7, 8)), None), (), (7,), texts=("(1,2),(3,4)",
         None), bad_texts=("(1)",)),
    Kind("path", "path", (asyncpg.Path((1, 2), (3, 4)), ((5, 6), (7, 8)), None), (), (7,),
         texts=("[(1,2),(3,4)]", None), bad_texts=("(1",)),
    Kind("paths of one length", "path", (((5, 6), (7, 8)), ((1, 2), (3, 4))), (), (), writers=BINARY),
    Kind("polygon", "polygon", (((5, 6), (7, 8)), ((1, 2), (3, 4), (5, 6)), None), (), (7,), writers=BINARY),
    Kind("tid", "tid", ((5, 6), (7, 8)), (), (7,), writers=BINARY),
    Kind("oid", "oid", (1, 2**32 - 1, None), (), (-1, "x"), bad_texts=("x",)),
    Kind("money", "money", ("1.50", "7", None), (), ("many", 7), bad_texts=("many",), writers=("execute_many",
         "copy_text")),
    Kind("tsvector", "tsvector", ("a b", "", None), (), ("'", 7), misfit_texts=("'", 7),
         writers=("execute_many", "copy_text")),
    Kind("ltree", "ltree", ("a.b", "", None), (), ("a..", 7), misfit_texts=("a..", 7),
         writers=("execute_many", "copy_text")),
    Kind("a default", "int DEFAULT 7", (), columns=("id", "must")),
    Kind("a given default", "int DEFAULT 7", (1, None), (), ("x",)),
    Kind("identity by default, given", "int GENERATED BY DEFAULT AS IDENTITY", (1, 2, 3), (), ("x",),
         plain=False),
    Kind("identity by default", "int GENERATED BY DEFAULT AS IDENTITY", (), columns=("id", "must"),
         plain=False, shown="(id, must, v IS NOT NULL)::text"),
    Kind("identity always, given", "int GENERATED ALWAYS AS IDENTITY", (1, 2, 3), (), ("x",), plain=False,
         writers=("copy_into", "copy_text")),
    Kind("identity always", "int GENERATED ALWAYS AS IDENTITY", (), columns=("id", "must"), plain=False,
         shown="(id, must, v IS NOT NULL)::text"),
    Kind("a stored generated column", "int GENERATED ALWAYS AS (100 / (must - 14)) STORED", (), columns=("id",
         "must"), plain=False),
    Kind("a virtual generated column", "int GENERATED ALWAYS AS (must * 2) VIRTUAL CHECK (v <> 28)", (),
         columns=("id", "must"), plain=False),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- the relations


Shape = Literal[
    "a table",
    "a trigger that changes rows",
    "a trigger that drops rows",
    "a rule that does nothing instead",
    "a rule that does nothing instead, for some",
    "a rule that writes a log too",
    "partitions",
    "a view with a trigger",
]
SHAPES: tuple[Shape, ...] = (
    "a table",
    "a trigger that changes rows",
    "a trigger that drops rows",
    "a rule that does nothing instead",
    "a rule that does nothing instead, for some",
    "a rule that writes a log too",
    "partitions",
    "a view with a trigger",
)

FUNCTIONS = (
    (
        "CREATE FUNCTION changes() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN NEW.must := NEW.must + 1000; RETURN NEW; END $$"
    ),
    (
        "CREATE FUNCTION drops() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN IF NEW.id % 5 = 0 THEN RETURN NULL; END IF; RETURN NEW; END $$"
    ),
    (
        "CREATE FUNCTION passes_on() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN EXECUTE format('INSERT INTO %I SELECT ($1).*', TG_ARGV[0]) USING NEW; RETURN NEW; END $$"
    ),
)


@dataclass(frozen=True)
class Relation:
    """What is written to, and what to look at afterwards."""

    name: str
    tables: tuple[str, ...]
    """Where rows may end up, for TRUNCATE."""
    setup: tuple[str, ...]
    looks: tuple[str, ...]


def relation_of(kind: Kind, shape: Shape) -> Relation:
    number = KINDS.index(kind) * len(SHAPES) + SHAPES.index(shape)
    name, log, base = f"t{number}", f"t{number}_log", f"t{number}_base"
    columns = f"(id int PRIMARY KEY, must int NOT NULL, v {kind.column})"
    table = f"CREATE TABLE {name} {columns}"
    more = {
        "a table": (table,),
        "a trigger that changes rows": (
            table,
            f"CREATE TRIGGER t BEFORE INSERT ON {name} FOR EACH ROW EXECUTE FUNCTION changes()",
        ),
        "a trigger that drops rows": (
            table,
            f"CREATE TRIGGER t BEFORE INSERT ON {name} FOR EACH ROW EXECUTE FUNCTION drops()",
        ),
        "a rule that does nothing instead": (
            table,
            f"CREATE RULE r AS ON INSERT TO {name} DO INSTEAD NOTHING",
        ),
        "a rule that does nothing instead, for some": (
            table,
            f"CREATE RULE r AS ON INSERT TO {name} WHERE NEW.id % 3 = 0 DO INSTEAD NOTHING",
        ),
        "a rule that writes a log too": (
            table,
            f"CREATE TABLE {log} (id int)",
            f"CREATE RULE r AS ON INSERT TO {name} DO ALSO INSERT INTO {log} VALUES (NEW.id)",
        ),
        "partitions": (
            f"{table} PARTITION BY RANGE (id)",
            f"CREATE TABLE {name}_0 PARTITION OF {name} FOR VALUES FROM (0) TO (20)",
            f"CREATE TABLE {name}_1 PARTITION OF {name} FOR VALUES FROM (20) TO (990)",
        ),
        "a view with a trigger": (
            f"CREATE TABLE {base} {columns}",
            f"CREATE VIEW {name} AS SELECT * FROM {base}",
            f"CREATE TRIGGER t INSTEAD OF INSERT ON {name} FOR EACH ROW EXECUTE FUNCTION passes_on('{base}')",
        ),
    }[shape]
    logs = (log,) if shape == "a rule that writes a log too" else ()
    looks = (
        f"SELECT {kind.shown} AS shown FROM {name} AS t ORDER BY id",
        *tuple(f"SELECT id::text AS shown FROM {log} ORDER BY id" for log in logs),
    )
    return Relation(name, (base if shape == "a view with a trigger" else name, *logs), more, looks)


# -------------------------------------------------------------------------------------------------- the world


Share = Literal["no", "one", "1 %", "30 %", "all"]
SHARES: tuple[Share, ...] = ("no", "one", "1 %", "30 %", "all")


@dataclass(repr=False)
class World:
    """A database in which each relation is made when it is first needed."""

    engines: Engines
    owner: Any
    judges: dict[Init | None, Any] = field(default_factory=dict)
    dsn: str = ""
    made: set[str] = field(default_factory=set)

    async def make(self, relation: Relation) -> None:
        if relation.name not in self.made:
            for statement in relation.setup:
                await self.owner.execute(statement)
            self.made.add(relation.name)

    async def empty(self, relation: Relation) -> None:
        await self.owner.execute(f"TRUNCATE {', '.join(relation.tables)}")

    async def judge(self, init: Init | None) -> Any:
        if init not in self.judges:
            self.judges[init] = conn = await asyncpg.connect(self.dsn)
            if init is not None:
                await init(conn)
        return self.judges[init]

    async def look(self, relation: Relation) -> list[list[str]]:
        return [[row["shown"] for row in await self.owner.fetch(query)] for query in relation.looks]


@pytest.fixture(scope="module")
async def world(postgres_server: Server) -> AsyncIterator[World]:
    dsn = postgres_server.create_database()
    owner = await asyncpg.connect(dsn)
    async with engines_on(dsn) as engines:
        for statement in (*TYPES, *FUNCTIONS):
            await owner.execute(statement)
        world = World(engines, owner, dsn=dsn)
        yield world
    for conn in (owner, *world.judges.values()):
        await conn.close()
    postgres_server.drop_database(dsn)


def rows_for(kind: Kind, writer: str, size: int, share: Share, *, misfits: bool, seed: int) -> list[Row]:
    """Rows of which a share is bad, each in a way that it happens to be."""
    chance = random.Random(f"{kind.name} {writer} {size} {share} {misfits} {seed}")
    numbers = {"no": 0, "one": 1, "1 %": max(1, size // 100), "30 %": max(1, size * 3 // 10), "all": size}
    spoiled = set(chance.sample(range(size), min(size, numbers[share])))
    faults = ["null", "null", "twice"]
    if "v" in kind.columns:
        faults += ["bad"] * 3 * bool(kind.values(writer, "bad"))
        faults += ["misfits"] * 4 * misfits
    good = list(kind.values(writer, "good")) or [None]
    rows = []
    for n in range(size):
        row: dict[str, Any] = {"id": n, "must": n % 12, "v": chance.choice(good)}
        fault = chance.choice(faults) if n in spoiled else None
        if fault == "null" or (fault == "twice" and n == 0):
            row["must"] = None
        elif fault == "twice":
            row["id"] = chance.randrange(n)
        elif fault in {"bad", "misfits"}:
            which: Literal["bad", "misfits"] = "bad" if fault == "bad" else "misfits"
            row["v"] = chance.choice(list(kind.values(writer, which)) or [None])
        rows.append(_row(kind, writer, row))
    return rows


def _row(kind: Kind, writer: str, row: dict[str, Any]) -> Row:
    if writer == "copy_text":
        row |= {name: None if row[name] is None else str(row[name]) for name in ("id", "must")}
    return tuple(row[name] for name in kind.columns)


def _lesson(kind: Kind, writer: str) -> Callable[[int, bool], Row]:
    """Rows to learn from: with no value of the kind, where there may be none."""
    simple = kind.values(writer, "good")
    value = None if None in simple or not simple else simple[0]
    return lambda n, good: _row(kind, writer, {"id": n, "must": 1 if good else None, "v": value})


async def check(
    world: World, kind: Kind, shape: Shape, writer: str, rows: Sequence[Row], histories: Sequence[History]
) -> None:
    """In each of the ways the same as one by one; the way that differs is named."""
    relation = relation_of(kind, shape)
    await world.make(relation)
    await world.empty(relation)
    expected: Blamed = await one_by_one(
        await world.judge(kind.init), writer, relation.name, kind.columns, rows
    )
    stored = await world.look(relation)
    for history in histories:
        engine = await world.engines.get(history, kind.init)
        write = make_batch(writer, relation.name, kind.columns)
        try:
            await teach(engine, write, history, _lesson(kind, writer))
            await world.empty(relation)
            result = await engine.run(write(rows))
        except Exception as exc:  # noqa: BLE001 - whatever it is, no row had it when it was written by itself
            pytest.fail(f"{history}: the batch was stopped by {type(exc).__name__}: {exc}")
        assert (history, told(result)) == (history, expected)
        assert (history, await world.look(relation)) == (history, stored)
        assert all(failed.item is rows[failed.index] for failed in result.failed)


# -------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize(
    ("kind", "writer"),
    [pytest.param(k, w, id=f"{k.name}-{w}") for k in KINDS for w in k.writers],
)
async def test_a_batch_of_each_kind_of_column_ends_as_one_by_one(
    world: World, kind: Kind, writer: str
) -> None:
    """Many bad rows, all of which the server finds."""
    rows = rows_for(kind, writer, 30, "30 %", misfits=False, seed=1)
    await check(world, kind, "a table", writer, rows, HISTORIES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "writer"),
    [pytest.param(k, w, id=f"{k.name}-{w}") for k in KINDS if "v" in k.columns for w in k.writers],
)
async def test_a_batch_with_misfits_of_each_kind_ends_as_one_by_one(
    world: World, kind: Kind, writer: str
) -> None:
    """Values among them that the client can't even send."""
    rows = rows_for(kind, writer, 30, "30 %", misfits=True, seed=2)
    await check(world, kind, "a table", writer, rows, ("many were bad", "nothing temporary"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_a_batch_into_each_kind_of_relation_ends_as_one_by_one(
    world: World, shape: Shape, writer: str
) -> None:
    """Triggers, rules, partitions, a view: what is stored is what the writer's own statement stores."""
    rows = rows_for(KINDS[0], writer, 60, "30 %", misfits=False, seed=3)
    await check(world, KINDS[0], shape, writer, rows, HISTORIES)


CASES = st.sampled_from([(kind, writer) for kind in KINDS for writer in kind.writers])


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    case=CASES,
    shape=st.sampled_from(SHAPES),
    size=st.sampled_from((1, 7, 7, 7, 60, 60, 300)),
    share=st.sampled_from(SHARES),
    misfits=st.booleans(),
    history=st.sampled_from(HISTORIES),
    seed=st.integers(0, 9),
)
@example(
    case=(KINDS[0], "copy_into"),
    shape="a table",
    size=1000,
    share="1 %",
    misfits=False,
    history=HISTORIES[0],
    seed=0,
)
@example(
    case=(KINDS[0], "copy_text"),
    shape="a table",
    size=1000,
    share="1 %",
    misfits=True,
    history=HISTORIES[1],
    seed=0,
)
@example(
    case=(KINDS[0], "execute_many"),
    shape="a table",
    size=1000,
    share="30 %",
    misfits=False,
    history=HISTORIES[1],
    seed=0,
)
@pytest.mark.slow
async def test_a_batch_ends_as_one_by_one_whatever_meets(
    world: World,
    case: tuple[Kind, str],
    shape: Shape,
    size: int,
    share: Share,
    misfits: bool,
    history: History,
    seed: int,
) -> None:
    kind, writer = case
    if shape == "a view with a trigger" and not kind.plain:
        shape = "a table"
    rows = rows_for(kind, writer, size, share, misfits=misfits, seed=seed)
    await check(world, kind, shape, writer, rows, [history])
