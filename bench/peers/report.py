"""What peers says, as Markdown and as JSON: every way is in each table, with figures or the reason."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.figures import markdown_table
from bench.header import header_markdown
from bench.peers.measure import Measured
from bench.peers.single import SingleMeasured

__all__ = ["LIMIT", "Case", "PeersReport"]

LIMIT = "asyncpg COPY, good rows only"
"""What all rates are held against: nothing is isolated, so nobody can be as fast."""


@dataclass(slots=True)
class Case:
    """All ways at one work over one line; or why it was not done."""

    name: str
    line: str
    rows: int = 0
    measured: list[Measured] = field(default_factory=list)
    reason: str | None = None

    def ratio(self, one: Measured) -> float | None:
        """Its rate over the limit's, of the medians."""
        limit = next((other for other in self.measured if other.way.name == LIMIT), None)
        if limit is None or not limit.rate.samples or not one.rate.samples:
            return None
        return one.rate.median / limit.rate.median


@dataclass(slots=True)
class PeersReport:
    """All of it."""

    header: Mapping[str, Any]
    """As `bench.header.header` gives it."""
    round_trip: Mapping[str, float]
    """Seconds of `SELECT 1`, by line."""
    cases: list[Case]
    singles: list[SingleMeasured]
    quick: bool = False

    def write(self, folder: Path) -> list[Path]:
        """Write peers.md and peers.json; gives what was written."""
        folder.mkdir(parents=True, exist_ok=True)
        markdown, data = folder / "peers.md", folder / "peers.json"
        data.write_text(json.dumps(self.as_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        markdown.write_text(self.markdown(), encoding="utf-8")
        return [markdown, data]

    def as_json(self) -> dict[str, Any]:
        """For programs, and for the tests that hold the README to it."""
        return {
            "title": "peers",
            "quick": self.quick,
            "header": dict(self.header),
            "round_trip_seconds": dict(self.round_trip),
            "limit": LIMIT,
            "cases": [_case_json(case) for case in self.cases],
            "one_operation": [_single_json(one) for one in self.singles],
        }

    def markdown(self) -> str:
        """For people."""
        parts = ["# The same work by others, and by ours\n"]
        if self.quick:
            parts.append("**Quick sizes: these figures mean nothing.**\n")
        parts.append(header_markdown(self.header))
        trips = ", ".join(f"{1000 * seconds:.2f} ms {line}" for line, seconds in self.round_trip.items())
        parts.append(f"A round trip (`SELECT 1`, measured): {trips}.\n")
        parts.append(_HOW)
        for line in dict.fromkeys(case.line for case in self.cases):
            parts += self._rates(line)
        parts += ["## One operation with timeouts and retry\n", _SINGLE, self._single_table()]
        parts += ["## How each was used\n", self._notes()]
        return "\n".join(parts)

    def _rates(self, line: str) -> list[str]:
        cases = [case for case in self.cases if case.line == line]
        done = [case for case in cases if case.measured]
        parts = [f"## Rows a second, {line}\n"]
        parts += [f"{case.name}: not measured: {case.reason}.\n" for case in cases if not case.measured]
        if done:
            header = ["", *(f"{case.name} ({case.rows:,} rows)" for case in done)]
            rows = [
                [_bold(one.way.name, one.way.role), *(_rate_cell(case, case.measured[at]) for case in done)]
                for at, one in enumerate(done[0].measured)
            ]
            parts.append(markdown_table(header, rows))
        return parts

    def _single_table(self) -> str:
        header = ["", "round trips", "time", "time, slow line", "round trips, first try fails"]
        header.append("time, slow line, first try fails")
        return markdown_table(header, [_single_row(one) for one in self.singles])

    def _notes(self) -> str:
        notes = {one.way.name: one.way.note for case in self.cases for one in case.measured}
        notes |= {f"{one.way.name} (one operation)": one.way.note for one in self.singles}
        return "\n".join(f"- {name}: {note}" for name, note in notes.items()) + "\n"


_HOW = (
    "All ways but autocommit write a chunk of rows in one transaction. Each has its connection before the"
    " clock starts, and afterwards the table was compared with what must be in it. A rate counts all rows,"
    " bad ones too; of a limit, which is given only the good ones, those. Medians of interleaved rounds; ± is"
    " half of what lies between the slowest and the fastest round, and the last number of a cell is the ratio"
    f" to *{LIMIT}*, same column.\n"
)
_SINGLE = (
    "An INSERT by a function, `statement_timeout` and `lock_timeout` set for it, at most four tries, on a"
    " connection of a pool, given back. Where it says so, the first try fails with 55P03; pauses between"
    " tries are at most 1 ms. Times are medians of calls one after another, with `synchronous_commit` off"
    " for all.\n"
)


def _bold(name: str, role: str) -> str:
    return f"**{name}**" if role == "ours" else f"*{name}*" if role == "limit" else name


def _rate_cell(case: Case, one: Measured) -> str:
    if one.reason is not None:
        return one.reason
    ratio = case.ratio(one)
    return one.rate.text(lambda value: f"{value:,.0f}") + ("" if ratio is None else f", {ratio:.2g}")


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


def _single_row(one: SingleMeasured) -> list[str]:
    name = _bold(one.way.name, one.way.role)
    if one.reason is not None:
        return [name, one.reason, "", "", "", ""]
    repaired = "no retry" if one.trips_repaired is None else f"{one.trips_repaired:g}"
    times = [figures.text(_milliseconds) for figures in (one.near, one.far, one.repaired)]
    return [name, f"{one.trips:g}", times[0], times[1], repaired, times[2]]


def _case_json(case: Case) -> dict[str, Any]:
    return {
        "name": case.name,
        "line": case.line,
        "rows": case.rows,
        "reason": case.reason,
        "ways": [
            {
                "name": one.way.name,
                "role": one.way.role,
                "reason": one.reason,
                "rows_a_second": None if one.reason else one.rate.as_json(),
                "ratio_to_limit": None if one.reason else case.ratio(one),
            }
            for one in case.measured
        ],
    }


def _single_json(one: SingleMeasured) -> dict[str, Any]:
    there = one.reason is None
    return {
        "name": one.way.name,
        "role": one.way.role,
        "reason": one.reason,
        "round_trips": one.trips if there else None,
        "round_trips_first_try_fails": one.trips_repaired if there else None,
        "seconds": one.near.as_json() if there else None,
        "seconds_slow_line": one.far.as_json() if there else None,
        "seconds_slow_line_first_try_fails": one.repaired.as_json() if there else None,
    }


def measured_cases(cases: Sequence[Case]) -> list[Case]:
    """Those that have figures."""
    return [case for case in cases if any(one.rate.samples for one in case.measured)]
