"""What a benchmark says: figures with their bounds and the machine they are of, as Markdown and as JSON."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.header import header_markdown

__all__ = [
    "RESULTS",
    "Contender",
    "Figure",
    "Report",
    "Watch",
    "interleaved",
    "load_average",
    "median",
    "ratios",
]

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number with the bound that it is held against."""

    name: str
    value: float | None
    """None: not measured; the note says why."""
    bound: float
    better: Literal["at least", "at most"]
    note: str = ""
    """The rates or times behind it."""
    rounds: Sequence[float] = ()
    """The value of each round, of which `value` is the median."""

    @property
    def verdict(self) -> str:
        """PASS or MISS, or that it was not measured."""
        if self.value is None:
            return "not measured"
        met = self.value >= self.bound if self.better == "at least" else self.value <= self.bound
        return "PASS" if met else "MISS"


@dataclass(slots=True)
class Report:
    """The figures of one run of one benchmark."""

    title: str
    header: Mapping[str, Any]
    """As `bench.header.header` gives it."""
    figures: list[Figure] = field(default_factory=list)
    quick: bool = False
    """Small sizes: it shows that the benchmark works, and its figures mean nothing."""

    def markdown(self) -> str:
        """All of it as a Markdown document."""
        lines = [f"# {self.title}", ""]
        if self.quick:
            lines += ["**Quick sizes: these figures mean nothing.**", ""]
        lines += [
            header_markdown(self.header),
            "| figure | measured | bound | | behind it |",
            "|---|---|---|---|---|",
        ]
        for one in self.figures:
            value = "-" if one.value is None else f"{one.value:.2f}"
            sign = "≥" if one.better == "at least" else "≤"
            lines.append(f"| {one.name} | {value} | {sign} {one.bound:g} | {one.verdict} | {one.note} |")
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        figures = [asdict(one) | {"verdict": one.verdict} for one in self.figures]
        content = {"title": self.title, "quick": self.quick, "header": self.header, "figures": figures}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_average() -> str:
    """How busy the machine was in the last minute: figures of a busy one are worth less."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


Contender = Callable[[], Awaitable[float]]


async def interleaved(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Run each contender once a round, one after another: what disturbs the machine disturbs them alike.

    A contender gives its rate; each has one run before, which warms caches and does not count.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            rate = await contender()
            if number:
                found[name].append(rate)
    return found


def ratios(found: Mapping[str, Sequence[float]], name: str, baseline: str) -> list[float]:
    """One contender's rate over the baseline's, round by round."""
    return [rate / base for rate, base in zip(found[name], found[baseline], strict=True)]


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


class Watch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Now."""
        return time.perf_counter() - self._since
