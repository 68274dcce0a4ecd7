"""What was seen of the server, added up."""

from __future__ import annotations

import pytest

pytest.importorskip("numpy", reason="needs the extra sizing")

from dbop_raw.sizing.measure import Sample, summarise


def test_samples_of_the_server_are_averaged_and_the_most_frequent_comes_first() -> None:
    looks = [
        Sample(0.1, 2, 0, 2, 1, (("CPU", 1), ("IO:WalSync", 1))),
        Sample(0.2, 2, 0, 2, 2, (("IO:WalSync", 2),)),
    ]
    found = summarise(looks)
    assert (found.samples, found.active, found.blocked) == (2, 2.0, 1.5)
    assert list(found.events.items()) == [("IO:WalSync", 1.5), ("CPU", 0.5)]
    assert summarise([]).samples == 0
