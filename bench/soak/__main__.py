"""`python -m bench.soak --minutes N --seed S`: its options, its report, and its exit code."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from dataclasses import asdict
from typing import Any

from bench.header import RESULTS, header, header_markdown
from bench.soak.run import Figures, soak
from dbop_raw.testing import Server, ServerUnavailable, postgres

DESCRIPTION = """\
A mixed load with faults for N minutes, against a durable server of its own: lines cut, reset and hung at
random messages, backends terminated, the server paused, restarted, crashed and made to recover, calls
cancelled.
Exit code 0 when nothing was lost, doubled or leaked, 1 when something was, 2 when there is no server.
The last report is kept in bench/results/soak.json.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run it; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="soak", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, default 1")
    parser.add_argument("--seed", type=int, help="of all chances; without it a new one, which is printed")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error("--minutes must be more than 0")
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    print(f"soak of {options.minutes:g} minutes, seed {seed}", flush=True)
    try:
        with postgres(durable=True, settings={"max_connections": "60"}) as server:
            figures, about = asyncio.run(_run(server, options.minutes, seed))
    except ServerUnavailable as exc:
        print(exc, file=sys.stderr)
        return 2
    report = {"header": about, "figures": asdict(figures), "clean": figures.clean}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "soak.json").write_text(json.dumps(report, indent=2) + "\n")
    print(header_markdown(about))
    print(_told(figures))
    return 0 if figures.clean else 1


async def _run(server: Server, minutes: float, seed: int) -> tuple[Figures, dict[str, Any]]:
    about = await header(
        server.dsn, ("dbop-raw", "asyncpg", "anyio"), {"minutes": minutes, "seed": seed}, embedded=True
    )
    return await soak(server, minutes, seed, lambda line: print(line, flush=True)), about


def _told(figures: Figures) -> str:
    """The figures for people; the JSON has all of them."""
    faults = ", ".join(f"{number} {kind}" for kind, number in sorted(figures.faults.items()))
    settled = f"{figures.found_committed} found committed, {figures.found_aborted} aborted"
    return "\n".join(
        (
            f"operations       {figures.operations:,} in {figures.seconds:.0f} s, {figures.rows:,} rows",
            f"faults           {sum(figures.faults.values())}: {faults}",
            f"retries          {figures.retries:,}",
            f"COMMITs in doubt {figures.commits_in_doubt}: {settled}",
            f"unknown          {figures.unknown} transactions, those of cancelled calls among them",
            f"lost             {figures.lost}",
            f"doubled          {figures.doubled}",
            f"torn, ghosts     {figures.torn}, {figures.ghosts}",
            f"leaked           {figures.leaked}",
            f"longest overrun  {figures.overrun:.2f} s beyond a deadline",
            *(f"surprise         {one}" for one in figures.surprises),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
