"""Foreign keys of a table to itself, and the order in which rows that refer to each other can be written.

Such a row is refused for a parent that comes later, or that was itself refused; when others are in, it is
tried again. Where the rows' columns are known, so is who waits for whom: parents go first, and those that
need each other go together. Else they are tried in order, then backwards, as long as that helps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from dbop_raw.batching.sql import read
from dbop_raw.session.scope import Scope

__all__ = ["ForeignKey", "ForeignKeys", "parents_first"]


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """A foreign key, by the names of columns."""

    columns: tuple[str, ...]
    referenced: tuple[str, ...]
    """The columns that these refer to, in the same order."""
    to_itself: bool
    """Does it refer to its own table?"""


class ForeignKeys:
    """The foreign keys that refused a row: each is looked up once, at a round trip.

    What was found is kept for one engine, since another may be on another database.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], ForeignKey | None] = {}
        self._engine: object = None

    async def of(self, scope: Scope, error: BaseException) -> ForeignKey | None:
        """Return the foreign key that raised `error`; None where it is none, or not there."""
        if not isinstance(error, asyncpg.ForeignKeyViolationError):
            return None
        if self._engine is not scope.settings:
            self._found, self._engine = {}, scope.settings
        key = (str(error.schema_name), str(error.table_name), str(error.constraint_name))
        if key not in self._found:
            await scope.flush()
            row = await scope.conn.fetchrow(read("foreign_key"), *key)
            self._found[key] = row and ForeignKey(
                tuple(row["columns"]), tuple(row["referenced"]), row["to_itself"]
            )
        return self._found[key]


def parents_first(
    rows: Mapping[int, Sequence[Any]], columns: Sequence[str], keys: Iterable[ForeignKey]
) -> list[list[int]] | None:
    """Return the rows in an order in which those that are referred to come first.

    Args:
        rows: By their place in the batch, in order; each has one value a column.
        columns: The columns' names.
        keys: The foreign keys, of the table to itself.

    Returns:
        Their places: one by one, and together where they refer to each other in a circle. None where a key
        has columns that are not written, or values that can't be compared: then nobody knows.
    """
    parents: dict[int, list[int]] = {place: [] for place in rows}
    for key in keys:
        if not {*key.columns, *key.referenced} <= set(columns):
            return None
        child = [columns.index(name) for name in key.columns]
        parent = [columns.index(name) for name in key.referenced]
        try:
            there: dict[tuple[Any, ...], int] = {}
            for place, row in rows.items():
                there.setdefault(tuple(row[at] for at in parent), place)
            for place, row in rows.items():
                needed = there.get(tuple(row[at] for at in child))
                if needed is not None and needed != place:
                    parents[place].append(needed)
        except TypeError:
            return None
    return _circles(parents)


def _circles(parents: Mapping[int, Collection[int]]) -> list[list[int]]:
    """Return the strongly connected parts of a graph, each after those it points to (Tarjan's algorithm).

    Without recursion, for a chain may be as long as the batch.
    """
    found: list[list[int]] = []
    number: dict[int, int] = {}
    lowest: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    for root in parents:
        if root in number:
            continue
        number[root] = lowest[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        path = [(root, iter(parents[root]))]
        while path:
            node, left = path[-1]
            following = next(left, None)
            if following is None:
                path.pop()
                if path:
                    above = path[-1][0]
                    lowest[above] = min(lowest[above], lowest[node])
                if lowest[node] == number[node]:
                    part: list[int] = []
                    while not part or part[-1] != node:
                        part.append(stack.pop())
                    on_stack.difference_update(part)
                    found.append(sorted(part))
            elif following not in number:
                number[following] = lowest[following] = len(number)
                stack.append(following)
                on_stack.add(following)
                path.append((following, iter(parents[following])))
            elif following in on_stack:
                lowest[node] = min(lowest[node], number[following])
    return found
