"""Everything in any order, against a model: hypothesis chooses what to run and break, on a real server.

The model is `Books`: each row is surely in, surely out, or unknown after a CommitUnknown or a cancellation;
it is compared with the table after each step.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dbop_raw import CommitTokens, CommitUnknown, Engine, RetryPolicy
from dbop_raw.testing import Fault, FaultProxy, Message, Server
from tests.support.settings import with_bounds
from tests.support.soak.checker import TABLE, Books
from tests.support.soak.nemesis import LINE, note_complaints, until
from tests.support.soak.workload import JOBS, How

T = TypeVar("T")

RETRY = RetryPolicy(attempts=3, first_delay=0.001, max_delay=0.01)
DEADLINE = 0.8
"""Seconds for each call."""
OTHERS = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
SLACK = 0.3
"""Seconds that a call may take beyond it."""

hows = st.builds(
    How,
    retry=st.sampled_from([None, RETRY]),
    resolve=st.booleans(),
    deadline=st.just(DEADLINE),
    timeout=st.sampled_from([None, 0.3]),
)
jobs = st.sampled_from(sorted(JOBS))
line_faults = st.tuples(
    st.sampled_from(LINE), st.sampled_from(["before", "after"]), st.integers(min_value=0, max_value=60)
)


class World(RuleBasedStateMachine):
    """An engine, a proxy that can fail, a table, and the books."""

    server: Server
    dsn: str
    told: Callable[[Books], None]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.books = Books()
        self.armed = False
        self.exits = contextlib.AsyncExitStack()
        self.complaints: list[str] = []
        self.chances = random.Random(0)

    def do(self, what: Awaitable[T]) -> T:
        """Run it in the machine's own event loop."""

        async def main() -> T:
            return await what

        return self.runner.run(main())

    @initialize(tokens=st.booleans())
    def open(self, *, tokens: bool) -> None:
        self.do(self._open(tokens=tokens))

    async def _open(self, *, tokens: bool) -> None:
        note_complaints(self.complaints)
        self.outside = await asyncpg.connect(self.dsn)
        await self.outside.execute("TRUNCATE t")
        self.proxy = await self.exits.enter_async_context(FaultProxy(self.server.host, self.server.port))
        self.engine = await self.exits.enter_async_context(
            Engine.open(
                f"{self.proxy.dsn(self.dsn)}?sslmode=disable",
                min_size=0,
                max_size=3,
                acquire_timeout=0.5,
                commit_tokens=CommitTokens() if tokens else None,
            )
        )
        # An ingest has no deadline of its own, and a COMMIT whose line hangs is to be looked up in time.
        with_bounds(self.engine, answer=0.5)

    # --- what is run

    @rule(job=jobs, how=hows)
    def run(self, job: str, how: How) -> None:
        self.do(self._run(job, how))

    @rule(names=st.lists(jobs, min_size=2, max_size=4), how=hows)
    def run_together(self, names: list[str], how: How) -> None:
        async def together() -> None:
            await asyncio.gather(*(self._run(name, how) for name in names))

        self.do(together())

    @rule(job=jobs, how=hows, patience=st.floats(min_value=0, max_value=0.03))
    def run_and_cancel(self, job: str, how: How, patience: float) -> None:
        async def cancelled() -> None:
            with anyio.move_on_after(patience):
                await self._run(job, how)

        self.do(cancelled())

    @rule(job=jobs, how=hows, patience=st.floats(min_value=0, max_value=0.03), twice=st.booleans())
    def run_and_cancel_the_task(self, job: str, how: How, patience: float, *, twice: bool) -> None:
        async def cancelled() -> None:
            task = asyncio.ensure_future(self._run(job, how))
            for delay in (patience, 0.0005)[: 1 + twice]:
                await asyncio.wait({task}, timeout=delay)
                task.cancel()
            await asyncio.wait({task}, timeout=10)
            if not task.cancelled():
                task.result()

        self.do(cancelled())

    async def _run(self, job: str, how: How) -> None:
        expected_fault = self.armed
        try:
            async with asyncio.timeout(10):  # of no job: it hangs for ever
                await JOBS[job](self.engine, self.books, how, self.chances)
        except CommitUnknown:
            assert expected_fault, "CommitUnknown out of the blue"
            # A hang may leave no time to look; a lost line does.
            assert not (how.resolve and self.fault == "line"), f"{job}: CommitUnknown with resolve_commit"
        except Exception:  # noqa: BLE001
            # Whatever it is, the books say that nothing was done, and the table is asked.
            assert expected_fault, "an error out of the blue"

    # --- what goes wrong

    fault = ""

    @rule(fault=line_faults)
    def break_the_line(self, fault: tuple[Any, Any, int]) -> None:
        action, side, left = fault

        def soon(_: Message) -> bool:
            nonlocal left
            left -= 1
            return left < 0

        self.do(self._heal())
        self.proxy.inject(Fault(action, soon, side))
        self.armed = True
        self.fault = "hang" if action == "hang" else "line"

    @rule(action=st.sampled_from(LINE))
    def break_all_lines(self, action: Any) -> None:
        async def drop() -> None:
            self.proxy.drop_all(action)

        self.do(drop())
        self.armed = True
        self.fault = "hang" if action == "hang" else "line"

    @rule()
    def terminate_the_backends(self) -> None:
        self.do(self.outside.execute(f"SELECT pg_terminate_backend(pid) {OTHERS}"))
        self.armed = True
        self.fault = self.fault or "line"

    @rule(job=jobs, how=hows, delay=st.floats(min_value=0, max_value=0.02))
    def terminate_in_the_middle(self, job: str, how: How, delay: float) -> None:
        async def both() -> None:
            task = asyncio.ensure_future(self._run(job, how))
            await anyio.sleep(delay)
            await self.outside.execute(f"SELECT pg_terminate_backend(pid) {OTHERS}")
            await task

        self.armed = True
        self.fault = self.fault or "line"
        self.do(both())

    @precondition(lambda self: self.armed)
    @rule()
    def heal(self) -> None:
        self.do(self._heal())
        assert self.do(self.engine.run(lambda conn: conn.fetchval("SELECT 1"), retry=RETRY)) == 1

    async def _heal(self) -> None:
        self.proxy.heal()
        self.armed, self.fault = False, ""

    # --- what must hold

    @invariant()
    def nothing_is_held_between_calls(self) -> None:
        if hasattr(self, "engine"):
            stats = self.engine.stats()
            assert (stats.in_use, stats.waiting) == (0, 0)

    @invariant()
    def the_table_is_what_the_books_say(self) -> None:
        if hasattr(self, "engine"):
            audit = self.do(self.books.audit(self.outside))
            assert audit.clean, audit
            assert self.books.surprises + self.complaints == []
            assert self.books.overrun <= SLACK

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.do(self._close())
        self.runner.close()
        self.told(self.books)

    async def _close(self) -> None:
        self.proxy.heal()
        # What was held back has arrived by now, and changed nothing.
        assert await until(lambda: self.engine.stats().in_use == 0)
        await self.exits.aclose()
        others = f"SELECT count(*) {OTHERS}"
        async with asyncio.timeout(5):
            while await self.outside.fetchval(others):  # noqa: ASYNC110 - the server has no event for it
                await anyio.sleep(0.005)
        audit = await self.books.audit(self.outside, whole_table=True)
        await self.outside.close()
        assert audit.clean, audit
        mine = asyncio.current_task()
        assert await until(lambda: asyncio.all_tasks() <= {mine}), "tasks are left"


@pytest.mark.timeout(3600)
def test_the_table_is_what_the_answers_said_whatever_happens_in_whatever_order(
    postgres_server: Server, postgres_dsn: str, scale: float
) -> None:
    async def prepare() -> None:
        conn = await asyncpg.connect(postgres_dsn)
        await conn.execute(TABLE)
        await CommitTokens().install(conn)
        await conn.close()

    asyncio.run(prepare())
    calls = rows = 0

    def told(books: Books) -> None:
        nonlocal calls, rows
        calls += books.calls
        rows += len(books.done)

    world = type(
        "World", (World,), {"server": postgres_server, "dsn": postgres_dsn, "told": staticmethod(told)}
    )
    run_state_machine_as_test(
        world,
        settings=settings(
            max_examples=round(16 * scale),
            stateful_step_count=20,
            deadline=None,
            # An example takes a second or more: only a long run has the time to make one smaller.
            phases=[Phase.explicit, Phase.reuse, Phase.generate, *([Phase.shrink] if scale > 1 else [])],
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{calls} calls, {rows} rows acknowledged")  # noqa: T201
    assert rows > 0
