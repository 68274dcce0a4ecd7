"""The digest of a chunk's items: the same for the same items in every process, and only for them."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbop_raw.ingestion.digest import digest


class Colour(enum.Enum):
    RED = 1


@dataclass
class Event:
    id: int
    tags: set[str] = field(default_factory=set)


class Silent:
    def __repr__(self) -> str:
        raise ValueError("no words")


PLAIN: list[Any] = [(1, "körper", None, True), (2, "", 2.5, False)]
# A version that gives another can't go on with the ledgers of this one.
KNOWN = "4d3cc04be68d464c658aad8c175b4b41"


def test_it_stays_what_it_was() -> None:
    assert digest(PLAIN).hex() == KNOWN
    assert digest([]).hex() != digest([()]).hex()


DIFFERENT: list[Any] = [
    [(1, "a")], [(2, "a")], [(1, "b")], [("1", "a")], [(1, None)], [(1, "a"), (1, "a")], [(1,), ("a",)],
    [(1, "a", "")], [(1, b"a")], [(True, "a")], [(1.5, "a")], [(decimal.Decimal("1.5"), "a")], [("1.5", "a")],
    [{"id": 1, "body": "a"}], [{"id": 1, "text": "a"}], [dt.date(2026, 1, 1)], [dt.date(2026, 1, 2)],
    [dt.datetime(2026, 1, 1, tzinfo=dt.UTC)], [uuid.UUID(int=1)], [uuid.UUID(int=2)], [{"a", "b"}],
    [{"a", "c"}], [Event(1)], [Event(2)], [Event(1, {"x"})], [Colour.RED], [asyncpg.Range(1, 2)],
    [asyncpg.Range(1, 3)], [float("nan")], [{1: 2}], [{(1, 2): 3}],
]  # fmt: skip


def test_other_items_have_another() -> None:
    assert len({digest(items) for items in DIFFERENT}) == len(DIFFERENT)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([(1, "a")], [[1, "a"]]),
        ([(1, "a")], ((1, "a"),)),
        ([{"b", "a"}], [{"a", "b"}]),
        ([float("nan")], [float("nan")]),
        ([object()], [object()]),
        ([Silent()], [Silent()]),
        ([(1, object())], [(1, object())]),
    ],
    ids=["list and tuple", "sequences", "sets", "NaN", "objects", "no repr", "objects in a row"],
)
def test_items_that_are_written_alike_have_the_same(one: Any, other: Any) -> None:
    """What has no value of its own to be compared by counts by its type: it must never stop a second run."""
    assert digest(one) == digest(other)


def test_what_can_not_be_compared_does_not_stop_the_rest_from_being() -> None:
    assert digest([(1, object())]) != digest([(2, object())])
    circle: list[Any] = []
    circle.append(circle)
    assert digest([circle, 1]) != digest([circle, 2])


def test_lone_surrogates_and_large_numbers_are_taken() -> None:
    assert digest(["\ud800"]) != digest(["\ud801"])
    assert digest([10**400]) != digest([10**400 + 1])


PROGRAM = """
import sys
sys.path[:0] = [{folder!r}]
from test_digest import DIFFERENT, digest
print(*(digest(items).hex() for items in DIFFERENT))
"""


def test_it_is_the_same_in_another_process() -> None:
    """Which hashes its texts otherwise, so that its sets are in another order."""
    here = [digest(items).hex() for items in DIFFERENT]
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(folder=os.path.dirname(__file__))],  # noqa: PTH120
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == here


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.floats(allow_nan=False))
ROWS = st.lists(st.tuples(VALUES, VALUES), max_size=5)


@given(ROWS, ROWS)
def test_it_differs_exactly_where_the_rows_do(one: list[Any], other: list[Any]) -> None:
    # repr, for 1, 1.0 and True are equal and are not the same to a database.
    assert (digest(one) == digest(other)) == (repr(one) == repr(other))
