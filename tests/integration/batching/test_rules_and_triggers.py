"""Rules and triggers.

COPY's meaning holds for the writers that copy, whatever way they take; and counts are true.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from dbop_raw import Engine
from dbop_raw.testing import Server
from tests.support.batching import COPY_WRITERS, ROW_WRITERS, as_items, make_batch, told
from tests.support.one_by_one import HISTORIES, Engines, History, engines_on, teach

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

COLUMNS = ("id", "must")


@pytest.fixture(scope="module")
async def engines(postgres_server: Server) -> AsyncIterator[Engines]:
    dsn = postgres_server.create_database()
    async with engines_on(dsn) as engines:
        yield engines
    postgres_server.drop_database(dsn)


NUMBERS = itertools.count(1)


@dataclass
class Scene:
    """A new table with its log, and a batch for it that has learned what decides its way.

    A new name each time: a plan that a rule has emptied does not depend on its table any more, so PostgreSQL
    keeps it when the table is dropped.
    """

    engine: Engine
    owner: Engine
    table: str
    write: Any

    async def run(self, rows: list[Any]) -> Any:
        return await self.engine.run(self.write(rows))

    async def do(self, statement: str) -> None:
        await self.owner.execute(statement.format(t=self.table))

    async def ids(self, table: str = "{t}") -> list[int]:
        query = f"SELECT id FROM {table} ORDER BY id".format(t=self.table)
        return [row["id"] for row in await self.owner.fetch(query)]


async def taught(engines: Engines, writer: str, history: History, *setup: str) -> Scene:
    table = f"t{next(NUMBERS)}"
    engine = await engines.get(history)
    scene = Scene(engine, await engines.get("nothing known"), table, make_batch(writer, table, COLUMNS))
    await scene.do("CREATE TABLE {t} (id int PRIMARY KEY, must int NOT NULL); CREATE TABLE {t}_log (id int)")
    for statement in setup:
        await scene.do(statement)
    await teach(engine, scene.write, history, lambda n, good: _row(writer, n, bad=not good))
    await scene.do("TRUNCATE {t}, {t}_log")
    return scene


def _row(writer: str, n: int, *, bad: bool) -> Any:
    (row,) = as_items(writer, [(n, None if bad else n)])
    return row


RULES = {
    "nothing instead": "CREATE RULE r AS ON INSERT TO {t} DO INSTEAD NOTHING",
    "nothing instead, for some": "CREATE RULE r AS ON INSERT TO {t} WHERE NEW.id > 10 DO INSTEAD NOTHING",
    "another instead": "CREATE RULE r AS ON INSERT TO {t} DO INSTEAD INSERT INTO {t}_log VALUES (NEW.id)",
    "something also": "CREATE RULE r AS ON INSERT TO {t} DO ALSO INSERT INTO {t}_log VALUES (NEW.id)",
}


RULES = {
    "nothing instead": "CREATE RULE r AS ON INSERT TO {t} DO INSTEAD NOTHING",
    "nothing instead, for some": "CREATE RULE r AS ON INSERT TO {t} WHERE NEW.id > 10 DO INSTEAD NOTHING",
    "another instead": "CREATE RULE r AS ON INSERT TO {t} DO INSTEAD INSERT INTO {t}_log VALUES (NEW.id)",
    "something also": "CREATE RULE r AS ON INSERT TO {t} DO ALSO INSERT INTO {t}_log VALUES (NEW.id)",
}


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_a_copying_batch_fires_no_rule_however_many_rows_are_bad(
    engines: Engines, writer: str, rule: str, history: History
) -> None:
    """PostgreSQL, COPY.

    "COPY FROM will invoke any triggers and check constraints … it will not invoke rules".
    """
    scene = await taught(engines, writer, history, RULES[rule])
    for bad_one_in in (1000, 7, 2):
        await scene.do("TRUNCATE {t}, {t}_log")
        bad = [n for n in range(60) if n % bad_one_in == 1]
        result = await scene.run([_row(writer, n, bad=n in bad) for n in range(60)])
        assert told(result) == [(n, "23502") for n in bad]
        assert await scene.ids() == [n for n in range(60) if n not in bad]
        assert await scene.ids("{t}_log") == []


@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_a_rule_that_comes_while_the_batch_is_in_use_is_noticed(engines: Engines, writer: str) -> None:
    """What was learned of the relation holds for as long as it is so."""
    scene = await taught(engines, writer, "many were bad")
    await scene.do(RULES["nothing instead"])
    result = await scene.run([_row(writer, n, bad=n % 3 == 1) for n in range(60)])
    assert result.written == 40
    assert await scene.ids() == [n for n in range(60) if n % 3 != 1]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("rule", RULES)
async def test_a_statements_rules_fire_however_many_rows_are_bad(
    engines: Engines, rule: str, history: History
) -> None:
    """An INSERT of the user's own does what it does by itself: rules are its meaning."""
    scene = await taught(engines, "execute_many", history)
    for statement in (
        "ALTER TABLE {t}_log ADD CHECK (id <> 13)",
        "ALTER TABLE {t} ADD CHECK (id <> 14)",
        RULES[rule],
    ):
        await scene.do(statement)
    result = await scene.run([(n, n) for n in range(60)])
    alone: dict[str, tuple[list[int], list[int], list[tuple[int, str]]]] = {
        "nothing instead": ([], [], []),
        "nothing instead, for some": (list(range(11)), [], []),
        "another instead": ([], [n for n in range(60) if n != 13], [(13, "23514")]),
        "something also": (
            [n for n in range(60) if n not in {13, 14}],
            [n for n in range(60) if n not in {13, 14}],
            [(13, "23514"), (14, "23514")],
        ),
    }
    stored, logged, failed = alone[rule]
    assert told(result) == failed
    assert (await scene.ids(), await scene.ids("{t}_log")) == (stored, logged)


DROPS = (
    (
        "CREATE OR REPLACE FUNCTION drops() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN IF NEW.id % 5 = 0 THEN RETURN NULL; END IF; RETURN NEW; END $$"
    ),
    "CREATE TRIGGER t BEFORE INSERT ON {t} FOR EACH ROW EXECUTE FUNCTION drops()",
)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("bad_one_in", [1000, 3], ids=["clean", "dense"])
@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_a_row_that_a_trigger_drops_is_not_counted_as_written(
    engines: Engines, writer: str, bad_one_in: int, history: History
) -> None:
    """It is no failure either. COPY's tag says how many rows there are."""
    scene = await taught(engines, writer, history, *DROPS)
    bad = [n for n in range(60) if n % bad_one_in == 1 and n % 5 != 0]
    result = await scene.run([_row(writer, n, bad=n in bad) for n in range(60)])
    assert told(result) == [(n, "23502") for n in bad]
    assert await scene.ids() == [n for n in range(60) if n % 5 != 0 and n not in bad]
    assert result.total == 60
    assert result.written == 48 - len(bad)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_rows_that_fail_after_a_trigger_changed_them_are_blamed_in_their_place(
    engines: Engines, writer: str, history: History
) -> None:
    """Dropped rows before them don't move the index."""
    scene = await taught(engines, writer, history, *DROPS, "ALTER TABLE {t} ADD CHECK (must <> 13)")
    rows = [_row(writer, n, bad=False) for n in range(60)]
    for n in (21, 22, 23, 38):
        rows[n] = (rows[n][0], "13" if writer == "copy_text" else 13)
    rows[40] = (rows[40][0], "13" if writer == "copy_text" else 13)
    result = await scene.run(rows)
    # The row 13 has its own value for `must`; the row 40 is dropped before it is checked.
    assert told(result) == [(n, "23514") for n in (13, 21, 22, 23, 38)]
    assert await scene.ids() == [n for n in range(60) if n % 5 != 0 and n not in {13, 21, 22, 23, 38}]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_a_trigger_sees_each_row_that_stays_once_and_in_order(
    engines: Engines, writer: str, history: History
) -> None:
    """What failed and was undone leaves nothing; what was written was not written twice."""
    scene = await taught(
        engines,
        writer,
        history,
        "CREATE OR REPLACE FUNCTION logs() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN EXECUTE format('INSERT INTO %I VALUES ($1)', TG_ARGV[0]) USING NEW.id; RETURN NEW; END $$",
        "CREATE TRIGGER t AFTER INSERT ON {t} FOR EACH ROW EXECUTE FUNCTION logs('{t}_log')",
    )
    result = await scene.run([_row(writer, n, bad=n % 3 == 1) for n in range(60)])
    assert told(result) == [(n, "23502") for n in range(60) if n % 3 == 1]
    logged = [row["id"] for row in await scene.owner.fetch(f"SELECT id FROM {scene.table}_log ORDER BY ctid")]
    assert logged == [n for n in range(60) if n % 3 != 1]
