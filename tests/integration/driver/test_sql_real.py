"""Control SQL as a real server understands it: quoting, modes, limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbop_raw.driver import sql
from dbop_raw.testing import Server

Ask = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def ask(postgres_server: Server) -> Iterator[Ask]:
    """Run some SQL on one connection, by the simple protocol; gives the rows of the last statement."""
    with asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(postgres_server.dsn))
        try:
            yield lambda statement: runner.run(connection.fetch(statement))
        finally:
            runner.run(connection.close())


# No NUL and no lone surrogate: PostgreSQL has no such characters.
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
# A name holds at most 63 bytes, and the server cuts a longer one.
names = texts.filter(lambda name: 0 < len(name.encode()) <= 63)
hostile = st.text("\"'\\;-$/*.ab \n\t{}%é", min_size=1, max_size=20)


@settings(max_examples=150)
@given(names | hostile.filter(lambda name: len(name.encode()) <= 63))
def test_a_quoted_name_comes_back_the_same(ask: Ask, name: str) -> None:
    (row,) = ask(f"SELECT 1 AS {sql.identifier(name)}")
    assert list(row.keys()) == [name]


@settings(max_examples=150)
@given(texts | hostile)
def test_a_literal_comes_back_the_same_whatever_the_server_conforms_to(ask: Ask, text: str) -> None:
    for conforming in ("on", "off"):
        ask(f"SET standard_conforming_strings = {conforming}")
        try:
            (row,) = ask(f"SELECT {sql.literal(text)}::text AS found")
        finally:
            ask("SET standard_conforming_strings = on")
        assert row["found"] == text


@pytest.mark.parametrize(
    "name", ['a"b', "a.b", "a'b", "a; DROP TABLE x; --", "$$", "SELECT", "\\", " ", "ä", "a\nb", 'U&"\\0061"']
)
def test_a_table_of_a_hostile_name_is_that_table(ask: Ask, name: str) -> None:
    ask(f"CREATE SCHEMA IF NOT EXISTS {sql.identifier(name)}")
    try:
        ask(f"CREATE TABLE {sql.relation(name, name)} ({sql.identifier(name)} int)")
        (row,) = ask(f"SELECT relname FROM pg_class WHERE relname = {sql.literal(name)}")
        assert row["relname"] == name
    finally:
        ask(f"DROP SCHEMA {sql.identifier(name)} CASCADE")


@pytest.mark.parametrize("isolation", [None, *sql.ISOLATION_LEVELS])
@pytest.mark.parametrize("readonly", [False, True])
def test_a_transaction_has_the_modes_that_were_asked_for(
    ask: Ask, isolation: sql.Isolation | None, readonly: bool
) -> None:
    deferrable = isolation == "serializable" and readonly
    ask(sql.begin(isolation, readonly=readonly, deferrable=deferrable))
    try:
        shown = [ask(f"SHOW transaction_{mode}")[0][0] for mode in ("isolation", "read_only", "deferrable")]
    finally:
        ask(sql.ROLLBACK)
    assert shown == [
        isolation or "read committed",
        "on" if readonly else "off",
        "on" if deferrable else "off",
    ]


@given(st.floats(5, 1e9), st.floats(1e-6, 1e9))
@settings(max_examples=30)
def test_the_server_takes_every_limit_that_we_write(ask: Ask, statement: float, lock: float) -> None:
    wanted = (sql.server_milliseconds(statement), sql.server_milliseconds(lock))
    ask(sql.begin())
    try:
        ask(sql.set_limits(wanted))
        found = ask(
            "SELECT (SELECT setting::bigint FROM pg_settings WHERE name = 'statement_timeout') AS statement, "
            "(SELECT setting::bigint FROM pg_settings WHERE name = 'lock_timeout') AS lock"
        )
    finally:
        ask(sql.ROLLBACK)
    assert (found[0]["statement"], found[0]["lock"]) == wanted


def test_limits_are_put_back_as_they_were_for_the_session(ask: Ask) -> None:
    """Also where the session's own are not the server's."""
    ask("SET statement_timeout = '77s'")
    try:
        ask(sql.begin())
        for part in sql.track_limits((5000, 500), sql.UNLIMITED).split("; "):
            ask(part)
        assert ask("SHOW statement_timeout")[0][0] == "5s"
        assert ask("SHOW lock_timeout")[0][0] == "500ms"
        for part in sql.track_limits(sql.UNLIMITED, (5000, 500)).split("; "):
            ask(part)
        assert ask("SHOW statement_timeout")[0][0] == "77s"
        assert ask("SHOW lock_timeout")[0][0] == "0"
        ask(sql.COMMIT)
        assert ask("SHOW statement_timeout")[0][0] == "77s"
    finally:
        ask("RESET statement_timeout")


def test_the_savepoint_of_a_depth_is_the_one_that_is_meant(ask: Ask) -> None:
    ask(sql.begin())
    try:
        for depth in (1, 2, 3):
            ask(sql.savepoint(depth))
        ask(sql.rollback_to(1))
        with pytest.raises(asyncpg.InvalidSavepointSpecificationError):
            ask(sql.rollback_to(2))
        ask(sql.rollback_to(1))
        ask(sql.release(1))
        with pytest.raises(asyncpg.InvalidSavepointSpecificationError):
            ask(sql.release(1))
    finally:
        ask(sql.ROLLBACK)
