"""In which order the sizes are measured."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("numpy", reason="needs the extra sizing")

from dbop_raw.sizing.measure import Cell
from dbop_raw.sizing.options import Options
from dbop_raw.sizing.sweep import plan


def test_each_round_measures_every_size_of_both_kinds_in_an_order_by_the_seed() -> None:
    options = Options(sizes=(1, 2, 4), rounds=3, seed=7)
    rounds = plan(options)
    assert [len(cells) for cells in rounds] == [6, 6, 6]
    assert all(set(cells) == set(rounds[0]) for cells in rounds)
    assert rounds[0] != rounds[1]
    assert plan(options) == rounds
    assert plan(dataclasses.replace(options, seed=8)) != rounds


def test_the_spike_measures_a_pool_that_grows_and_one_that_is_full_in_each_round() -> None:
    rounds = plan(Options(sizes=(1, 4), rounds=2, spike=True))
    assert [set(cells) for cells in rounds] == [{Cell(4, "dbop_raw", 1), Cell(4, "dbop_raw", 4)}] * 2
