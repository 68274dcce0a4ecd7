"""Which size is recommended, in what words, and when the data can't decide."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numpy", reason="needs the extra sizing")

from dbop_raw.sizing.recommend import Advice, SizePoint, formula_size, recommend

SIZES = (1, 2, 4, 8, 16, 32, 64)
JITTER = (1.0, 0.99, 1.01, 1.005, 0.995)


def points(
    curve: dict[int, float],
    *,
    p99: dict[int, float] | None = None,
    noise: dict[int, tuple[float, ...]] | None = None,
) -> list[SizePoint]:
    """A curve of throughputs, measured in five rounds, each size with a small jitter of its own."""
    made = []
    for number, (size, throughput) in enumerate(curve.items()):
        factors = (noise or {}).get(size, JITTER[number % 5 :] + JITTER[: number % 5])
        slow = (p99 or {}).get(size, 0.010)
        made.append(
            SizePoint(
                size,
                tuple(throughput * one for one in factors),
                tuple(slow / (one or 1) for one in factors),
                0.003,
            )
        )
    return made


KNEE = {1: 1000.0, 2: 1900.0, 4: 3400.0, 8: 4000.0, 16: 4050.0, 32: 3600.0}
KNEE_P99 = {1: 0.02, 2: 0.015, 4: 0.012, 8: 0.010, 16: 0.020, 32: 0.050}


def test_a_clear_knee_is_recommended_with_its_reason() -> None:
    advice = recommend(points(KNEE, p99=KNEE_P99), cores=2)
    assert advice.size == advice.leaning == 8
    assert advice.sentence.startswith("8: 99% of the best throughput (that of 16), and the p99 wait is 3 ms")
    assert "at 16 the p99 doubles, 10 ms to 20 ms" in advice.sentence


def test_the_common_formula_stands_beside_it() -> None:
    advice = recommend(points(KNEE, p99=KNEE_P99), cores=2)
    assert advice.by_formula == formula_size(2) == 5
    assert "says 5 (2 cores)" in advice.formula
    assert "4 had 84%, 8 had 99%" in advice.formula
    measured = recommend(points({**KNEE, 33: 3000.0}, p99=KNEE_P99), cores=16)
    assert "says 33 (16 cores): 74% of the best throughput" in measured.formula


def test_a_flat_curve_needs_one_connection() -> None:
    advice = recommend(points(dict.fromkeys(SIZES, 4000.0)), cores=2, limit="The client was the limit.")
    assert advice.size == 1
    assert advice.sentence.endswith("The client was the limit.")


def test_a_larger_size_with_the_same_throughput_is_no_good_when_it_is_much_slower() -> None:
    good = {one.size: one.good for one in recommend(points(KNEE, p99=KNEE_P99), cores=2).standings}
    assert good == {1: "no", 2: "no", 4: "no", 8: "yes", 16: "no", 32: "no"}


def test_where_the_spread_of_the_rounds_overlaps_the_data_cannot_decide() -> None:
    noisy = points(KNEE, p99=dict.fromkeys(KNEE, 0.01), noise={8: (0.8, 1.1, 0.95, 0.85, 1.15)})
    advice = recommend(noisy, cores=2)
    assert advice.size is None
    assert advice.leaning in {8, 16}
    assert advice.sentence.startswith("The data can't decide between 8 and 16")


@pytest.mark.parametrize(("curve", "leaning"), [(KNEE, 8), ({1: 400.0, 2: 300.0, 4: 200.0}, 1)])
def test_one_round_cannot_decide(curve: dict[int, float], leaning: int) -> None:
    one = [
        dataclasses.replace(point, throughput=point.throughput[:1], p99=point.p99[:1])
        for point in points(curve)
    ]
    advice = recommend(one, cores=2)
    assert advice.size is None
    assert advice.leaning == leaning
    assert "one round has no spread" in advice.sentence


def test_a_curve_that_still_rises_asks_for_larger_sizes() -> None:
    advice = recommend(points({1: 100.0, 2: 200.0, 4: 400.0}), cores=2)
    assert advice.size is None
    assert advice.leaning == 4
    assert "measure larger ones" in advice.sentence


def test_one_size_alone_is_no_answer() -> None:
    advice = recommend(points({4: 400.0}), cores=2)
    assert (advice.size, advice.leaning) == (None, 4)
    assert "measure larger ones" in advice.sentence


def test_a_size_whose_requests_fail_is_not_recommended() -> None:
    failing = [dataclasses.replace(point, failed=0.2 if point.size == 8 else 0.0) for point in points(KNEE)]
    assert recommend(failing, cores=2).size == 16
    advice = recommend([dataclasses.replace(point, failed=0.5) for point in points(KNEE)], cores=2)
    assert advice.size is None
    assert advice.sentence.startswith("No size will do")


def test_nothing_that_succeeded_is_no_data() -> None:
    dead = [SizePoint(size, (0.0, 0.0), (0.0, 0.0), 0.0, 1.0) for size in SIZES]
    advice = recommend(dead, cores=2)
    assert advice.size is None
    assert "no request succeeded" in advice.sentence


def test_a_round_in_which_a_size_did_nothing_leaves_it_open() -> None:
    broken = points(KNEE, p99=dict.fromkeys(KNEE, 0.01), noise={8: (0.0, 1.0, 1.0, 1.0, 1.0)})
    assert recommend(broken, cores=2).size is None


@given(st.lists(st.floats(0.2, 5.0), min_size=5, max_size=5))
def test_what_slows_a_whole_round_changes_no_verdict(factors: list[float]) -> None:
    def standing(advice: Advice) -> dict[int, str]:
        return {one.size: one.good for one in advice.standings}

    even = points(KNEE, p99=KNEE_P99)
    slowed = [
        dataclasses.replace(
            point,
            throughput=tuple(a * b for a, b in zip(point.throughput, factors, strict=True)),
            p99=tuple(a / b for a, b in zip(point.p99, factors, strict=True)),
        )
        for point in even
    ]
    # A weight for each round can make another of two nearly equal sizes the best: 8 or 16, and 8 is smaller.
    assert standing(recommend(slowed, cores=2))[8] == standing(recommend(even, cores=2))[8] == "yes"
    assert recommend(slowed, cores=2).size == recommend(even, cores=2).size


rates, times = st.just(0.0) | st.floats(0.1, 1e5), st.just(0.0) | st.floats(1e-6, 600)


@given(
    st.lists(
        st.tuples(rates, rates, times, times, st.floats(0, 1)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 128),
)
def test_whatever_was_measured_there_is_one_answer(
    measured: list[tuple[float, float, float, float, float]], cores: int
) -> None:
    made = [
        SizePoint(2**number, (a, b), (c, d), c, failed)
        for number, (a, b, c, d, failed) in enumerate(measured)
    ]
    advice = recommend(made, cores=cores)
    assert advice.size in {None, *(point.size for point in made)}
    assert advice.leaning in {point.size for point in made}
    assert advice.size in {None, advice.leaning}
    assert advice.sentence
    assert str(2 * cores + 1) in advice.formula
