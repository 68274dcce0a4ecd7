"""`python -m bench.soak --minutes N --seed S`: its options, its report, and its exit code."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys

from bench.command import faults_of
from bench.header import header
from bench.report import Section, markdown
from bench.results import RESULTS, Result
from bench.soak.run import UNITS, soak
from dbop_raw.testing import Server, ServerUnavailable, postgres

DESCRIPTION = """\
A mixed load with faults for N minutes, against a durable server of its own: lines cut, reset and hung at
random messages, backends terminated, the server paused, restarted, crashed and made to recover, calls
cancelled.
Exit code 0 when nothing was lost, doubled or leaked, 1 when something was, 2 when there is no server.
The last report is kept in bench/results (soak.json, soak.md).
"""


def main(arguments: list[str] | None = None) -> int:
    """Run it; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="soak", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, default 1")
    parser.add_argument("--seed", type=int, help="of all chances; without it a new one, which is printed")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes must be more than 0, not {options.minutes:g}")
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    print(f"soak of {options.minutes:g} minutes, seed {seed}", flush=True)
    try:
        with postgres(durable=True, settings={"max_connections": "60"}) as server:
            result = asyncio.run(_run(server, options.minutes, seed))
    except ServerUnavailable as exc:
        print(exc, file=sys.stderr)
        return 2
    sections = {case: Section(title=case.capitalize(), units=(unit,)) for case, unit in UNITS.items()}
    report = markdown(result, "Soak", sections)
    result.write(RESULTS / "soak.json")
    (RESULTS / "soak.md").write_text(report, encoding="utf-8")
    print(report)
    for line in (*faults_of(result), *result.header["surprises"]):
        print(f"soak: {line}", file=sys.stderr)
    return 1 if faults_of(result) else 0


async def _run(server: Server, minutes: float, seed: int) -> Result:
    packages, options = ("dbop-raw", "asyncpg", "anyio"), {"minutes": minutes, "seed": seed}
    command = f"./scripts/soak --minutes {minutes:g} --seed {seed}"
    about = await header("soak", server.dsn, packages, options, command=command, embedded=True)
    return await soak(server, minutes, seed, lambda line: print(line, flush=True), about)


if __name__ == "__main__":
    sys.exit(main())
