"""Tidy rows: each is one figure of one contender in one round. A result is a header and rows, in a JSON file.

A case is named "section: case", or as its section. What could not be measured has a row that says why.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
ALL = "all"
"""The contender of a row that says why a whole case was not measured."""
FIGURES = "figures"
"""The case of what is held against a bound; its contenders are the figures' names."""


@dataclass(frozen=True, slots=True)
class Row:
    bench: str
    case: str
    contender: str
    round: int | None
    """From 1; None: it belongs to no round, such as a count, or a median of rounds that were not kept."""
    value: float | None
    unit: str
    why: str = ""
    """Why there is no value."""


class Result:
    """What one run of one benchmark found."""

    def __init__(self, bench: str, header: Mapping[str, Any], rows: Iterable[Row] = ()) -> None:
        self.bench, self.header, self.rows = bench, dict(header), list(rows)
        self.files: dict[str, str] = {}
        """Texts beside the result, such as a profile."""

    @classmethod
    def read(cls, path: Path) -> Result:
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(found["header"]["bench"], found["header"], [Row(**row) for row in found["rows"]])

    def write(self, path: Path) -> None:
        """Write the header, then a row a line: a difference between two runs can be read."""
        lines = [
            json.dumps({key: value for key, value in asdict(row).items() if key != "why" or value})
            for row in self.rows
        ]
        header, rows = json.dumps(self.header, indent=1, ensure_ascii=False), ",\n".join(lines)
        path.write_text(f'{{"header": {header},\n"rows": [\n{rows}\n]}}\n', encoding="utf-8")

    def add(self, case: str, contender: str, turn: int | None, figures: Mapping[str, float]) -> None:
        """Add the figures of one round, by their units."""
        self.rows += [
            Row(self.bench, case, contender, turn, value, unit)
            for unit, value in figures.items()
            if math.isfinite(value)
        ]

    def fail(self, case: str, contender: str, why: str) -> None:
        """Say why a contender has no figures: those of its earlier rounds go."""
        self.rows = [row for row in self.rows if (row.case, row.contender) != (case, contender)]
        self.rows.append(Row(self.bench, case, contender, None, None, "", why))

    @property
    def failures(self) -> list[str]:
        """What went wrong: not what is not installed, not fetched or not asked for."""
        return [
            f"{row.case}, {row.contender}: {row.why}"
            for row in self.rows
            if row.value is None and not row.why.startswith("not ")
        ]

    def cases(self, section: str) -> list[str]:
        """The cases of a section, in their order."""
        return [case for case in dict.fromkeys(row.case for row in self.rows) if section_of(case) == section]

    def contenders(self, case: str) -> list[str]:
        """The contenders of a case, in their order."""
        found = dict.fromkeys(row.contender for row in self.rows if row.case == case)
        return [name for name in found if name != ALL]

    def figure(self, name: str, sign: str, bound: float, rounds: Sequence[float], why: str = "") -> None:
        """Add a figure, and the bound that it is held against."""
        self.header.setdefault("bounds", {})[name] = [sign, bound]
        for turn, value in enumerate(rounds, 1):
            self.add(FIGURES, name, turn, {"figure": value})
        if not self.values(FIGURES, name, "figure"):
            self.fail(FIGURES, name, f"not measured: {why}")

    def values(self, case: str, contender: str, unit: str) -> list[float]:
        """The figure of each round."""
        wanted = (case, contender, unit)
        return [
            row.value
            for row in self.rows
            if (row.case, row.contender, row.unit) == wanted and row.value is not None
        ]

    def median(self, case: str, contender: str, unit: str) -> float:
        """The middle of the rounds; not a number where there are none."""
        values = self.values(case, contender, unit)
        return statistics.median(values) if values else float("nan")

    def why(self, case: str, contender: str) -> str:
        """Why a contender has no figures; empty where it has some."""
        found = [row.why for row in self.rows if row.case == case and row.contender in {contender, ALL}]
        return next(filter(None, found), "")


def section_of(case: str) -> str:
    return case.partition(":")[0]


def name_of(case: str) -> str:
    """A case's name without its section."""
    return case.partition(": ")[2] or case
