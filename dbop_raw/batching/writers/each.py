"""`each`: each item is written by an operation of its own, whatever that does.

The slowest way, a round trip an item, and the only one that keeps results, takes several statements an item,
or calls code of the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import asyncpg

from dbop_raw.batching.writers.protocol import Tried, WriteFailed, Written
from dbop_raw.failure.errors import PolicyError
from dbop_raw.pipeline.operation import AnyOperation, to_operation
from dbop_raw.session.scope import Scope, name_of

__all__ = ["Each", "each"]

Item = TypeVar("Item")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, repr=False)
class Each(Generic[Item, R]):
    """The writer that `each` makes."""

    make_op: Callable[[Item], AnyOperation[R]]
    per_item: ClassVar[bool] = True
    columns: ClassVar[None] = None

    @property
    def name(self) -> str:
        """As it is written: `each(add_event)`."""
        return f"each({name_of(self.make_op)})"

    def __repr__(self) -> str:
        """As it is written."""
        return self.name

    async def write(self, scope: Scope, items: Sequence[Item], lo: int, hi: int) -> Written[R]:
        """Run the operations one after another; the first that fails ends the span."""
        results: list[R] = []
        append, make_op = results.append, self.make_op
        outer = scope.attempts
        if lo == 0 or scope.control.begins:
            # What begins the transaction fails here, if it fails, and not as the first item.
            await scope.flush()
        try:
            for index in range(lo, hi):
                # The starts of an item's own retry are counted for one run of that item only.
                scope.attempts = {}
                try:
                    append(await to_operation(make_op(items[index])).step(scope, scope.frame))
                except Exception as exc:
                    raise WriteFailed(index, exc) from exc
        finally:
            scope.attempts = outer
        return Written(results)

    async def write_rows(
        self, scope: Scope, items: Sequence[Item], lo: int, hi: int, failure_rate: float
    ) -> Tried:
        """Not for operations: the chooser never asks."""
        raise NotImplementedError

    async def refresh(self, scope: Scope, failed: WriteFailed) -> bool:
        """Where the driver itself found its memory stale: the statements are the operation's own."""
        stale = (
            asyncpg.exceptions.InvalidCachedStatementError,
            asyncpg.exceptions.OutdatedSchemaCacheError,
        )
        if not isinstance(failed.error, stale):
            return False
        await scope.conn.reload_schema_state()
        return True


def each(make_op: Callable[[Item], AnyOperation[R]]) -> Each[Item, R]:
    """Write each item with an operation of its own: `each(add_event)`. The results are kept.

    An item's operation may start more than once: when a later item of its span fails, what came before is
    done again. So it must have no effect outside of the transaction.

    Args:
        make_op: Makes an operation from an item, such as what `@operation` gives.

    Returns:
        A writer for `batch`.

    Raises:
        PolicyError: `make_op` can't be called.
    """
    if not callable(make_op):
        raise PolicyError(
            f"each() got an object of type {type(make_op).__name__}: give a function that makes an operation "
            "from an item"
        )
    return Each(make_op)
