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

from dbop_raw.batching.references import ForeignKeys
from dbop_raw.batching.writers.protocol import RowFailure
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
    """The values that foreign keys refused, of one table.

    Args:
        columns: The columns that are written, in the order of a row's values.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = tuple(columns)
        self._keys = ForeignKeys()
        # By a constraint's columns; for one column the values themselves, for several tuples of them.
        self._refused: dict[tuple[int, ...], set[Any]] = {}
        self._size = 0
        self._disabled = False

    def disable(self) -> None:
        """Suspect nobody any more, for good: an error was met that depends on the rows' order."""
        self._refused.clear()
        self._disabled = True

    def among(self, rows: Sequence[Sequence[Any]]) -> list[int]:
        """Return the places of the suspects among `rows`, in order."""
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
        """Keep the values that foreign keys have refused. A constraint that is new costs a round trip.

        Args:
            scope: Where to look a constraint up.
            rows: The rows that were tried.
            failures: What came of them, by the places in `rows`.
        """
        for failure in failures:
            error = failure.error
            full = self._disabled or self._size >= _MOST
            if full or not isinstance(error, asyncpg.ForeignKeyViolationError):
                continue
            key = await self._keys.of(scope, error)
            # Of a table to itself it tells nothing: a row may be refused for what comes after it.
            if key is not None and not key.to_itself and set(key.columns) <= set(self._columns):
                places = tuple(self._columns.index(name) for name in key.columns)
                row = rows[failure.index]
                refused = self._refused.setdefault(places, set())
                refused.add(row[places[0]] if len(places) == 1 else tuple(row[p] for p in places))
                self._size = sum(map(len, self._refused.values()))
