"""The pool benchmark's pure parts: the load, the model, the recommendation, the user's own workloads."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import selectors
import statistics
import sys
import types
from collections.abc import Coroutine
from pathlib import Path
from random import Random
from typing import Any, TypeVar, cast

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="needs the extra bench")
pytest.importorskip("hdrh", reason="needs the extra bench")

from bench.pool.errors import BadOption
from bench.pool.histogram import Histogram
from bench.pool.load import Load, Window, arrivals, closed_loop, open_loop
from bench.pool.model import fit, relative_interval, usl
from bench.pool.options import Options, parse_sizes
from bench.pool.recommend import Advice, SizePoint, formula_size, recommend
from bench.pool.sampler import Sample, summarise
from bench.pool.sweep import plan
from bench.pool.timedpool import TimedPool
from bench.pool.userwork import find_workload, parse_script
from dbop_raw import EngineOverloaded, operation
from dbop_raw.driver.connection import Connection

T = TypeVar("T")

# --- time that passes only when all are waiting, so that nothing here sleeps


class _Selector(selectors.DefaultSelector):
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits for ever"
        self.loop.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


class OneByOne:
    """A server that serves one request at a time, 1 ms each, and stands still for a second at `stall`."""

    def __init__(self, stall: float) -> None:
        self._lock = asyncio.Lock()
        self._stall = stall

    async def __call__(self) -> None:
        async with self._lock:
            stalled = asyncio.get_running_loop().time() >= self._stall
            await asyncio.sleep(1.0 if stalled else 0.001)
            if stalled:
                self._stall = math.inf


# --- the load


def test_arrivals_have_the_right_mean_and_come_by_chance() -> None:
    moments = list(itertools.islice(arrivals(50.0, Random(1), 3.0), 20_000))
    gaps = [later - earlier for earlier, later in itertools.pairwise([3.0, *moments])]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.03)
    # Of an exponential distribution the standard deviation is the mean.
    assert statistics.pstdev(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert min(gaps) >= 0


def test_an_open_loop_sees_all_that_a_stall_keeps_waiting() -> None:
    async def measure() -> Load:
        return await open_loop(OneByOne(5.0), Window(0.0, 10.0), rate=100.0, rng=Random(1))

    load = run(measure())
    late = sum(latency > 0.5 for latency in load.latencies)
    assert 30 <= late <= 70
    assert max(load.latencies) >= 0.95


def test_a_closed_loop_of_one_sees_the_same_stall_once() -> None:
    async def measure() -> Load:
        return await closed_loop(OneByOne(5.0), Window(0.0, 10.0), clients=1)

    load = run(measure())
    assert sum(latency > 0.5 for latency in load.latencies) == 1


def test_latency_counts_from_the_intended_start_when_the_client_itself_was_late() -> None:
    async def measure() -> Load:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        frozen = False

        async def send() -> None:
            nonlocal frozen
            if not frozen and loop.now >= 1.0:
                # The client's own loop stands still: nothing can be sent meanwhile.
                frozen = True
                loop.now += 0.5

        return await open_loop(send, Window(0.0, 2.0), rate=200.0, rng=Random(2))

    load = run(measure())
    late = [latency for latency in load.latencies if latency > 0.1]
    assert 50 <= len(late) <= 120
    assert max(late) <= 0.51


def test_only_what_starts_in_the_window_counts_and_only_what_ends_in_it_is_throughput() -> None:
    async def measure() -> Load:
        return await closed_loop(lambda: asyncio.sleep(0.3), Window(1.0, 2.0), clients=1)

    load = run(measure())
    # Starts at 0, 0.3, … 1.8; those from 1.2 on count, and the last of them ends after the window.
    assert len(load.latencies) == 3
    assert load.completed == 3
    assert load.latencies[0] == pytest.approx(0.3)


def test_failures_sheds_and_what_never_ends_are_counted_apart() -> None:
    turns = itertools.count()

    async def send() -> None:
        turn = next(turns) % 4
        await asyncio.sleep(0.01)
        if turn == 1:
            raise EngineOverloaded(waiting=1, max_waiting=0, max_size=1)
        if turn == 2:
            raise TimeoutError
        if turn == 3:
            await asyncio.sleep(1000)

    async def measure() -> Load:
        return await open_loop(send, Window(0.0, 4.0), rate=100.0, rng=Random(3), drain=1.0)

    load = run(measure())
    count = len(load.latencies)
    assert 80 <= count <= 120
    assert load.shed == pytest.approx(count, abs=1)
    assert load.unfinished == pytest.approx(count, abs=1)
    assert load.errors == {"TimeoutError": pytest.approx(count, abs=1)}
    assert load.failed == load.shed + load.unfinished + load.errors["TimeoutError"]


def test_callers_that_are_shed_at_once_leave_the_others_their_turn() -> None:
    async def measure() -> Load:
        busy = False

        async def send() -> None:
            nonlocal busy
            if busy:
                raise EngineOverloaded(waiting=0, max_waiting=0, max_size=1)
            busy = True
            await asyncio.sleep(0.1)
            busy = False

        return await closed_loop(send, Window(0.0, 1.0), clients=5)

    load = run(measure())
    assert len(load.latencies) >= 8
    assert load.shed <= 5 * 100


@given(st.lists(st.floats(1e-6, 500), min_size=1, max_size=200))
def test_a_histogram_keeps_three_digits(values: list[float]) -> None:
    spread = Histogram(values).spread()
    assert spread.max == max(values)
    assert spread.p50 <= spread.p95 <= spread.p99 <= spread.p999 <= spread.max
    nearest = sorted(values)[max(0, math.ceil(len(values) * 0.5) - 1)]
    assert spread.p50 == pytest.approx(nearest, rel=0.002, abs=2e-6)


def test_histograms_add_up() -> None:
    whole = Histogram.of_all([Histogram([0.001] * 3), Histogram([0.1])])
    assert len(whole) == 4
    assert whole.spread().max == 0.1
    assert Histogram().spread().p99 == 0.0


class OnePlacePool:
    """What a `TimedPool` asks of an asyncpg pool, with one connection; giving it back takes 0.1 s."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    def get_max_size(self) -> int:
        return 1

    async def acquire(self) -> object:
        await self._lock.acquire()
        return object()

    async def release(self, conn: object, **options: object) -> None:
        _ = conn, options
        await asyncio.sleep(0.1)
        self._lock.release()


def test_waits_holds_and_the_mean_in_use_are_what_happened() -> None:
    async def measure() -> TimedPool:
        pool = TimedPool(cast("asyncpg.Pool", OnePlacePool()))
        pool.record(0.0, 10.0)

        async def caller() -> None:
            conn = await pool.acquire()
            await asyncio.sleep(0.9)
            await pool.release(conn)

        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(caller())
        return pool

    pool = run(measure())
    assert list(pool.waits.seconds) == pytest.approx([0.0, 1.0, 2.0])
    assert pool.waits.queued == 2
    assert (pool.in_use, pool.waiting, pool.waits.given_back) == (0, 0, 3)
    # Whole seconds of one connection, and the two that waited: 1 s and 2 s.
    assert pool.waits.held == pytest.approx(3.0)


def test_who_gives_up_waiting_is_counted() -> None:
    async def measure() -> TimedPool:
        pool = TimedPool(cast("asyncpg.Pool", OnePlacePool()))
        pool.record(0.0, 10.0)
        await pool.acquire()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.acquire(), 1.0)
        assert pool.totals() == pytest.approx((1.0, 1.0))
        return pool

    pool = run(measure())
    assert pool.waits.given_up == 1
    assert (pool.in_use, pool.waiting) == (1, 0)


def test_samples_of_the_server_are_averaged_and_the_most_frequent_comes_first() -> None:
    looks = [
        Sample(0.1, 2, 0, 2, 1, (("CPU", 1), ("IO:WalSync", 1))),
        Sample(0.2, 2, 0, 2, 2, (("IO:WalSync", 2),)),
    ]
    found = summarise(looks)
    assert (found.samples, found.active, found.blocked) == (2, 2.0, 1.5)
    assert list(found.events.items()) == [("IO:WalSync", 1.5), ("CPU", 0.5)]
    assert summarise([]).samples == 0


# --- the model

SIZES = (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize(
    ("rate", "sigma", "kappa"), [(1000.0, 0.05, 0.001), (250.0, 0.3, 0.0005), (5000.0, 0.0, 0.01)]
)
def test_the_law_gives_back_what_made_the_data(rate: float, sigma: float, kappa: float) -> None:
    found = fit(SIZES, [usl(size, rate, sigma, kappa) for size in SIZES])
    assert found is not None
    assert found.rate.value == pytest.approx(rate, rel=0.01)
    assert found.sigma.value == pytest.approx(sigma, abs=0.002)
    assert found.kappa.value == pytest.approx(kappa, rel=0.05)
    assert found.explained > 0.999
    assert found.peak is not None
    assert found.peak.value == pytest.approx(math.sqrt((1 - sigma) / kappa), rel=0.05)


def test_its_intervals_hold_the_truth_where_the_data_are_noisy() -> None:
    rng = Random(5)
    sizes = SIZES * 4
    found = fit(sizes, [usl(size, 1000, 0.05, 0.001) * rng.gauss(1, 0.03) for size in sizes])
    assert found is not None
    for estimate, truth in ((found.rate, 1000), (found.sigma, 0.05), (found.kappa, 0.001)):
        assert estimate.low <= truth <= estimate.high
        assert estimate.low <= estimate.value <= estimate.high
    middle = found.throughput(8)
    assert middle.low < usl(8, 1000, 0.05, 0.001) < middle.high


def test_a_line_has_no_peak() -> None:
    found = fit(SIZES, [100.0 * size for size in SIZES])
    assert found is not None
    assert found.peak is None


def test_too_few_sizes_or_a_size_that_did_nothing_are_no_data() -> None:
    assert fit((1, 2, 4), (1.0, 2.0, 3.0)) is None
    assert fit((1, 1, 2, 2), (1.0, 1.0, 2.0, 2.0)) is None
    assert fit(SIZES, (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)) is None


def test_one_value_has_no_spread() -> None:
    assert relative_interval([0.9]).high == math.inf
    narrow = relative_interval([0.9, 0.9, 0.9])
    assert narrow.low == pytest.approx(0.9) == narrow.high


# --- the recommendation

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


def test_one_round_cannot_decide() -> None:
    one = [
        dataclasses.replace(point, throughput=point.throughput[:1], p99=point.p99[:1])
        for point in points(KNEE)
    ]
    advice = recommend(one, cores=2)
    assert advice.size is None
    assert advice.leaning == 8
    assert "one round has no spread" in advice.sentence


def test_a_curve_that_still_rises_asks_for_larger_sizes() -> None:
    advice = recommend(points({1: 100.0, 2: 200.0, 4: 400.0}), cores=2)
    assert advice.size is None
    assert advice.leaning == 4
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


# --- what is asked for


def test_each_round_measures_every_size_of_both_kinds_in_an_order_by_the_seed() -> None:
    options = Options(sizes=(1, 2, 4), rounds=3, seed=7)
    rounds = plan(options)
    assert [len(cells) for cells in rounds] == [6, 6, 6]
    assert all(set(cells) == set(rounds[0]) for cells in rounds)
    assert rounds[0] != rounds[1]
    assert plan(options) == rounds
    assert plan(dataclasses.replace(options, seed=8)) != rounds


@pytest.mark.parametrize("text", ["", "0", "1,1", "a", "1,,2", "2000", "-1"])
def test_sizes_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(BadOption, match="--sizes"):
        parse_sizes(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clients": 0},
        {"rounds": 0},
        {"seconds": 0.0},
        {"seconds": math.nan},
        {"warmup": -1.0},
        {"rate": 0.0},
        {"max_waiting": -1},
        {"cores": 0},
        {"burst": 0},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        Options(**wrong)


def test_a_script_takes_pgbench_variables() -> None:
    script = parse_script(
        "\\set id random(1, 5)\n\\set n random(-3, -3)\nSELECT :n::int, :id, ':id'::text;\n"
    )
    assert script.variables == (("id", 1, 5), ("n", -3, -3))
    values = script.draw(Random(1))
    assert 1 <= values["id"] <= 5
    assert script.literal({"id": 2, "n": -3}).startswith("SELECT (-3)::int, 2")
    text, used = script.prepared()
    assert used == ("id", "n")
    assert text.startswith("SELECT $2::bigint::int, $1::bigint")


def test_a_variable_that_is_not_used_is_no_parameter() -> None:
    text, used = parse_script("\\set a random(1, 2)\n\\set b random(1, 2)\nSELECT :b").prepared()
    assert (text, used) == ("SELECT $1::bigint", ("b",))


@pytest.mark.parametrize(
    "text", ["", "-- nothing\n;", "\\sleep 1\nSELECT 1", "\\set a random(2, 1)\nSELECT 1"]
)
def test_a_script_that_cannot_be_run_is_refused(text: str) -> None:
    with pytest.raises(BadOption):
        parse_script(text)


@operation
async def ping(conn: Connection) -> object:
    return await conn.fetchval("SELECT 1")


@operation
async def add(conn: Connection, one: int, other: int) -> object:
    return await conn.fetchval("SELECT $1 + $2", one, other)


async def plain(conn: Connection) -> object:
    return await conn.fetchval("SELECT 1")


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("dbop_raw_own_workload")
    vars(module).update(
        ping=ping,
        made=ping(),
        plain=plain,
        add=add,
        drawn=lambda rng: add(rng.random(), 1),
        number=5,
        broken=object,
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


@pytest.mark.parametrize("name", ["ping", "made", "plain", "drawn"])
def test_an_operation_of_ones_own_is_a_workload(own_module: str, name: str) -> None:
    request = find_workload(f"{own_module}:{name}").make(Random(1))
    assert request.transaction
    assert callable(request.operation)


@pytest.mark.parametrize("name", ["add", "number", "missing"])
def test_what_is_no_operation_is_refused(own_module: str, name: str) -> None:
    with pytest.raises(BadOption, match=name):
        find_workload(f"{own_module}:{name}")


def test_what_makes_no_operation_is_refused(own_module: str) -> None:
    with pytest.raises(BadOption, match="not an operation"):
        find_workload(f"{own_module}:broken").make(Random(1))


def test_a_workload_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("nonsense", str(tmp_path / "missing.sql"), "no_such_module_here:name", ":", "x:"):
        with pytest.raises(BadOption, match="--workload"):
            find_workload(name)
