"""Parents first: the order in which rows of a table that refers to itself can be written."""

from __future__ import annotations

import random

from dbop_raw.batching.references import ForeignKey, parents_first

COLUMNS = ("id", "parent")
KEY = ForeignKey(("parent",), ("id",), to_itself=True)


def test_a_long_chain_that_comes_backwards_is_turned_round() -> None:
    rows = {n: (5000 - n, 4999 - n) for n in range(5000)}
    assert parents_first(rows, COLUMNS, [KEY]) == [[n] for n in reversed(range(5000))]


def test_each_row_comes_after_the_row_that_it_refers_to() -> None:
    chance = random.Random(1)
    pairs = [(0, None), *((n, chance.randrange(n)) for n in range(1, 500))]
    chance.shuffle(pairs)
    found = parents_first(dict(enumerate(pairs)), COLUMNS, [KEY])
    assert found is not None
    seen: set[int | None] = {None}
    for (place,) in found:
        assert pairs[place][1] in seen
        seen.add(pairs[place][0])
    assert len(seen) == 501


def test_rows_that_refer_to_each_other_in_a_circle_stand_together() -> None:
    rows = {4: (1, 2), 5: (2, 3), 6: (3, 1), 7: (9, 1), 8: (8, 8), 9: (7, None)}
    assert parents_first(rows, COLUMNS, [KEY]) == [[4, 5, 6], [7], [8], [9]]


def test_nobody_knows_the_order_where_a_column_is_not_written_or_can_not_be_compared() -> None:
    other = ForeignKey(("above",), ("id",), to_itself=True)
    assert parents_first({0: (1, 2)}, COLUMNS, [other]) is None
    assert parents_first({0: (1, [2])}, COLUMNS, [KEY]) is None
