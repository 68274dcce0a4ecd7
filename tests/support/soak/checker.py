"""The checker: what must be in the table, each row surely in, surely out, or unknown for an allowed reason.

The table has no unique key on purpose: a row that is written twice has to be seen, not refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dbop_raw import CommitUnknown

__all__ = ["BAD", "TABLE", "Audit", "Books", "Group", "Row"]

TABLE = "CREATE TABLE t (id bigint NOT NULL, body text NOT NULL CHECK (body <> 'bad'))"
BAD = "bad"
"""A body that the table refuses."""

Row = tuple[int, str]


@dataclass(slots=True, eq=False)
class Group:
    """The rows of one transaction: all of the good ones are in, or none."""

    good: tuple[int, ...]
    bad: tuple[int, ...] = ()

    @property
    def rows(self) -> list[Row]:
        """What to write, in the order of the ids."""
        return [(number, BAD if number in self.bad else "good") for number in sorted(self.good + self.bad)]

    @property
    def bad_indexes(self) -> list[int]:
        """Where the bad rows are in `rows`."""
        return [index for index, (_, body) in enumerate(self.rows) if body == BAD]


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found; ids, so that a failure can be looked up."""

    lost: tuple[int, ...]
    """Acknowledged, and not there."""
    doubled: tuple[int, ...]
    """There more than once."""
    ghosts: tuple[int, ...]
    """There, though an error said that they are not."""
    torn: tuple[int, ...]
    """The ids of transactions that are there in part."""
    rows: int
    """Rows in the table."""

    @property
    def clean(self) -> bool:
        """Is nothing wrong?"""
        return not (self.lost or self.doubled or self.ghosts or self.torn)


@dataclass(slots=True)
class Books:
    """The account of one table, kept by whoever writes to it; one event loop only."""

    done: set[int] = field(default_factory=set)
    out: set[int] = field(default_factory=set)
    unknown: list[Group] = field(default_factory=list)
    calls: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    surprises: list[str] = field(default_factory=list)
    """What an answer said that can't be right, whatever the table holds."""
    overrun: float = 0.0
    """Seconds: the most that a call took beyond its deadline."""
    overrun_by: str = ""
    """How that call ended: "done", or its error's type."""
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1), repr=False)
    """Where new rows get their ids; several books of one table share it."""
    taken: list[int] = field(default_factory=list, repr=False)
    """All ids of these books."""

    def group(self, good: int = 1, bad: Sequence[int] = ()) -> Group:
        """New rows: `good` good ones, and bad ones at the indexes `bad` among them all."""
        ids = [next(self.ids) for _ in range(good + len(bad))]
        self.taken += ids
        refused = tuple(ids[index] for index in bad)
        return Group(tuple(number for number in ids if number not in refused), refused)

    @contextlib.contextmanager
    def judging(self, *groups: Group, deadline: float | None = None, settled: bool = True) -> Iterator[None]:
        """Enter what becomes of `groups`, and what the block took beyond `deadline` (seconds).

        An error means that nothing is in, but for a `CommitUnknown` and a cancellation. `settled=False`: an
        error says nothing of the rows (an autocommitted statement, an ingest of many transactions).
        """
        started = asyncio.get_running_loop().time()
        self.calls += 1
        end = "done"
        try:
            yield
        except BaseException as exc:
            end = type(exc).__name__
            self.errors[end] = self.errors.get(end, 0) + 1
            # A lost connection is sure, too: it was lost before COMMIT, or it would be CommitUnknown.
            sure = settled and isinstance(exc, Exception) and not isinstance(exc, CommitUnknown)
            for group in groups:
                self.out.update(group.bad)
                if sure:
                    self.out.update(group.good)
                else:
                    self.unknown.append(group)
            raise
        else:
            for group in groups:
                self.done.update(group.good)
                self.out.update(group.bad)
        finally:
            if deadline is not None:
                over = asyncio.get_running_loop().time() - started - deadline
                if over > self.overrun:
                    self.overrun, self.overrun_by = over, end

    def failed_are(self, group: Group, found: Sequence[int]) -> None:
        """Note it when the items that a batch set aside are not the bad ones."""
        if list(found) != group.bad_indexes:
            self.surprises.append(f"bad items {group.bad_indexes}, set aside {list(found)}")

    async def audit(self, conn: Any, *, whole_table: bool = False) -> Audit:
        """Compare with the table: the rows of these books, or all that there are."""
        query = "SELECT id, count(*) AS n FROM t"
        if whole_table:
            rows = await conn.fetch(f"{query} GROUP BY id")
        else:
            rows = await conn.fetch(f"{query} WHERE id = ANY($1::bigint[]) GROUP BY id", self.taken)
        there = {row["id"]: row["n"] for row in rows}
        return Audit(
            lost=tuple(sorted(self.done - there.keys())),
            doubled=tuple(sorted(number for number, n in there.items() if n > 1)),
            ghosts=tuple(sorted(self.out & there.keys())),
            torn=tuple(
                group.good[0]
                for group in self.unknown
                if group.good and 0 < sum(number in there for number in group.good) < len(group.good)
            ),
            rows=sum(there.values()),
        )
