"""The order of a chunk's items: the same in every chunk, whatever else is in it."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbop_raw.ingestion.order import in_order

PLAIN = st.one_of(st.none(), st.integers(-3, 3), st.sampled_from(["", "a", "b"]), st.dates())
KEYS = st.one_of(PLAIN, st.tuples(PLAIN, PLAIN))


def ordered(keys: list[Any]) -> list[Any]:
    return [keys[place] for place in in_order(keys)]


@given(st.lists(KEYS, max_size=8, unique_by=repr), st.data())
def test_two_keys_are_in_the_same_order_in_every_chunk(keys: list[Any], data: st.DataObject) -> None:
    """By that, workers lock rows in one order; a chunk without a None is sorted in another way."""
    whole = ordered(keys)
    chunk = [key for key in keys if data.draw(st.booleans())]
    there = ordered(chunk)
    assert there == [key for key in whole if key in chunk]


@given(st.lists(st.integers()))
def test_keys_that_can_be_compared_are_in_their_own_order(keys: list[int]) -> None:
    assert ordered(keys) == sorted(keys)


def test_equal_keys_stay_in_the_order_in_which_they_came() -> None:
    assert in_order([None, 1, None, 1]) == [1, 3, 0, 2]
    assert in_order([2, 1, 2, 1]) == [1, 3, 0, 2]


@pytest.mark.parametrize(
    "keys",
    [[{"a": 1}, {"a": 2}], [dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2026, 1, 1)]],  # noqa: DTZ001
    ids=["dict", "with and without a zone"],
)
def test_keys_of_a_type_without_an_order_are_told(keys: list[Any]) -> None:
    with pytest.raises(TypeError, match=type(keys[0]).__name__):
        in_order(keys)
