"""The chooser: whatever fails, and whatever it is told, each item is accounted for exactly once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbop_raw.batching.costs import CostModel
from dbop_raw.batching.spans import Spans, Step

prices = st.none() | st.floats(1e-7, 1.0)
shares = st.floats(0.0, 1.0)


@st.composite
def cost_models(draw: st.DrawFn) -> CostModel:
    """Whatever earlier batches may have taught."""
    seen = draw(st.floats(0.0, 1e6))
    return CostModel(
        seen=seen,
        bad=seen * draw(shares),
        attempt=draw(prices),
        row=draw(prices),
        row_alone=draw(prices),
        rows_possible=draw(st.booleans()),
        located=draw(shares),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, frozenset[int]]:
    """A total, and which of the items are bad."""
    total = draw(st.integers(0, 400))
    if not total:
        return 0, frozenset()
    few = st.frozensets(st.integers(0, total - 1), max_size=8)
    many = st.sets(st.integers(0, total - 1), max_size=total).map(frozenset)
    runs = st.tuples(st.integers(0, total), st.integers(0, total)).map(lambda r: frozenset(range(*sorted(r))))
    return total, draw(few | many | runs)


@dataclass
class World:
    """A server that the chooser talks to: it knows which items are bad, and keeps account."""

    total: int
    bad: frozenset[int]
    written: set[int] = field(default_factory=set)
    steps: list[Step] = field(default_factory=list)

    def check(self, step: Step, spans: Spans) -> None:
        """A step is a span of items of which none is accounted for."""
        self.steps.append(step)
        assert 0 <= step.lo < step.hi <= self.total
        span = range(step.lo, step.hi)
        assert self.written.isdisjoint(span), "an item would be written twice"
        assert spans.bad.isdisjoint(span), "an item that was set aside would be tried again"
        assert len(self.steps) < 100_000, "no end is in sight"

    def culprits(self, step: Step) -> list[int]:
        return [item for item in range(step.lo, step.hi) if item in self.bad]


def play(world: World, spans: Spans, write: Callable[[Step], None], rows: Callable[[Step], None]) -> None:
    """Follow the chooser to its end, and hold it to its promise."""
    while (step := spans.next()) is not None:
        world.check(step, spans)
        (write if step.way == "write" else rows)(step)
    assert spans.next() is None
    assert world.written | spans.bad == set(range(world.total))
    assert world.written.isdisjoint(spans.bad)
    spans._costs.learn_batch(world.total, len(spans.bad))


def play_plainly(world: World, spans: Spans, *, locate: bool, seconds: float = 0.0) -> None:
    """It fails for its bad items only, tries rows whenever asked, and names the first or nobody."""

    def write(step: Step) -> None:
        found = world.culprits(step)
        if found:
            spans.failed(found[0] if locate else None)
        else:
            world.written.update(range(step.lo, step.hi))
            spans.wrote(seconds)

    def rows(step: Step) -> None:
        found = world.culprits(step)
        world.written.update(set(range(step.lo, step.hi)) - set(found))
        spans.rows(found, seconds)

    play(world, spans, write, rows)


@given(batches(), cost_models(), st.booleans(), st.data())
def test_each_item_is_accounted_for_once_whatever_happens(
    batch: tuple[int, frozenset[int]], costs: CostModel, per_item: bool, data: st.DataObject
) -> None:
    """Located truly, at a wrong place, or not at all; rows possible or not; passing failures; any timing."""
    total, bad = batch
    world = World(total, bad)
    spans = Spans(total, costs, per_item=per_item)
    chance = data.draw(st.randoms(use_true_random=False))
    agains = data.draw(st.integers(0, 30))

    def outside(step: Step) -> int:
        return chance.choice([step.lo - 1, step.hi, -1, total, total + 5, step.hi + 1_000])

    def seconds() -> float:
        return chance.choice([0.0, 1e-9, 1e-5, 1e-3, 0.5, 30.0])

    def write(step: Step) -> None:
        nonlocal agains
        if agains and chance.random() < 0.2:
            agains -= 1
            spans.again(chance.choice([None, outside(step), chance.randrange(step.lo, step.hi)]))
            return
        found = world.culprits(step)
        if not found:
            world.written.update(range(step.lo, step.hi))
            spans.wrote(seconds())
            return
        culprit = chance.choice([found[0], found[0], chance.choice(found), None, outside(step)])
        aside = spans.failed(culprit)
        assert aside is None or aside in found, "a good item was set aside"

    def rows(step: Step) -> None:
        if chance.random() < 0.3:
            spans.rows_failed(possible=chance.random() < 0.7)
            return
        found = world.culprits(step)
        world.written.update(set(range(step.lo, step.hi)) - set(found))
        spans.rows(found, seconds())

    play(world, spans, write, rows)
    assert spans.bad == bad


@given(batches(), cost_models(), st.booleans(), st.randoms(use_true_random=False))
def test_a_batch_ends_even_when_failures_follow_no_rule(
    batch: tuple[int, frozenset[int]], costs: CostModel, per_item: bool, chance: Random
) -> None:
    """Items that fail now and not then (a lock, a deferred check): still each is in one place, once."""
    total, _ = batch
    world = World(total, frozenset())
    spans = Spans(total, costs, per_item=per_item)
    coin, within = chance.random, chance.randrange

    def write(step: Step) -> None:
        if coin() < 0.4:
            spans.failed(within(step.lo, step.hi) if coin() < 0.5 else None)
        else:
            world.written.update(range(step.lo, step.hi))
            spans.wrote(coin())

    def rows(step: Step) -> None:
        found = [item for item in range(step.lo, step.hi) if coin() < 0.3]
        world.written.update(set(range(step.lo, step.hi)) - set(found))
        spans.rows(found, coin())

    play(world, spans, write, rows)


@given(batches(), st.booleans(), st.booleans(), st.booleans())
def test_the_number_of_attempts_is_bounded_by_the_bad_items(
    batch: tuple[int, frozenset[int]], per_item: bool, locate: bool, rows_possible: bool
) -> None:
    """Each bad item costs at most a search by halves; a clean stretch costs next to nothing."""
    total, bad = batch
    world = World(total, bad)
    play_plainly(
        world,
        Spans(total, CostModel(rows_possible=rows_possible), per_item=per_item),
        locate=locate or per_item,
    )
    halvings = math.log2(total) + 1 if total else 0
    each = 4 if locate or per_item else 2 * halvings + 4
    # Once some were bad, spans are shorter: the usual distance between two, or its root where what
    # was done before a failure has to be done again. They are expected no denser than `bad` in 200.
    spans = (
        math.ceil(total / 64) + total * math.sqrt(len(bad) / 400) if per_item else 1 + total * len(bad) / 200
    )
    assert len(world.steps) <= (len(bad) + 1) * each + spans


@given(st.integers(0, 10_000_000), st.booleans())
def test_a_clean_batch_opens_at_most_60_spans(total: int, per_item: bool) -> None:
    """PostgreSQL caches 64 subtransactions a backend, and RELEASE gives none back."""
    spans = Spans(total, CostModel(), per_item=per_item)
    opened = 0
    while spans.next() is not None:
        opened += 1
        spans.wrote()
    assert opened <= 60
    assert not spans.bad


def test_an_empty_batch_needs_no_step() -> None:
    spans = Spans(0, CostModel())
    assert spans.next() is None


@given(st.integers(1, 400), st.data())
def test_an_item_that_the_error_names_is_set_aside_at_once(total: int, data: st.DataObject) -> None:
    """One bad item, named: the whole, what is before it, what is behind it; no search."""
    culprit = data.draw(st.integers(0, total - 1))
    world = World(total, frozenset({culprit}))
    play_plainly(world, Spans(total, CostModel(row_alone=1.0)), locate=True)
    assert len(world.steps) <= 3


def test_a_step_is_told_of_once() -> None:
    spans = Spans(2, CostModel())
    spans.next()
    spans.wrote()
    with pytest.raises(RuntimeError, match="once"):
        spans.wrote()


class TestTheChoiceFollowsWhatWasMeasured:
    @given(st.integers(64, 400), st.data())
    def test_rows_that_are_dear_alone_are_never_chosen(self, total: int, data: st.DataObject) -> None:
        """A distributed server: a row alone costs a hundred times what it costs in a span."""
        bad = data.draw(st.frozensets(st.integers(0, total - 1), max_size=max(1, total // 50)))
        located = data.draw(shares)
        costs = CostModel(
            seen=total, bad=len(bad), attempt=3e-4, row=3e-4, row_alone=3e-4 * 100, located=located
        )
        world = World(total, bad)
        play_plainly(world, Spans(total, costs), locate=data.draw(st.booleans()))
        assert {step.way for step in world.steps} <= {"write"}

    @given(st.integers(64, 400), st.floats(0.1, 1.0), shares)
    def test_rows_that_are_cheap_are_chosen_at_once_where_many_are_bad(
        self, total: int, failure_rate: float, located: float
    ) -> None:
        costs = CostModel(
            seen=1000, bad=1000 * failure_rate, attempt=3e-4, row=3e-6, row_alone=4e-6, located=located
        )
        step = Spans(total, costs).next()
        assert step == Step("rows", 0, total)

    @given(st.integers(2, 400), cost_models())
    def test_rows_are_never_chosen_where_they_are_not_possible(self, total: int, costs: CostModel) -> None:
        costs.rows_possible = False
        world = World(total, frozenset(range(0, total, 3)))
        play_plainly(world, Spans(total, costs), locate=False)
        assert {step.way for step in world.steps} == {"write"}

    def test_that_no_rows_can_be_tried_holds_for_this_batch_only(self) -> None:
        """The next may be on another server, or of other rows."""
        costs = CostModel(seen=1000, bad=500, attempt=1e-3, row=1e-5, row_alone=1e-6)
        spans = Spans(100, costs)
        assert spans.next() == Step("rows", 0, 100)
        spans.rows_failed(possible=False)
        while (step := spans.next()) is not None:
            assert step.way == "write"
            spans.wrote()
        assert Spans(100, costs).next() == Step("rows", 0, 100)

    @given(st.integers(2, 400), cost_models())
    def test_operations_are_never_tried_row_by_row(self, total: int, costs: CostModel) -> None:
        world = World(total, frozenset(range(0, total, 3)))
        play_plainly(world, Spans(total, costs, per_item=True), locate=True)
        assert {step.way for step in world.steps} == {"write"}

    @given(cost_models().filter(lambda m: m.seen > 0 and m.bad == 0), st.integers(1, 400))
    def test_the_whole_is_tried_first_where_no_item_was_bad_so_far(
        self, costs: CostModel, total: int
    ) -> None:
        assert Spans(total, costs).next() == Step("write", 0, total)

    def test_the_first_trial_of_rows_is_short(self) -> None:
        """Nobody knows yet what a row alone costs there: the first trial must not cost a whole batch."""
        costs = CostModel(seen=1000, bad=500, attempt=3e-4, row=3e-6)
        step = Spans(10_000, costs).next()
        assert step is not None
        assert step.way == "rows"
        assert step.hi - step.lo <= 256

    def test_one_trial_that_was_too_dear_is_forgotten_slowly(self) -> None:
        """A price that was measured once, with one-off costs in it, must not stand for ever."""
        costs = CostModel(seen=1000, bad=100, attempt=3e-4, row=3e-6, row_alone=1e-3, located=0.0)
        ways: list[str] = []
        for _ in range(40):
            world = World(400, frozenset(range(0, 400, 10)))
            play_plainly(world, Spans(400, costs), locate=False)
            ways += [step.way for step in world.steps]
            if "rows" in ways:
                break
        assert ways[0] == "write"
        assert "rows" in ways
