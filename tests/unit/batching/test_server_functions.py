"""The functions that try rows in the server: their arguments, and which types travel to them how."""

from __future__ import annotations

from typing import Any

import pytest

from dbop_raw.batching import server_functions
from dbop_raw.batching.server_functions import Arguments, Column
from dbop_raw.batching.writers.protocol import Unsupported

INT, ENUM, OWN = 23, 20_001, 20_002


def test_few_columns_have_an_argument_each() -> None:
    arguments = Arguments(["integer", "text", "integer"])
    assert arguments.declared == "d_1 integer[], d_2 text[], d_3 integer[]"
    assert arguments.columns == [[0], [1], [2]]
    assert not arguments.merged


@pytest.mark.parametrize("width", [97, 1600])
def test_many_columns_share_an_argument_a_type(width: int) -> None:
    """A function takes 100 at most, and four of them are our own."""
    types = ["integer" if n % 3 else "text" for n in range(width)]
    arguments = Arguments(types)
    assert arguments.types == ["text", "integer"]
    assert sorted(place for places in arguments.columns for place in places) == list(range(width))
    parts = arguments.unnested.split(", ")
    assert len({*parts}) == width
    # The second text of a row is the third column after the first: the second part of the first array.
    assert parts[3] == (
        "pg_catalog.unnest(d_1[1 OPERATOR(pg_catalog.*) d_count OPERATOR(pg_catalog.+) 1"
        ":2 OPERATOR(pg_catalog.*) d_count])"
    )


class TestWay:
    """Of which type values travel how, by what the driver is asked."""

    @pytest.fixture(autouse=True)
    def driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server_functions, "has_own_codec", lambda conn, oid: oid in conn)
        monkeypatch.setattr(server_functions, "has_binary_codec", lambda _, oid: oid in {INT, ENUM})

    def column(self, base: int, kind: str = "b", oid: int | None = None, **more: Any) -> Column:
        options = {"is_array": False, "casts_otherwise": False} | more
        return Column("v", base if oid is None else oid, base, "t", kind, **options)

    @pytest.mark.parametrize("copied", [True, False])
    def test_a_type_of_the_servers_travels_in_an_array_of_it(self, copied: bool) -> None:
        assert self.column(INT).way(set(), copied=copied) == "array"
        assert self.column(INT, oid=OWN).way(set(), copied=copied) == "array"

    @pytest.mark.parametrize("copied", [True, False])
    def test_an_enum_travels_as_text(self, copied: bool) -> None:
        assert self.column(ENUM, "e").way(set(), copied=copied) == "text"

    def test_what_the_driver_sends_as_text_does_not_travel_where_it_would_be_copied(self) -> None:
        assert self.column(OWN).way(set(), copied=False) == "text"
        with pytest.raises(Unsupported):
            self.column(OWN).way(set(), copied=True)

    @pytest.mark.parametrize(
        ("column", "codecs"),
        [
            ({"base": INT}, {INT}),
            ({"base": INT, "oid": OWN}, {OWN}),
            ({"base": INT, "oid": OWN}, {INT}),
            ({"base": ENUM, "kind": "e"}, {ENUM}),
            ({"base": INT, "is_array": True}, set()),
            ({"base": OWN, "casts_otherwise": True}, set()),
            ({"base": OWN, "kind": "c"}, set()),
        ],
        ids=["a codec", "for the domain", "below the domain", "for the enum", "array", "cast", "composite"],
    )
    def test_what_might_be_encoded_otherwise_does_not_travel(self, column: Any, codecs: set[int]) -> None:
        with pytest.raises(Unsupported):
            self.column(**column).way(codecs, copied=False)
