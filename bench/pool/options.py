"""What was asked for, checked before anything starts."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

from bench.pool.errors import BadOption

__all__ = ["RESULTS", "Options", "parse_sizes"]

RESULTS = Path(__file__).resolve().parent.parent / "results"
LARGEST = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run of the benchmark. Raises `BadOption` for values that are not allowed or don't go together."""

    dsn: str | None = field(default=None, repr=False)
    """Of the server to measure. None: an embedded one, durable, for the time of the run."""
    workload: str = "mixed"
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    clients: int = 64
    """Closed loop: as many callers, each with one request at a time."""
    rate: float | None = None
    """Open loop: requests a second, whether the server keeps up or not. None: closed loop."""
    seconds: float = 3.0
    """Of one measurement."""
    warmup: float = 1.0
    """Seconds before each measurement that are not counted."""
    rounds: int = 5
    seed: int = 1
    acquire_timeout: float = 5.0
    """Seconds that the engine waits for a connection."""
    max_waiting: int | None = None
    """Calls that may wait before the engine sheds one more. None: any number."""
    cores: int | None = None
    """Of the server, for the common formula. None: those of this machine."""
    spike: bool = False
    """The spike scenario, instead of the sizes."""
    burst: int = 200
    """Requests in a spike."""
    connect_delay: float = 0.1
    """Seconds that opening a connection takes in the spike scenario, beyond what it takes anyway."""
    out: Path = RESULTS

    def __post_init__(self) -> None:
        _ascending(self.sizes)
        for name in ("clients", "rounds", "burst"):
            _at_least(name, getattr(self, name), 1)
        if self.cores is not None:
            _at_least("cores", self.cores, 1)
        if self.max_waiting is not None:
            _at_least("max-waiting", self.max_waiting, 0)
        for name in ("seconds", "acquire_timeout"):
            _seconds(name.replace("_", "-"), getattr(self, name), zero=False)
        for name in ("warmup", "connect_delay"):
            _seconds(name.replace("_", "-"), getattr(self, name), zero=True)
        if self.rate is not None and not (math.isfinite(self.rate) and self.rate > 0):
            raise BadOption(f"--rate {self.rate:g}: give requests a second, above 0")


def parse_sizes(text: str) -> tuple[int, ...]:
    """`1,2,4,8` as numbers, sorted. Raises `BadOption` for anything else."""
    try:
        sizes = tuple(sorted(int(part) for part in text.split(",")))
    except ValueError:
        raise BadOption(f"--sizes {text!r}: give whole numbers, such as 1,2,4,8") from None
    _ascending(sizes)
    return sizes


def _ascending(sizes: tuple[int, ...]) -> None:
    if not sizes or sizes[0] < 1 or sizes[-1] > LARGEST:
        raise BadOption(f"--sizes: give pool sizes from 1 to {LARGEST}")
    if any(one >= other for one, other in itertools.pairwise(sizes)):
        raise BadOption("--sizes: a size is named twice")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise BadOption(f"--{name} {value}: give a whole number of at least {least}")


def _seconds(name: str, value: float, *, zero: bool) -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise BadOption(f"--{name} {value:g}: give seconds, {'at least' if zero else 'above'} 0")
