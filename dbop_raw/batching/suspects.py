"""Rows that a foreign key will most likely refuse, since it refused their value before.

Bad references come in crowds: the same missing parent again and again. Where they are set apart, the rest can
be written in large blocks, and only the suspects row by row. Nobody is condemned on suspicion: each row is
tried.

The order of the rows changes by that. It makes no difference as long as no error depends on the order, which
a unique or an exclusion constraint's does: where one is met, the caller has to start again, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import asyncpg

from dbop_raw.batching.inserver import RowFailure
from dbop_raw.session.scope import Scope

__all__ = ["Suspects", "depends_on_order"]

# Errors of the row alone, whatever was written before it: everything of class 22, and these.
_OF_THE_ROW = frozenset({"23502", "23503", "23514"})
# So many values are kept; what is refused beyond that is found as it was before.
_MOST = 100_000


def depends_on_order(failure: RowFailure) -> bool:
    """Might the row have been written, or another one refused, if the rows had come in another order?"""
    sqlstate = getattr(failure.error, "sqlstate", None) or ""
    return not (sqlstate in _OF_THE_ROW or sqlstate.startswith("22"))


class Suspects:
    """What foreign keys refused, by the columns that they are of. One for a table and its columns."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = tuple(columns)
        # A constraint's columns, as places in a row; None: not to be learned from.
        self._places: dict[tuple[str, str, str], tuple[int, ...] | None] = {}
        self._refused: dict[tuple[int, ...], set[Any]] = {}
        self._size = 0

    def give_up(self) -> None:
        """An error that depends on the rows' order was met: suspect nobody any more."""
        self._refused.clear()
        self._size = _MOST

    def among(self, rows: Sequence[Sequence[Any]]) -> list[int]:
        """The places of the suspects among `rows`, in order."""
        found: set[int] = set()
        try:
            for places, refused in self._refused.items():
                if len(places) == 1:
                    (place,) = places
                    found.update([i for i, row in enumerate(rows) if row[place] in refused])
                else:
                    found.update(
                        [i for i, row in enumerate(rows) if tuple(row[p] for p in places) in refused]
                    )
        except TypeError:
            # A value that can't be hashed is no reference; the server will say what is wrong with it.
            return []
        return sorted(found)

    async def learn(
        self, scope: Scope, rows: Sequence[Sequence[Any]], failures: Sequence[RowFailure]
    ) -> None:
        """Keep what was refused; `failures` go by places in `rows`. A new constraint costs a round trip."""
        for failure in failures:
            error = failure.error
            if not isinstance(error, asyncpg.ForeignKeyViolationError) or self._size >= _MOST:
                continue
            key = (str(error.schema_name), str(error.table_name), str(error.constraint_name))
            if key not in self._places:
                self._places[key] = await self._look_up(scope, key)
            places = self._places[key]
            if places is not None:
                row = rows[failure.index]
                refused = self._refused.setdefault(places, set())
                refused.add(row[places[0]] if len(places) == 1 else tuple(row[p] for p in places))
                self._size = sum(map(len, self._refused.values()))

    async def _look_up(self, scope: Scope, key: tuple[str, str, str]) -> tuple[int, ...] | None:
        """The constraint's columns; None where one is not written, or it refers to its own table.

        (Then a row may be refused for what comes after it, and its value be good the next time.)
        """
        await scope.flush()
        names = await scope.conn.fetchval(
            "SELECT pg_catalog.array_agg(a.attname::pg_catalog.text) FROM pg_catalog.pg_constraint c "
            "JOIN pg_catalog.pg_class t ON t.oid OPERATOR(pg_catalog.=) c.conrelid "
            "JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) t.relnamespace "
            "JOIN pg_catalog.pg_attribute a ON a.attrelid OPERATOR(pg_catalog.=) c.conrelid "
            "AND a.attnum OPERATOR(pg_catalog.=) ANY (c.conkey) "
            "WHERE n.nspname OPERATOR(pg_catalog.=) $1 AND t.relname OPERATOR(pg_catalog.=) $2 "
            "AND c.conname OPERATOR(pg_catalog.=) $3 AND c.confrelid OPERATOR(pg_catalog.<>) c.conrelid",
            *key,
        )
        if not names or not set(names) <= set(self._columns):
            return None
        return tuple(self._columns.index(name) for name in names)
