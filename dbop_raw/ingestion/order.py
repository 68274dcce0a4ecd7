"""The order of a chunk's items by a key, the same in every chunk: so that workers lock rows in one order.

Keys are compared as they are where that can be done. Otherwise None comes last, as NULL does in SQL, and
values of unlike types are sorted apart, each among its own.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

__all__ = ["in_order"]


def in_order(keys: Sequence[Any]) -> list[int]:
    """Sort some keys.

    Args:
        keys: Of any types.

    Returns:
        The keys' places, in the order of the keys; of equal ones in the order in which they came.

    Raises:
        TypeError: There are keys of one type that has no order.
    """
    places = range(len(keys))
    try:
        return sorted(places, key=keys.__getitem__)
    except TypeError:
        pass
    ranks = [_rank(key) for key in keys]
    try:
        return sorted(places, key=ranks.__getitem__)
    except TypeError as exc:
        kinds = ", ".join(sorted({type(key).__name__ for key in keys}))
        raise TypeError(
            f"order_by gave keys that can't be sorted ({kinds}): give a number, a text, a date, or a tuple "
            "of such"
        ) from exc


def _rank(key: object) -> tuple[Any, ...]:
    """Make of a key what can be compared with that of any other, and sorts those of one type as they do."""
    if key is None:
        return (1,)
    if isinstance(key, (tuple, list)):
        return (0, "tuple", tuple(map(_rank, key)))
    if isinstance(key, numbers.Number):
        return (0, "number", key)
    return (0, "str" if isinstance(key, str) else type(key).__qualname__, key)
