"""What is asked of a measurement: one frozen value, checked before anything starts."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

__all__ = ["BadOption", "Options", "parse_sizes"]

LARGEST = 1000


class BadOption(Exception):
    """An option, a file or a server that can't be used; the message is one sentence and shows no DSN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to measure; `BadOption` for a value that is not allowed."""

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
    """Bursts on a pool that was idle, instead of the sizes."""
    burst: int = 200
    """Requests in a burst."""
    connect_delay: float = 0.1
    """Seconds that opening a connection takes in a burst, beyond what it takes anyway."""

    def __post_init__(self) -> None:
        _check_sizes(self.sizes)
        for name, least in (("clients", 1), ("rounds", 1), ("burst", 1), ("cores", 1), ("max_waiting", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadOption(f"{_flag(name)} {value}: give a whole number of at least {least}")
        for name in ("seconds", "acquire_timeout", "warmup", "connect_delay"):
            value, zero = getattr(self, name), name in {"warmup", "connect_delay"}
            if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
                raise BadOption(f"{_flag(name)} {value:g}: give seconds, {'at least' if zero else 'above'} 0")
        if self.rate is not None and not (math.isfinite(self.rate) and self.rate > 0):
            raise BadOption(f"--rate {self.rate:g}: give requests a second, above 0")


def parse_sizes(text: str) -> tuple[int, ...]:
    """`1,2,4,8` as numbers, sorted; `BadOption` for anything else."""
    try:
        sizes = tuple(sorted(int(part) for part in text.split(",")))
    except ValueError:
        raise BadOption(f"--sizes {text!r}: give whole numbers, such as 1,2,4,8") from None
    _check_sizes(sizes)
    return sizes


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_sizes(sizes: tuple[int, ...]) -> None:
    if not sizes or sizes[0] < 1 or sizes[-1] > LARGEST:
        raise BadOption(f"--sizes: give pool sizes from 1 to {LARGEST}")
    if any(one >= other for one, other in itertools.pairwise(sizes)):
        raise BadOption("--sizes: a size is named twice")
