"""`batch`: its options and its items are checked at the earliest moment."""

from __future__ import annotations

from typing import Any

import pytest

from dbop_raw import PolicyError, batch
from tests.support.batching import item_batch


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"skip_limit": -1}, "skip_limit=-1"),
        ({"skip_limit": True}, "skip_limit"),
        ({"retry": 3}, "retry=3"),
    ],
)
def test_options_are_checked_when_the_batch_is_made(options: dict[str, Any], match: str) -> None:
    with pytest.raises(PolicyError, match=match):
        item_batch("each", **options)


@pytest.mark.parametrize("thing", [len, "INSERT …", None], ids=["a function", "SQL", "None"])
def test_a_thing_that_is_no_writer_is_refused(thing: Any) -> None:
    with pytest.raises(PolicyError, match="give a writer"):
        batch(thing)


@pytest.mark.parametrize(
    "items", [iter([1]), {1, 2}, "ab", b"ab", (n for n in [1])], ids=lambda items: type(items).__name__
)
def test_items_that_are_no_sequence_are_refused(items: Any) -> None:
    with pytest.raises(TypeError, match="sequence"):
        item_batch("each")(items)
