"""A histogram of durations by HdrHistogram: three digits of every value, from 1 µs to 10 minutes."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Histogram", "Spread"]

# Without stubs: what comes out of it is checked where it comes out.
_hdrh: Any = importlib.import_module("hdrh.histogram")

_LONGEST = 600.0
_PERCENTS = (50.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles in seconds; all 0 where nothing was recorded."""

    p50: float
    p95: float
    p99: float
    p999: float
    max: float
    mean: float

    def as_dict(self) -> dict[str, float]:
        """For JSON, to the microsecond."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


class Histogram:
    """Durations in seconds, counted."""

    def __init__(self, values: Iterable[float] = ()) -> None:
        self._counts = _hdrh.HdrHistogram(1, round(_LONGEST * 1e6), 3)
        self._largest = self._sum = 0.0
        for value in values:
            self.record(value)

    def record(self, seconds: float) -> None:
        """Count one; what is longer than 10 minutes counts as 10 minutes."""
        seconds = min(max(seconds, 0.0), _LONGEST)
        self._largest = max(self._largest, seconds)
        self._sum += seconds
        self._counts.record_value(max(1, round(seconds * 1e6)))

    def add(self, other: Histogram) -> None:
        """Count all that `other` has counted."""
        self._counts.add(other._counts)
        self._largest = max(self._largest, other._largest)
        self._sum += other._sum

    @classmethod
    def of_all(cls, parts: Iterable[Histogram]) -> Histogram:
        """One histogram of several."""
        whole = cls()
        for part in parts:
            whole.add(part)
        return whole

    def __len__(self) -> int:
        return int(self._counts.get_total_count())

    def at(self, percent: float) -> float:
        """The value in seconds that `percent` of all are not above."""
        return float(self._counts.get_value_at_percentile(percent)) / 1e6 if len(self) else 0.0

    def spread(self) -> Spread:
        """The percentiles that are reported."""
        if not len(self):
            return Spread(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        values = self._counts.get_percentile_to_value_dict(list(_PERCENTS))
        p50, p95, p99, p999 = (min(float(values[one]) / 1e6, self._largest) for one in _PERCENTS)
        return Spread(p50, p95, p99, p999, self._largest, self._sum / len(self))

    def encoded(self) -> str:
        """The counts in HdrHistogram's own compressed form, in microseconds: to merge or draw elsewhere."""
        encoded: bytes = self._counts.encode()
        return encoded.decode("ascii")
