"""A workload of the user's own: a file of SQL, or an operation in a Python module."""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.pool.errors import BadOption
from bench.pool.workloads import BUILT_IN, Request, Workload
from dbop_raw import Operation
from dbop_raw.driver.connection import Connection
from dbop_raw.pipeline.operation import to_operation

__all__ = ["Script", "find_workload", "parse_script"]

_SET = re.compile(r"\\set\s+(\w+)\s+random\(\s*(-?\d+)\s*,\s*(-?\d+)\s*\)\s*")
_VARIABLE = re.compile(r"(?<!:):([A-Za-z_]\w*)")


def find_workload(name: str) -> Workload:
    """The workload of `--workload`. Raises `BadOption` where there is none of that name."""
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


# --- SQL


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
        return _VARIABLE.sub(lambda found: _number(values, found), self.text)

    def prepared(self) -> tuple[str, tuple[str, ...]]:
        """The text with `$1::bigint` … and the variables that they stand for: for one statement."""
        found = set(_VARIABLE.findall(self.text))
        used = tuple(name for name, _, _ in self.variables if name in found)
        numbers = {name: f"${number}::bigint" for number, name in enumerate(used, 1)}
        return _VARIABLE.sub(lambda found: numbers.get(found[1], found[0]), self.text), used


def _number(values: dict[str, int], found: re.Match[str]) -> str:
    value = values.get(found[1])
    if value is None:
        return found[0]
    return f"({value})" if value < 0 else str(value)


def parse_script(text: str) -> Script:
    r"""Read SQL, with pgbench's `\set NAME random(LOW, HIGH)` lines and `:NAME` where the number goes.

    Raises `BadOption` for any other backslash command, and where there is no SQL.
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
    sql = "\n".join(lines).strip()
    if not re.sub(r"--[^\n]*", "", sql).strip("; \n\t"):
        raise BadOption("there is no SQL in it")
    return Script(sql, tuple(variables))


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


# --- Python


def _python_workload(module: str, attribute: str) -> Workload:
    where = f"--workload {module}:{attribute}"
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as exc:
        # It is the user's code that runs here: whatever it raises is theirs to read.
        raise BadOption(f"{where}: can't import it: {type(exc).__name__}: {exc}") from exc
    return Workload(
        f"{module}:{attribute}", "an operation of your own, in a transaction", _maker(found, where)
    )


def _maker(found: Any, where: str) -> Callable[[random.Random], Request]:
    """How to make a request of `found`: an operation, what `@operation` made, or an async function."""
    if isinstance(found, Operation):
        return lambda _: _in_transaction(found)
    if not callable(found):
        raise BadOption(f"{where}: it is a {type(found).__name__}: name an operation, or an async function")
    if inspect.iscoroutinefunction(found):
        operation = to_operation(found)
        return lambda _: _in_transaction(operation)
    try:
        wants = len(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        wants = 0
    if wants > 1:
        raise BadOption(
            f"{where}: it takes {wants} arguments: name one that takes none, or one (a random.Random, to "
            "draw its own from)"
        )

    def make(rng: random.Random) -> Request:
        made = found(rng) if wants else found()
        if not isinstance(made, Operation):
            raise BadOption(f"{where}: it gave a {type(made).__name__}, not an operation")
        return _in_transaction(made)

    return make


def _in_transaction(operation: Operation[Any]) -> Request:
    return Request(operation, operation, transaction=True)
