"""Items in units: the order of writing, and the groups that stand or fall together."""

from __future__ import annotations

from typing import Any

import pytest

from dbop_raw.batching.layout import Layout, group_by


def test_units_of_groups_cover_their_items() -> None:
    layout = Layout.of_groups([[0, 3], [1], [2, 5, 4]])
    assert (layout.units, layout.span(0, 2), layout.span(2, 3)) == (3, (0, 3), (3, 6))
    assert [layout.unit_of(place) for place in range(6)] == [0, 0, 1, 2, 2, 2]
    assert [list(layout.members(unit)) for unit in range(3)] == [[0, 3], [1], [2, 5, 4]]


def test_groups_of_one_are_items() -> None:
    layout = Layout.of_groups([[2], [0]])
    assert (layout.starts, layout.units, layout.span(1, 2), layout.unit_of(1)) == (None, 2, (1, 2), 1)


def test_items_are_grouped_by_an_equal_key_in_the_order_of_the_first_ones() -> None:
    assert group_by("abcab", lambda letter: letter) == ([[0, 3], [1, 4], [2]], {})


@pytest.mark.parametrize(("bad", "kind"), [("raise", LookupError), ("unhashable", TypeError)])
def test_an_item_whose_key_can_not_be_told_is_in_no_group(bad: str, kind: type[Exception]) -> None:
    def key(item: str) -> Any:
        if item == "raise":
            raise LookupError(item)
        return [] if item == "unhashable" else item

    groups, failed = group_by(["x", bad, "x"], key)
    assert groups == [[0, 2]]
    assert {index: type(error) for index, error in failed.items()} == {1: kind}
