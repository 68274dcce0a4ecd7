"""The line is cut, reset or hung before and after every protocol message, one at a time.

A clean run of a scenario through the proxy tells its messages. Then it runs again for each message, action
and side, with that one fault in it, on a pool that has no connection yet: so startup is among them. In the
short mode they are sampled by the seed, around a COMMIT more of them; DBOP_RAW_FAULT_SCALE=40 takes them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import anyio
import asyncpg
import pytest

from dbop_raw import AcquireTimeout, CommitTokens, CommitUnknown, Engine, OperationTimeout, RetryPolicy
from dbop_raw.testing import Fault, FaultProxy, Message, Server

# The long mode takes its time; in the short one each test takes some seconds.
from tests.support.settings import with_bounds
from tests.support.soak.checker import TABLE, Books
from tests.support.soak.nemesis import note_complaints, until
from tests.support.soak.workload import JOBS, How

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(3600)]

Action = Literal["cut", "reset", "hang"]
Side = Literal["before", "after"]
Mode = Literal["raised", "token", "xid"]
"""What becomes of a COMMIT in doubt: it is raised, or looked up by either way."""

SCENARIOS = ("single", "nested", "copied", "each", "many", "ingest")
ACTIONS: tuple[Action, ...] = ("cut", "reset", "hang")
SIDES: tuple[Side, ...] = ("before", "after")
MODES: tuple[Mode, ...] = ("raised", "token", "xid")
RETRY = RetryPolicy(attempts=4, first_delay=0.01, max_delay=0.05)
DEADLINE = 1.6
"""Seconds for a run in which a line hangs."""
TRY = 0.25
"""Seconds for one try, where a scenario has a timeout."""
CONNECT = 0.4
"""Seconds: the engine's acquire_timeout."""
SLACK = 0.3
"""Seconds: how far from its deadline a call may end."""
HANGS_AT_A_TIME, OTHERS_AT_A_TIME = 24, 6


@dataclass(frozen=True, slots=True)
class Spot:
    """One fault: where, what, and what becomes of a COMMIT in doubt."""

    index: int
    action: Action
    side: Side
    mode: Mode


@dataclass(slots=True)
class Outcome:
    """What came of one run."""

    spot: Spot
    books: Books
    hit: Message | None = None
    """The message that the fault met."""
    busy_with: str = ""
    """The SQL that its connection was busy with; empty in startup."""
    last: bool = False
    """Was it the last message of the run, after which nobody could notice?"""
    error: Exception | None = None
    seconds: float = 0.0
    commits: int = 0
    """COMMITs that the client sent."""
    wrong: list[str] = field(default_factory=list)

    def expect(self, *, that: bool, what: str) -> None:
        if not that:
            self.wrong.append(what)


def _busy_with(log: Sequence[Message], at: Message) -> str:
    """The last SQL on the connection of `at` before it, or in it."""
    asked = [m.sql for m in log if m.connection == at.connection and m.index <= at.index and m.sql]
    return asked[-1] if asked else ""


class Laboratory:
    """One scenario on one database, run again and again."""

    def __init__(self, scenario: str, server: Server, dsn: str, seed: int) -> None:
        self.scenario = scenario
        self._server, self._dsn, self._seed = server, dsn, seed
        self._ids: Iterator[int] = itertools.count(1)
        self._tokens = CommitTokens()

    async def prepare(self) -> None:
        conn = await asyncpg.connect(self._dsn)
        await conn.execute(TABLE)
        await self._tokens.install(conn)
        await conn.close()

    async def clean_run(self, mode: Mode) -> list[str]:
        """What the connection is busy with, at each message of a run without a fault."""
        outcome = Outcome(Spot(0, "cut", "before", mode), Books(ids=self._ids))
        async with FaultProxy(self._server.host, self._server.port) as proxy:
            log = await self._run(outcome, proxy)
        assert outcome.error is None, outcome.error
        assert outcome.wrong == []
        return [_busy_with(log, message) for message in log]

    async def faulty_run(self, spot: Spot) -> Outcome:
        outcome = Outcome(spot, Books(ids=self._ids))
        async with FaultProxy(self._server.host, self._server.port) as proxy:

            def here(message: Message) -> bool:
                if message.index == spot.index:
                    outcome.hit = message
                return message.index == spot.index

            proxy.inject(Fault(spot.action, here, spot.side))
            log = await self._run(outcome, proxy)
        if outcome.hit is not None:
            self._judge(outcome, outcome.hit, log)
        return outcome

    def _how(self, spot: Spot) -> How:
        hangs = spot.action == "hang"
        return How(
            retry=RETRY,
            resolve=spot.mode != "raised",
            deadline=DEADLINE if hangs else None,
            # An ingest has no deadline: the time of a try bounds it.
            timeout=TRY if self.scenario == "single" or (hangs and self.scenario == "ingest") else None,
        )

    async def _run(self, outcome: Outcome, proxy: FaultProxy) -> tuple[Message, ...]:
        spot, loop = outcome.spot, asyncio.get_running_loop()
        async with Engine.open(
            proxy.dsn(self._dsn) + "?sslmode=disable",
            min_size=0,
            max_size=2,
            acquire_timeout=CONNECT if spot.action == "hang" else 10.0,
            # Of a connect, which the engine does not throw away with who waits for it.
            timeout=CONNECT if spot.action == "hang" else 60.0,
            commit_tokens=self._tokens if spot.mode == "token" else None,
        ) as engine:
            started = loop.time()
            try:
                how = self._how(spot)
                # An ingest has no deadline of its own, and a COMMIT whose line hangs is to be looked up here.
                with_bounds(engine, answer=1.0)
                await JOBS[self.scenario](engine, outcome.books, how, random.Random(self._seed))
            except Exception as exc:  # noqa: BLE001 - judged when all is known
                outcome.error = exc
            outcome.seconds = loop.time() - started
            log = proxy.messages
            in_use = engine.stats().in_use
            outcome.expect(that=in_use == 0, what=f"{in_use} connections in use afterwards")
            # What was held back goes on its way now, and must change nothing.
            faulty = None if outcome.hit is None else outcome.hit.connection
            outcome.last = outcome.hit is not None and outcome.hit.index == len(log)
            proxy.heal()
            # A connect that only hangs is not thrown away with who waited for it: it may still go on.
            hit = outcome.hit
            connecting = spot.action == "hang" and hit is not None and not _busy_with(log, hit)
            outcome.expect(
                that=outcome.last or connecting or await _is_closed(proxy, faulty),
                what="the connection was kept",
            )
            outcome.expect(that=await _is_usable(engine), what="the engine is of no use afterwards")
        await self._check_rows(outcome)
        return log

    async def _check_rows(self, outcome: Outcome) -> None:
        conn = await asyncpg.connect(self._dsn)
        try:
            audit = await outcome.books.audit(conn)
        finally:
            await conn.close()
        outcome.expect(that=audit.clean, what=str(audit))
        outcome.wrong += outcome.books.surprises

    def _judge(self, outcome: Outcome, hit: Message, log: Sequence[Message]) -> None:
        spot, error = outcome.spot, outcome.error
        outcome.busy_with = _busy_with(log, hit)
        outcome.commits = sum(message.sql == "COMMIT" for message in log)
        # Lost after the last answer before COMMIT, unnoticed: COMMIT is sent into it.
        in_doubt = outcome.busy_with == "COMMIT" or (hit.type == "Z" and spot.side == "after")
        looked_up = spot.mode != "raised" or self.scenario == "ingest"
        if isinstance(error, CommitUnknown):
            outcome.expect(that=in_doubt, what=f"CommitUnknown at {outcome.busy_with!r}")
            outcome.expect(that=not looked_up, what="CommitUnknown, though it can be known")
            outcome.expect(that=outcome.commits <= 1, what=f"{outcome.commits} COMMITs: a silent second try")
        elif error is not None:
            outcome.expect(that=spot.action == "hang", what=f"{type(error).__name__}: {error}")
        elif in_doubt and not looked_up:
            outcome.expect(that=outcome.commits <= 1, what=f"{outcome.commits} COMMITs: a silent second try")
        if spot.action == "hang" and self.scenario != "ingest":
            over = outcome.seconds - DEADLINE
            outcome.expect(that=over <= SLACK, what=f"{over:.2f} s beyond its deadline")
            if isinstance(error, OperationTimeout):
                outcome.expect(that=over >= -SLACK, what=f"timed out {-over:.2f} s before its deadline")


async def _is_usable(engine: Engine) -> bool:
    """Does it run a query, at the latest in five seconds? A busy machine may take long to connect."""
    give_up = asyncio.get_running_loop().time() + 5
    while asyncio.get_running_loop().time() < give_up:
        with contextlib.suppress(AcquireTimeout):
            return bool(await engine.run(lambda conn: conn.fetchval("SELECT 1"), retry=RETRY) == 1)
    return False


async def _is_closed(proxy: FaultProxy, number: int | None) -> bool:
    """Has the client closed the connection `number` of the proxy? It takes the proxy a moment to see it."""
    return await until(lambda: all(line.number != number for line in proxy._lines))


def _spots(
    messages: dict[Mode, list[str]], rng: random.Random, around: float, elsewhere: float
) -> list[Spot]:
    """Of the faults around a COMMIT the share `around`, in each mode; of all others `elsewhere`."""
    spots = []
    for mode, busy_with in messages.items():
        following = [*busy_with[1:], ""]
        for index, (sql, next_sql) in enumerate(zip(busy_with, following, strict=True), 1):
            share = around if "COMMIT" in {sql, next_sql} else elsewhere / len(messages)
            for action, side in itertools.product(ACTIONS, SIDES):
                if rng.random() < share:
                    spots.append(Spot(index, action, side, mode))
    return spots


async def _all(laboratory: Laboratory, spots: Sequence[Spot], at_a_time: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    left = iter(spots)

    async def work() -> None:
        for spot in left:
            outcomes.append(await laboratory.faulty_run(spot))  # noqa: PERF401 - each when it is there

    async with anyio.create_task_group() as group:
        for _ in range(at_a_time):
            group.start_soon(work)
    return outcomes


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_one_fault_at_any_message_loses_and_doubles_nothing(
    scenario: str,
    postgres_server: Server,
    postgres_dsn: str,
    seed: int,
    scale: float,
) -> None:
    before = asyncio.all_tasks()
    complaints: list[str] = []
    note_complaints(complaints)
    laboratory = Laboratory(scenario, postgres_server, postgres_dsn, seed)
    await laboratory.prepare()
    # An ingest always looks up its COMMITs.
    modes = MODES if scenario != "ingest" else MODES[1:]
    messages = {mode: await laboratory.clean_run(mode) for mode in modes}
    rng = random.Random(seed)
    around = {"single": 1.0, "ingest": 0.15}.get(scenario, 0.4)
    spots = _spots(messages, rng, around * scale, (0.08 if scenario == "ingest" else 0.15) * scale)
    hangs = [spot for spot in spots if spot.action == "hang"]
    others = [spot for spot in spots if spot.action != "hang"]
    outcomes = await _all(laboratory, others, OTHERS_AT_A_TIME)
    outcomes += await _all(laboratory, hangs, HANGS_AT_A_TIME)
    wrong = [
        f"{o.spot} at {o.hit and (o.hit.sender, o.hit.type)} of {o.busy_with[:60]!r}: {o.wrong} {o.error!r}"
        for o in outcomes
        if o.wrong
    ]
    met = Counter(outcome.spot.action for outcome in outcomes if outcome.hit is not None)
    ends = Counter("done" if o.error is None else type(o.error).__name__ for o in outcomes)
    print(f"{scenario}: {len(messages['xid'])} messages, faults {dict(met)}, ends {dict(ends)}")  # noqa: T201
    assert not wrong, f"{len(wrong)} of {len(outcomes)}:\n" + "\n".join(wrong)
    assert complaints == []
    assert sum(met.values()) >= 0.95 * len(spots), "faults that met no message"
    assert await until(lambda: asyncio.all_tasks() <= before), "tasks are left"
