"""What is measured: a workload makes its tables, and its requests one by one.

Four are built in; their tables are in a schema of their own, which is dropped at the end. Others are the
user's: a file of SQL, or an operation in a Python module.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbop_raw.batching.batch import batch
from dbop_raw.batching.writers.copy_into import copy_into
from dbop_raw.driver import sql
from dbop_raw.driver.connection import Connection
from dbop_raw.pipeline.operation import AnyOperation, Operation, operation, to_operation
from dbop_raw.sizing.options import BadOption

__all__ = [
    "BUILT_IN",
    "SCHEMA",
    "Request",
    "Script",
    "Workload",
    "find_workload",
    "parse_script",
    "prepare_schema",
    "remove_schema",
]

SCHEMA = "dbop_raw_pool_size"
# What makes the schema ours: one that has another comment, or none, is not touched.
_MARK = "made by dbop-raw pool-size; it may be dropped"
_ROWS, _CHUNK = 10_000, 500


@dataclass(frozen=True, slots=True)
class Request:
    """One piece of work, for the engine and for plain asyncpg code."""

    operation: AnyOperation[Any]
    """For `engine.run`."""
    bare: Callable[[Connection], Awaitable[Any]]
    """The same SQL, on a connection of `pool.acquire()`."""
    transaction: bool
    """In one transaction (`conn.transaction()` in plain asyncpg), else each statement by itself."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of request."""

    name: str
    description: str
    make: Callable[[random.Random], Request]
    """Makes the next request; the same random numbers make the same one."""
    setup: str = ""
    """SQL that makes its tables, once."""
    clear: str = ""
    """A statement before each measurement: what the one before it left must not slow this one."""


# --- built in

_READ = f"SELECT body FROM {SCHEMA}.accounts WHERE id = $1"
_WRITE = f"UPDATE {SCHEMA}.accounts SET balance = balance + $2 WHERE id = $1"
_ACCOUNTS = f"""
CREATE TABLE {SCHEMA}.accounts (id int PRIMARY KEY, balance bigint NOT NULL, body text NOT NULL)
    WITH (fillfactor = 50);
INSERT INTO {SCHEMA}.accounts
    SELECT n, 0, 'account ' || n || repeat(' ', 80) FROM generate_series(0, {_ROWS - 1}) n
"""
_VACUUM = f"VACUUM ANALYZE {SCHEMA}.accounts"
_COLUMNS = ("id", "body")
_copy_events = batch(copy_into("events", columns=_COLUMNS, schema=SCHEMA))


@operation
async def _read(conn: Connection, key: int) -> Any:
    return await conn.fetchval(_READ, key)


@operation
async def _write(conn: Connection, key: int, amount: int) -> Any:
    return await conn.execute(_WRITE, key, amount)


def _point_read(rng: random.Random) -> Request:
    key = rng.randrange(_ROWS)
    return Request(_read(key), lambda conn: conn.fetchval(_READ, key), transaction=False)


def _short_write(rng: random.Random) -> Request:
    key, amount = rng.randrange(_ROWS), rng.randint(-100, 100)
    return Request(_write(key, amount), lambda conn: conn.execute(_WRITE, key, amount), transaction=True)


def _mixed(rng: random.Random) -> Request:
    return _short_write(rng) if rng.random() < 0.2 else _point_read(rng)


def _ingest(rng: random.Random) -> Request:
    first = rng.getrandbits(40)
    rows = [(first + number, "an event of a middling length, as they come") for number in range(_CHUNK)]

    def bare(conn: Connection) -> Awaitable[Any]:
        copied: Awaitable[Any] = conn.copy_records_to_table(
            "events", schema_name=SCHEMA, columns=_COLUMNS, records=rows
        )
        return copied

    return Request(_copy_events(rows), bare, transaction=True)


_READS = f"one row of {_ROWS:,} by its primary key, no transaction"
_WRITES = f"one row of {_ROWS:,} updated, in a transaction"
_COPIES = f"{_CHUNK} rows by COPY, in a transaction"
_EVENTS = f"CREATE TABLE {SCHEMA}.events (id bigint NOT NULL, body text NOT NULL)"
BUILT_IN = {
    one.name: one
    for one in (
        Workload("point-read", _READS, _point_read, _ACCOUNTS, _VACUUM),
        Workload("short-write", _WRITES, _short_write, _ACCOUNTS, _VACUUM),
        Workload("mixed", "80 % point-read, 20 % short-write", _mixed, _ACCOUNTS, _VACUUM),
        Workload("ingest", _COPIES, _ingest, _EVENTS, f"TRUNCATE {SCHEMA}.events"),
    )
}


async def prepare_schema(conn: Connection) -> None:
    """Make the schema, empty; `BadOption` where somebody else's has that name."""
    mark = await conn.fetchrow(
        "SELECT pg_catalog.obj_description(oid, 'pg_namespace') FROM pg_catalog.pg_namespace "
        "WHERE nspname = $1",
        SCHEMA,
    )
    if mark is not None and mark[0] != _MARK:
        raise BadOption(f"the database has a schema {SCHEMA} that this command did not make: drop it first")
    await remove_schema(conn)
    await conn.execute(f"CREATE SCHEMA {SCHEMA}; COMMENT ON SCHEMA {SCHEMA} IS {sql.literal(_MARK)}")


async def remove_schema(conn: Connection) -> None:
    """Drop it, with what is in it; nothing where it is gone."""
    await conn.execute(f"SET client_min_messages = warning; DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")


def find_workload(name: str) -> Workload:
    """The workload of `--workload`; `BadOption` where there is none of that name, or it can't be used."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.endswith(".sql"):
        return _sql_workload(Path(name))
    module, colon, attribute = name.partition(":")
    if colon and module and attribute:
        return _python_workload(module, attribute)
    raise BadOption(
        f"--workload {name}: give one of {', '.join(BUILT_IN)}, a file that ends in .sql, or "
        "package.module:operation"
    )


# --- a file of SQL

_SET = re.compile(r"\\set\s+(\w+)\s+random\(\s*(-?\d+)\s*,\s*(-?\d+)\s*\)\s*")
_VARIABLE = re.compile(r"(?<!:):([A-Za-z_]\w*)")


@dataclass(frozen=True, slots=True)
class Script:
    """SQL to send as it is, in one message, with numbers drawn for its variables."""

    text: str
    variables: tuple[tuple[str, int, int], ...]
    """(name, lowest, highest), both included."""

    def draw(self, rng: random.Random) -> dict[str, int]:
        """Numbers for a request."""
        return {name: rng.randint(low, high) for name, low, high in self.variables}

    def literal(self, values: dict[str, int]) -> str:
        """The text with the numbers in it: for several statements, which can't have parameters."""
        numbers = {name: f"({value})" if value < 0 else str(value) for name, value in values.items()}
        return _VARIABLE.sub(lambda found: numbers.get(found[1], found[0]), self.text)

    def prepared(self) -> tuple[str, tuple[str, ...]]:
        """The text with `$1::bigint` … and the variables that they stand for: for one statement."""
        found = set(_VARIABLE.findall(self.text))
        used = tuple(name for name, _, _ in self.variables if name in found)
        numbers = {name: f"${number}::bigint" for number, name in enumerate(used, 1)}
        return _VARIABLE.sub(lambda found: numbers.get(found[1], found[0]), self.text), used


def parse_script(text: str) -> Script:
    r"""Read SQL, with pgbench's `\set NAME random(LOW, HIGH)` lines and `:NAME` where the number goes.

    `BadOption` for any other backslash command, and where there is no SQL.
    """
    variables, lines = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.lstrip().startswith("\\"):
            lines.append(line)
            continue
        found = _SET.fullmatch(line.strip())
        if found is None or int(found[2]) > int(found[3]):
            raise BadOption(rf"line {number}: only \set NAME random(LOW, HIGH) may begin with a backslash")
        variables.append((found[1], int(found[2]), int(found[3])))
    statements = "\n".join(lines).strip()
    if not re.sub(r"--[^\n]*", "", statements).strip("; \n\t"):
        raise BadOption("there is no SQL in it")
    return Script(statements, tuple(variables))


def _sql_workload(path: Path) -> Workload:
    try:
        script = parse_script(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise BadOption(f"--workload: can't read {path.absolute()}: {reason}") from None
    except BadOption as exc:
        raise BadOption(f"--workload {path.name}: {exc}") from None
    statement, used = script.prepared()
    # Without the one semicolon at its end, what is left of one statement has none but in strings.
    single = ";" not in statement.rstrip("; \n\t")

    def make(rng: random.Random) -> Request:
        values = script.draw(rng)
        if single:
            arguments = tuple(values[name] for name in used)
            return _as_it_is(lambda conn: conn.fetch(statement, *arguments))
        text = script.literal(values)
        return _as_it_is(lambda conn: conn.execute(text))

    how = "one statement, prepared" if single else "several statements in one message"
    return Workload(path.name, f"the SQL of {path.name}: {how}, its own transactions", make)


def _as_it_is(body: Callable[[Connection], Awaitable[Any]]) -> Request:
    return Request(body, body, transaction=False)


# --- an operation of a Python module


def _python_workload(module: str, attribute: str) -> Workload:
    where = f"--workload {module}:{attribute}"
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as exc:
        # It is the user's code that runs here: whatever it raises is theirs to read.
        raise BadOption(f"{where}: can't import it: {type(exc).__name__}: {exc}") from exc
    make = _maker(found, where)

    def request(rng: random.Random) -> Request:
        made = make(rng)
        return Request(made, made, transaction=True)

    return Workload(f"{module}:{attribute}", "an operation of your own, in a transaction", request)


def _maker(found: Any, where: str) -> Callable[[random.Random], Operation[Any]]:
    """How to make the next operation of `found`: one, what `@operation` made, or an async function."""
    if isinstance(found, Operation):
        return lambda _: found
    if not callable(found):
        raise BadOption(f"{where}: it is a {type(found).__name__}: name an operation, or an async function")
    if inspect.iscoroutinefunction(found):
        one = to_operation(found)
        return lambda _: one
    try:
        wants = len(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        wants = 0
    if wants > 1:
        raise BadOption(
            f"{where}: it takes {wants} arguments: name one that takes none, or one (a random.Random, to "
            "draw its own from)"
        )

    def make(rng: random.Random) -> Operation[Any]:
        made = found(rng) if wants else found()
        if not isinstance(made, Operation):
            raise BadOption(f"{where}: it gave a {type(made).__name__}, not an operation")
        return made

    return make
