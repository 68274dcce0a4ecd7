"""`batch`: one transaction, many items, bad ones set aside.

Here the batch is driven. The chooser (`spans.py`) says which span is next; a writer (`writers/`) writes it
behind a savepoint; where that fails, `judging.py` says what it means, and what it says is done here: undo,
wait, set aside, raise.

The first span has no savepoint of its own where nothing was done since BEGIN: where it fails, ROLLBACK and
BEGIN undo it, in the message that goes anyway. So a clean batch of one span makes no subtransaction, and
takes one transaction id instead of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import anyio

from dbop_raw.batching.costs import CostModel
from dbop_raw.batching.judging import (
    FOREIGN_KEY_VIOLATION,
    ConstraintChecks,
    Decision,
    Judgement,
    by_reference,
    choose_constraint_checks,
    depends_on_others,
    judge,
    may_be_innocent,
    too_many,
    violates,
)
from dbop_raw.batching.layout import Layout, group_by
from dbop_raw.batching.references import ForeignKey, ForeignKeys, parents_first
from dbop_raw.batching.result import BatchResult, Failed
from dbop_raw.batching.spans import Spans, Step
from dbop_raw.batching.writers.protocol import WriteFailed, Writer
from dbop_raw.batching.writers.rows import by_place
from dbop_raw.driver import sql
from dbop_raw.events import BatchFinished, ItemFailed
from dbop_raw.failure.errors import (
    GroupFailed,
    PolicyError,
    RetriesExhausted,
    SkipLimitExceeded,
)
from dbop_raw.failure.policy import Attempts, RetryPolicy
from dbop_raw.failure.sqlstate import Verdict
from dbop_raw.pipeline.operation import Operation
from dbop_raw.pipeline.retry import check_policy, delay_before_retry
from dbop_raw.session.frame import Frame
from dbop_raw.session.scope import Scope

__all__ = ["Batch", "batch"]

Item = TypeVar("Item")
R = TypeVar("R")

_ONCE = RetryPolicy(attempts=1)
# So many items are alone with an error that may be the statement's, before it is believed to be.
_MOST_DOUBTS = 3
# So many spans are tried to find who violates a deferred constraint that looks at several rows at once.
_MOST_TRIALS = 400
# Items are tried again forwards and backwards, until neither helped.
_BOTH = 2


class _Violated(WriteFailed):
    """A span could be written, but then a deferred constraint was violated."""


class _TooManyTrials(Exception):
    """Who violates a constraint was not found within the number of trials."""


def _never(_: object) -> bool:
    return False


def _by_reference(failed: Failed[Item]) -> bool:
    return failed.verdict.sqlstate == FOREIGN_KEY_VIOLATION


def _by_reference_or_innocent(failed: Failed[Item]) -> bool:
    return _by_reference(failed) or may_be_innocent(failed)


class Batch(Generic[Item, R]):
    """A writer with its options: call it with items to get an operation.

    What one run measured serves the next (`CostModel`), so keep it and use it again.
    """

    def __init__(
        self,
        writer: Writer[Item, R],
        policy: RetryPolicy | None,
        skip_limit: int | None,
        together: Callable[[Item], Hashable] | None,
    ) -> None:
        self._writer = writer
        self._policy = policy
        self._skip_limit = skip_limit
        self._together = together
        self._costs = CostModel()
        self._foreign_keys = ForeignKeys()
        self._name = writer.name

    def __repr__(self) -> str:
        """As it is written."""
        return f"batch({self._name})"

    @property
    def writer(self) -> Writer[Item, R]:
        """What writes the items."""
        return self._writer

    def __call__(self, items: Sequence[Item]) -> Operation[BatchResult[Item, R]]:
        """Make the operation that writes `items`.

        Args:
            items: A sequence, since a batch may read them more than once. They must not change meanwhile.

        Raises:
            TypeError: They are no sequence, or one str or bytes.
        """
        if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
            raise TypeError(
                f"a batch takes a sequence of items, not a {type(items).__name__}: use list(…), or ingest() "
                "for a stream"
            )
        if not isinstance(items, (list, tuple)):
            # Spans of it are cut out, and not every sequence can do that (a deque can't).
            items = list(items)

        async def step(scope: Scope, frame: Frame) -> BatchResult[Item, R]:
            run = _Run(
                self._writer,
                items,
                scope,
                policy=self._policy,
                skip_limit=self._skip_limit,
                together=self._together,
                costs=self._costs,
                foreign_keys=self._foreign_keys,
            )
            # Whatever follows the batch, more follows each of its spans.
            with scope.running(frame if frame.more_follows else frame._replace(more_follows=True)):
                return await run.run(more_follows=frame.more_follows)

        return Operation(step, self._name, self._policy, f"{self!r}(<{len(items)} items>)")


def batch(
    writer: Writer[Item, R],
    *,
    retry: RetryPolicy | None = None,
    skip_limit: int | None = None,
    together: Callable[[Item], Hashable] | None = None,
) -> Batch[Item, R]:
    """Write many items in one atomic transaction.

    Each is written exactly once or is in `failed` exactly once, whatever the mix of errors. The result is
    data: look at `failed`.

    A permanent failure costs its own item only, also where the client finds it (a wrong Python type). An
    error that every item would share (class 42, disk full) is raised at once. Deferred constraints are
    checked at the end of the batch and blamed on their item.

    Args:
        writer: `each(make_op)`, `execute_many(sql)`, `copy_into(table, columns=…)` or `copy_text(table,
            columns=…)`.
        retry: What a savepoint can repair is tried again there under this policy, for the item it concerns;
            an item that outlasts its tries is in `failed`. What needs a new transaction or connection leaves
            the batch, and the run around it starts the whole again, under the same policy if it has none of
            its own. None: nothing is tried again.
        skip_limit: How many items may fail; one more raises `SkipLimitExceeded`, and nothing is written.
            None: any number.
        together: Gives an item's key: items with an equal key stand or fall together, such as the lines of a
            journal that has to balance. The item that was refused has its own error, its companions
            `GroupFailed`; each counts for `skip_limit`. An item whose key can't be told, or hashed, fails by
            itself. Groups are written in the order of their first items. None: each item is on its own.

    Returns:
        Call it with a sequence of items to get an operation, whose result is a `BatchResult`.

    Raises:
        PolicyError: `writer` is none, or an option is not allowed.
    """
    for needed in ("write", "write_rows", "name", "per_item", "columns"):
        if not hasattr(writer, needed):
            raise PolicyError(
                f"batch() got an object of type {type(writer).__name__}: give a writer: each(…), "
                "execute_many(…), copy_into(…) or copy_text(…)"
            )
    check_policy(retry)
    if skip_limit is not None and (
        isinstance(skip_limit, bool) or not isinstance(skip_limit, int) or skip_limit < 0
    ):
        raise PolicyError(
            f"skip_limit={skip_limit!r} is not allowed: give a whole number of at least 0, or None"
        )
    if together is not None and not callable(together):
        raise PolicyError(
            f"together={together!r} is not allowed: give a function that makes an item's key, such as "
            "lambda line: line[1], or None"
        )
    return Batch(writer, retry, skip_limit, together)


class _Run(Generic[Item, R]):
    """One run of a batch in one transaction: mutable, used once."""

    def __init__(
        self,
        writer: Writer[Item, R],
        items: Sequence[Item],
        scope: Scope,
        *,
        policy: RetryPolicy | None,
        skip_limit: int | None,
        together: Callable[[Item], Hashable] | None,
        costs: CostModel,
        foreign_keys: ForeignKeys,
    ) -> None:
        self._writer = writer
        self._items = items
        self._scope = scope
        self._policy = policy or _ONCE
        self._skip_limit = skip_limit
        self._costs = costs
        self._foreign_keys = foreign_keys
        self._key = together
        self._everything = Layout(range(len(items)))
        # The group of each item, where items stand or fall together.
        self._group_of: dict[int, Sequence[int]] = {}
        self._spans = Spans(0, self._costs)
        self._failed: dict[int, Failed[Item]] = {}
        self._results: list[R | None] = [None] * len(items) if self._writer.per_item else []
        # How many items were neither stored nor refused: a trigger dropped them.
        self._dropped = 0
        # Has the driver been made to forget what it remembered of the schema: because it was sure to be stale
        # (True), or because it may have been (False)? Once for each.
        self._refreshed: set[bool] = set()
        # How often a unit of the span search at hand was tried, for those that failed for a passing reason.
        self._attempts: dict[int, Attempts] = {}
        self._retries_before = scope.retries
        # Is the statement known to be right? Not before an item got through, or was refused for its own sake.
        self._proven = False
        # The errors that are the statement's fault, if it is wrong.
        self._doubts: list[Exception] = []
        # May an item that is set aside at present still be written in the end?
        self._passing: Callable[[Failed[Item]], bool] = _never
        # Are deferred constraints checked at the end of each span? And how many of those may still be tried?
        self._checked = False
        self._trials_left = math.inf
        # Who was set aside by such a check: it names nobody, so others may be at fault.
        self._by_check: set[int] = set()
        # Who was named for another row of the same span, which was not known to be good then.
        self._named_early: set[int] = set()

    async def run(self, *, more_follows: bool) -> BatchResult[Item, R]:
        """Write all of it, inside the transaction that the scope is in.

        Args:
            more_follows: Will more than COMMIT follow in that transaction?
        """
        if not self._scope.transactional:
            raise PolicyError(
                "a batch needs a transaction: leave out autocommit=True, or call it inside "
                "engine.transaction()"
            )
        if self._items:
            without_key = self._group()
            await self._write_all(more_follows=more_follows)
            self._failed |= without_key
            self._check_limit()
            if self._doubts and not self._proven:
                raise self._doubts[0]
            self._costs.learn_batch(len(self._items), len(self._failed))
        return self._result()

    def _group(self) -> dict[int, Failed[Item]]:
        """Group the items that stand or fall together; return those whose key can't be told."""
        if self._key is None:
            return {}
        groups, without_key = group_by(self._items, self._key)
        self._everything = Layout.of_groups(groups)
        self._group_of = {index: group for group in groups for index in group}
        return {index: self._failure(index, error) for index, error in without_key.items()}

    # --- all items, and when constraints are checked

    async def _write_all(self, *, more_follows: bool) -> None:
        scope, control = self._scope, self._scope.control
        checks = choose_constraint_checks(
            more_follows=more_follows, constraints_immediate=scope.constraints_immediate
        )
        scope.check_at_commit = checks is ConstraintChecks.AT_COMMIT
        if checks is ConstraintChecks.AT_COMMIT:
            await self._write_once()
            return
        control.savepoint()
        try:
            if checks is ConstraintChecks.AT_END:
                await self._write_once()
                violated = await self._violation()
                if violated is not None:
                    refused = self._start_again()
                    references = self._scope.verdict(violated).sqlstate == FOREIGN_KEY_VIOLATION
                    await self._blame(refused, references=references)
            else:
                await self._blame(None, references=True)
        except BaseException:
            control.abandon()
            raise
        control.release()

    def _start_again(self) -> dict[int, Failed[Item]]:
        """Undo what was done since the newest savepoint; return who was set aside."""
        self._scope.control.rollback_to()
        failed, self._failed = self._failed, {}
        self._dropped = 0
        self._by_check.clear()
        return failed

    async def _write_once(self) -> None:
        """Write; deferred constraints are checked by somebody else."""
        self._passing = _by_reference
        await self._write_spans(self._everything)
        await self._try_again()
        self._passing = _never
        self._check_limit()

    async def _violation(self) -> Exception | None:
        """Check deferred constraints now, without making them immediate for what follows."""
        scope = self._scope
        scope.control.savepoint()
        scope.control.push(sql.CHECK_DEFERRED)
        try:
            await scope.flush()
        except Exception as exc:
            if not violates(scope.verdict(exc)):
                raise
            return exc
        finally:
            # Undone either way: what follows in this transaction may defer its own again.
            scope.control.abandon()
        return None

    async def _check_before(self) -> None:
        """Raise what was violated before this batch: no item is to blame."""
        violated = await self._violation()
        if violated is not None:
            raise violated

    async def _blame(self, refused: Mapping[int, Failed[Item]] | None, *, references: bool) -> None:
        """Find who violates a deferred constraint, and write the others.

        Args:
            refused: Who is refused whatever is checked when; None: not known yet.
            references: Is it most likely a foreign key? Then each row can be checked by itself, which costs
                least, and shows it if it was not.
        """
        if self._key is not None:
            await self._search(refused, math.inf)
            return
        if references and await self._write_with_constraints_immediate(final=False):
            return
        if not await self._search(refused, _MOST_TRIALS):
            await self._write_with_constraints_immediate(final=True)

    async def _write_with_constraints_immediate(self, *, final: bool) -> bool:
        """Write while each statement checks all constraints.

        Args:
            final: Keep what comes of it.

        Returns:
            True; False where that may have refused innocents, and nothing was kept.
        """
        control = self._scope.control
        control.savepoint()
        try:
            control.push(sql.CHECK_DEFERRED)
            # By itself: what was violated before this batch is raised here, and no item is blamed for it.
            await self._scope.flush()
            self._passing = _by_reference if final else _by_reference_or_innocent
            await self._write_spans(self._everything)
            await self._try_again(all_references=True)
            self._passing = _never
            kept = final or not any(map(may_be_innocent, self._failed.values()))
            if kept:
                self._check_limit()
            else:
                self._start_again()
        except BaseException:
            control.abandon()
            raise
        control.release()
        return kept

    async def _search(self, refused: Mapping[int, Failed[Item]] | None, most_trials: float) -> bool:
        """Write, and check deferred constraints at the end of each span: some look at several rows at once.

        A span that violates one is halved, as for any error that names nobody. Where that parts rows that
        need each other, they are refused for now, and tried again, cut otherwise, as long as that helps.

        Args:
            refused: Who is refused whatever is checked when; None: not known yet.
            most_trials: So many spans are tried at most.

        Returns:
            True; False where they were not enough, and nothing was kept.
        """
        control = self._scope.control
        control.savepoint()
        try:
            await self._check_before()
            if refused is None:
                self._passing = _by_reference
                await self._write_spans(self._everything)
                await self._try_again()
                refused = self._start_again()
            # Who was refused for another one may be written if that one falls.
            refused = {index: one for index, one in refused.items() if not depends_on_others(one)}
            self._failed = dict(refused)
            self._passing = _by_reference_or_innocent
            self._checked, self._trials_left = True, most_trials
            await self._write_spans(self._without(refused))
            await self._try_again()
        except _TooManyTrials:
            self._start_again()
            control.release()
            return False
        except BaseException:
            control.abandon()
            raise
        finally:
            self._checked, self._passing = False, _never
        control.release()
        self._check_limit()
        return True

    def _without(self, left_out: Collection[int]) -> Layout:
        """Return everything but some items; of a group all are left out, or none."""
        if not left_out:
            return self._everything
        if self._key is None:
            return Layout([index for index in self._everything.indexes if index not in left_out])
        return self._groups_of(index for index in self._everything.indexes if index not in left_out)

    def _groups_of(self, indexes: Iterable[int], *, backwards: bool = False) -> Layout:
        """Return the groups of some items, in order or backwards."""
        groups = list({self._group_of[index][0]: self._group_of[index] for index in indexes}.values())
        return Layout.of_groups(reversed(groups) if backwards else groups)

    # --- what was refused for something that comes later

    async def _try_again(self, *, all_references: bool = False) -> None:
        """Try items that were refused for one that was not in, now that others are; as long as that helps.

        Forwards and backwards in turn, since each may be the order that helps; parents first, where it is
        known who is whose.

        Args:
            all_references: Each foreign key may have been checked too early, not only one of a table to
                itself.
        """
        await self._try_named_again()
        backwards, idle = False, 0
        while idle < _BOTH and (waiting := await self._waiting(all_references=all_references)):
            before = len(self._failed)
            for index in waiting:
                del self._failed[index]
            ordered = None if self._checked else await self._parents_first(waiting)
            if ordered is not None:
                for layout in ordered:
                    await self._write_spans(layout)
            elif self._key is not None:
                await self._write_spans(self._groups_of(waiting, backwards=backwards))
            else:
                await self._write_spans(Layout(sorted(waiting, reverse=backwards)))
            # What refused an item in its own turn counts, not what later items have taken from it since.
            self._failed.update({i: failed for i, failed in waiting.items() if i in self._failed})
            helped = len(self._failed) < before
            idle = 0 if helped else idle + (1 if ordered is None else _BOTH)
            backwards = not backwards

    async def _try_named_again(self) -> None:
        """Try items once more that were refused for a row of their span, if earlier ones fell after that.

        COPY names a doubled key by its line before it looks at foreign keys: the first row may fall by those.
        """
        early = sorted(index for index in self._named_early if index in self._failed)
        self._named_early.clear()
        if not early or all(index >= early[-1] or index in early for index in self._failed):
            return
        waiting = {index: self._failed.pop(index) for index in early}
        await self._write_spans(Layout(early))
        self._named_early.clear()
        self._failed.update({i: failed for i, failed in waiting.items() if i in self._failed})

    async def _waiting(self, *, all_references: bool) -> dict[int, Failed[Item]]:
        """Return those that are set aside and may be written after others, by index, in order."""
        failed = self._failed
        found = {i for i in self._by_check if i in failed} if self._checked and self._key is None else set()
        for index, one in by_reference(failed).items():
            if all_references or ((key := await self._reference(one)) is not None and key.to_itself):
                found.update(self._group_of.get(index, (index,)))
        return {index: failed[index] for index in sorted(found)}

    async def _reference(self, failed: Failed[Item]) -> ForeignKey | None:
        # An item's own retry may have given up on it.
        error = failed.error.__cause__ if isinstance(failed.error, RetriesExhausted) else failed.error
        return None if error is None else await self._foreign_keys.of(self._scope, error)

    async def _parents_first(self, waiting: Mapping[int, Failed[Item]]) -> list[Layout] | None:
        """Return the items so that each comes after those it refers to; None where that can't be known."""
        columns = self._writer.columns
        if columns is None or self._key is not None:
            return None
        keys = {await self._reference(one) for one in waiting.values()}
        known = [key for key in keys if key is not None and key.to_itself]
        rows = {index: by_place([failed.item], columns, index)[0] for index, failed in waiting.items()}
        parts = parents_first(rows, columns, known)
        if parts is None:
            return None
        alone = Layout([part[0] for part in parts if len(part) == 1])
        circles = Layout.of_groups(part for part in parts if len(part) > 1)
        return [layout for layout in (alone, circles) if layout.indexes]

    # --- spans

    async def _write_spans(self, layout: Layout) -> None:
        """Write items, in the order of `layout`; the units that can't be written are set aside."""
        whole = isinstance(layout.indexes, range)
        view = self._items if whole else [self._items[index] for index in layout.indexes]
        together = layout.starts is not None
        self._spans = Spans(
            layout.units,
            self._costs,
            per_item=self._writer.per_item,
            rows=not (together or self._checked),
            cut=not self._checked,
        )
        self._attempts.clear()
        while (step := self._spans.next()) is not None:
            if self._checked:
                self._take_trial()
            failed = await self._try(step, view, layout)
            # Judged out here, so that what is raised carries no trace of our own signal.
            if failed is not None:
                fresh = step.way == "write" and failed.stale not in self._refreshed
                if fresh and await self._writer.refresh(self._scope, failed):
                    self._refreshed.add(failed.stale)
                    self._spans.again(None)
                    continue
                if failed.stale:
                    raise failed.error
                place = failed.index
                if together and place is not None:
                    failed = WriteFailed(layout.unit_of(place), failed.error, client=failed.client)
                judgement = judge(step, failed, self._scope.verdict)
                if step.way == "write":
                    judgement = self._settled(step, judgement, failed)
                await self._follow(judgement, failed, place, layout, step.lo)

    def _settled(self, step: Step, judgement: Judgement, failed: WriteFailed) -> Judgement:
        """Settle a doubt, whether the statement or an item's value is wrong, by what other items showed."""
        culprit, named = judgement.culprit, judgement.culprit is not None
        if judgement.decision is not Decision.DOUBT:
            if judgement.decision is Decision.BLAME and named and not failed.client:
                self._proven = True
            return judgement
        if self._writer.per_item and named and culprit != step.lo:
            self._proven = True
        alone = step.hi - step.lo == 1
        if not self._proven and alone:
            self._doubts.append(failed.error)
        if not self._proven and (len(self._doubts) >= _MOST_DOUBTS or len(self._items) == 1):
            return replace(judgement, decision=Decision.RAISE)
        # As long as nothing is proven, the search goes on until an item is alone with its error.
        return replace(judgement, decision=Decision.BLAME, culprit=culprit if self._proven or alone else None)

    async def _try(self, step: Step, view: Sequence[Item], layout: Layout) -> WriteFailed | None:
        """Write one span behind its savepoint, or BEGIN; return why it failed, if it did.

        What closes or undoes the savepoint is left for the next message.
        """
        scope, writer, indexes = self._scope, self._writer, layout.indexes
        control, clock = scope.control, scope.settings.clock
        lo, hi = layout.span(step.lo, step.hi)
        control.savepoint(or_begin=True)
        started = clock()
        try:
            if step.way == "rows":
                tried = await writer.write_rows(scope, view, lo, hi, self._costs.failure_rate)
                self._spans.rows([failure.index for failure in tried.failures], tried.seconds)
                # It was executed, whatever came of it.
                self._proven = True
                self._dropped += tried.dropped
                for failure in tried.failures:
                    self._set_aside(indexes[failure.index], failure.error, scope.verdict(failure.error))
            else:
                written = await writer.write(scope, view, lo, hi)
                seconds = clock() - started
                self._proven = True
                if self._checked:
                    await self._check()
                # Of units that are no items the time would say nothing.
                self._spans.wrote(seconds if layout.starts is None else 0.0)
                self._dropped += written.dropped
                if written.results:
                    for place, result in zip(range(lo, hi), written.results, strict=True):
                        self._results[indexes[place]] = result
        except WriteFailed as exc:
            control.abandon()
            return exc
        except BaseException:
            control.abandon()
            raise
        control.release()
        return None

    def _take_trial(self) -> None:
        """Count a span of a search; raise `_TooManyTrials` when there have been enough."""
        if self._trials_left <= 0:
            raise _TooManyTrials
        self._trials_left -= 1

    async def _check(self) -> None:
        """Raise `_Violated` where what was written so far violates a deferred constraint."""
        violated = await self._violation()
        if violated is not None:
            raise _Violated(None, violated) from violated

    async def _follow(
        self, judgement: Judgement, failed: WriteFailed, place: int | None, layout: Layout, lo: int
    ) -> None:
        """Do what the judgement of a failed span says.

        Args:
            judgement: What the failure means.
            failed: Why the span, from unit `lo` on, could not be written.
            place: The place in `layout` of the item that is named, if one is.
            layout: What is being written.
            lo: The span's first unit.
        """
        decision, culprit, error = judgement.decision, judgement.culprit, failed.error
        if decision is Decision.RAISE:
            raise error
        if decision in (Decision.NO_ROWS_HERE, Decision.NO_ROWS):
            self._spans.rows_failed(possible=decision is Decision.NO_ROWS_HERE)
            return
        if isinstance(error, TimeoutError) and not getattr(error, "by_server", False):
            # A timeout, ours or the driver's, that the server did not keep: find out now, and not for long,
            # whether it still answers.
            await self._scope.repair(error, seconds=self._scope.settings.bounds.grace)
        if (
            decision is Decision.RETRY
            and culprit is not None
            and await self._wait_for(culprit, error, judgement.verdict)
        ):
            self._spans.again(culprit)
            return
        found = self._spans.failed(culprit)
        if found is None:
            return
        named_behind_others = not self._writer.per_item and self._key is None and found > lo
        members = layout.members(found)
        if isinstance(failed, _Violated):
            self._by_check.update(members)
        if len(members) == 1:
            self._set_aside(members[0], error, judgement.verdict)
            if named_behind_others and depends_on_others(self._failed[members[0]]):
                self._named_early.add(members[0])
            return
        named = None if place is None else layout.indexes[place]
        if named is None or named not in members:
            named, error = await self._first_refused(members, failed)
        self._set_group_aside(members, named, error)

    async def _wait_for(self, culprit: int, error: Exception, verdict: Verdict) -> bool:
        """Wait until the item may be tried again; return False when it has used up its attempts."""
        settings = self._scope.settings
        attempts = self._attempts.setdefault(culprit, Attempts(since=settings.clock()))
        attempts.count += 1
        try:
            delay = delay_before_retry(
                settings,
                self._writer.name,
                self._policy,
                attempts,
                error,
                verdict,
                level="savepoint",
                deadline=anyio.current_effective_deadline(),
            )
        except RetriesExhausted:
            return False
        self._scope.retries += 1
        await anyio.sleep(delay)
        return True

    # --- what is set aside

    def _failure(self, index: int, error: Exception, verdict: Verdict | None = None) -> Failed[Item]:
        return Failed(index, self._items[index], error, verdict or self._scope.verdict(error))

    def _set_aside(self, index: int, error: Exception, verdict: Verdict) -> None:
        self._failed[index] = self._failure(index, error, verdict)
        if self._writer.per_item:
            self._results[index] = None
        self._check_limit()

    def _set_group_aside(self, members: Sequence[int], refused: int, error: Exception) -> None:
        """Set a whole group aside: the item that was refused with its own error, its companions with it."""
        own = self._failure(refused, error)
        for index in members:
            failed = own
            if index != refused:
                companion = GroupFailed(index=refused)
                companion.__cause__ = error
                failed = self._failure(index, companion)
            self._failed[index] = failed
            if self._writer.per_item:
                self._results[index] = None
        self._check_limit()

    async def _first_refused(self, members: Sequence[int], failed: WriteFailed) -> tuple[int, Exception]:
        """Find the item for which a group was refused: the last one of the shortest beginning that is.

        What is written for that is undone. Where a check refused the group, no item is at fault, and the
        first one stands for it.
        """
        if isinstance(failed, _Violated):
            return members[0], failed.error
        scope, error = self._scope, failed.error
        view = [self._items[index] for index in members]
        # The first `good` of them can be written, the first `bad` can't.
        good, bad = 0, len(view)
        while bad - good > 1:
            middle = (good + bad) // 2
            scope.control.savepoint()
            try:
                await self._writer.write(scope, view, 0, middle)
            except WriteFailed as exc:
                if not violates(scope.verdict(exc.error)):
                    raise exc.error from exc
                bad, error = middle, exc.error
            else:
                good = middle
            finally:
                scope.control.abandon()
        return members[bad - 1], error

    def _check_limit(self) -> None:
        limit = self._skip_limit
        if limit is None:
            return
        failed = too_many(self._failed, limit, passing=self._passing)
        if failed:
            raise SkipLimitExceeded(limit=limit, failed=failed)

    # --- the end

    def _result(self) -> BatchResult[Item, R]:
        failed = tuple(self._failed[index] for index in sorted(self._failed))
        result: BatchResult[Item, R] = BatchResult(
            total=len(self._items),
            written=len(self._items) - len(failed) - self._dropped,
            failed=failed,
            results=tuple(self._results),
            retries=self._scope.retries - self._retries_before,
        )
        if self._scope.settings.observer is not None:
            self._report(result)
        return result

    def _report(self, result: BatchResult[Item, R]) -> None:
        """Tell the observer.

        At the end, and not when an item was set aside: it may have been written after all.
        """
        name, emit = self._writer.name, self._scope.settings.emit
        for one in result.failed:
            said = one.verdict
            emit(ItemFailed(writer=name, index=one.index, sqlstate=said.sqlstate, condition=said.condition))
        emit(
            BatchFinished(
                writer=name,
                total=result.total,
                written=result.written,
                failed=len(result.failed),
                retries=result.retries,
            )
        )
