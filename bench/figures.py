"""Figures that were measured more than once: the middle, and how far the rounds lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

__all__ = ["Figures", "markdown_table", "rotated"]

T = TypeVar("T")


@dataclass(slots=True)
class Figures:
    """One figure, once a round."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median; 0.1: the rounds lie within a tenth of each other."""
        return (max(self.samples) - min(self.samples)) / self.median if self.median else 0.0

    def as_json(self) -> dict[str, Any] | None:
        """The median, the spread and each round; None where nothing was measured."""
        if not self.samples:
            return None
        return {"median": self.median, "spread": self.spread, "rounds": self.samples}

    def text(self, show: Callable[[float], str]) -> str:
        """The median and the spread, for a table."""
        return f"{show(self.median)} (±{50 * self.spread:.0f} %)" if self.samples else ""


def rotated(things: Sequence[T], turn: int) -> list[T]:
    """The same, beginning with another one each turn: none always comes first."""
    start = turn % len(things)
    return [*things[start:], *things[:start]]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [header, ["---", *(["---:"] * (len(header) - 1))], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
