"""What cost says, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.cost.batches import Pair
from bench.cost.layers import Layer
from bench.cost.wire import BY_HAND, OURS, Timed, speedup
from bench.figures import markdown_table
from bench.header import header_markdown

__all__ = ["SHARE_BOUND", "WANTED", "CostReport"]

SHARE_BOUND = 0.15
"""A batch's Python part has to stay below this share of its time, from `SHARE_FROM` items on."""
SHARE_FROM = 1000
WANTED = 1.5
"""How much faster than the same SQL by hand the fused operation is wanted to be."""


@dataclass(slots=True, kw_only=True)
class CostReport:
    """All of it."""

    header: Mapping[str, Any]
    """As `bench.header.header` gives it."""
    layers: Sequence[Layer]
    depths: Sequence[Layer]
    round_trip: Mapping[str, float]
    """Seconds of `SELECT 1`, on the direct and on the slow line."""
    wire: Sequence[Timed]
    slow_wire: Sequence[Timed]
    items: Sequence[Pair]
    failures: Sequence[Pair]
    workers: Sequence[Pair]
    profile: str
    quick: bool = False

    def write(self, folder: Path) -> list[Path]:
        """Write cost.md, cost.json and cost-profile.txt; gives what was written."""
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            "cost.md": self.markdown(),
            "cost.json": json.dumps(self.as_json(), indent=1, ensure_ascii=False) + "\n",
            "cost-profile.txt": self.profile,
        }
        for name, content in contents.items():
            (folder / name).write_text(content, encoding="utf-8")
        return [folder / name for name in contents]

    def as_json(self) -> dict[str, Any]:
        """For programs, and for the tests that hold the README to it."""
        return {
            "title": "cost",
            "quick": self.quick,
            "header": dict(self.header),
            "round_trip_seconds": dict(self.round_trip),
            "speedup_over_by_hand": speedup(self.wire),
            "speedup_over_by_hand_slow_line": speedup(self.slow_wire),
            "layers": [_layer_json(one) for one in self.layers],
            "pipeline_depth": [_layer_json(one) for one in self.depths],
            "wire": [_timed_json(one) for one in self.wire],
            "wire_slow_line": [_timed_json(one) for one in self.slow_wire],
            "items": [_pair_json(one) for one in self.items],
            "failures": [_pair_json(one) for one in self.failures],
            "workers": [_pair_json(one) for one in self.workers],
        }

    def markdown(self) -> str:
        """For people."""
        quick = ["**Quick sizes: these figures mean nothing.**\n"] if self.quick else []
        parts = ["# What the layer itself costs\n", *quick, header_markdown(self.header)]
        parts += ["## Layers\n", _LAYERS, _layers_table(self.layers)]
        parts += ["## Depth of the pipeline\n", _DEPTHS, _layers_table(self.depths)]
        parts += ["## One operation on a server\n", _WIRE]
        parts += [self._line("direct", self.wire), self._line("slow", self.slow_wire)]
        parts += ["## Batches, over the number of items\n", _ITEMS, _pairs_table(self.items), self._share()]
        parts += ["## Batches, over the share of bad items\n", _FAILURES, _pairs_table(self.failures)]
        parts += ["## Ingest, over the number of workers\n", _WORKERS, _pairs_table(self.workers)]
        return "\n".join(parts)

    def _line(self, name: str, ways: Sequence[Timed]) -> str:
        times = speedup(ways)
        met = "met" if times >= WANTED else "MISSED"
        return (
            f"On the {name} line, a round trip (`SELECT 1`) of {1000 * self.round_trip[name]:.2f} ms:\n\n"
            f"{_wire_table(ways)}\n"
            f"*{OURS}* is {times:.2f} times as fast as *{BY_HAND}*; wanted are {WANTED:g}: {met}.\n"
        )

    def _share(self) -> str:
        large = [one for one in self.items if one.rows >= SHARE_FROM]
        if not large:
            return "No batch was large enough to say what share of its time is Python's.\n"
        worst = max(large, key=lambda one: one.python_share)
        met = "met" if worst.python_share < SHARE_BOUND else "MISSED"
        return (
            f"From {SHARE_FROM:,} items on, the largest share of Python is {100 * worst.python_share:.1f} %"
            f" ({worst.name}, {worst.rows:,} items); the bound is {100 * SHARE_BOUND:g} %: {met}.\n"
        )


_LAYERS = (
    "On a connection that answers at once, so that only Python is left. Time is this process's processor"
    " time a call; *peak* is how much more memory was in use during a call; *kept* are memory blocks a call"
    " that were still in use after the last call (timers that were cancelled are dropped by the event loop"
    " when there are many, or when their time has come: about 3 blocks each).\n"
)
_DEPTHS = "The same, with timeout, retry and savepoint nested in turn; each retry and savepoint has a mark.\n"
_WIRE = (
    "An INSERT, acquire to release, calls one after another on one connection, `synchronous_commit` off for"
    " all. Time is the mean of a round; the table has the median of the rounds; *cpu* is this process's.\n"
)
_ITEMS = (
    "A batch in one `run`, beside the driver's own bulk call in a transaction by hand. *Python* is the share"
    " of our time that is processor time which the bare call does not need. Bare `copy_text` joins the text"
    " the plain way, without escapes.\n"
)
_FAILURES = "`copy_into`, with more and more bad rows; bare is COPY of the good rows alone.\n"
_WORKERS = "`ingest` with `copy_into`, beside so many tasks that COPY the same chunks by hand.\n"


def _layers_table(layers: Sequence[Layer]) -> str:
    rows = [
        [
            one.name,
            one.cpu.text(lambda seconds: f"{1e6 * seconds:.1f} µs"),
            f"{one.peak:,.0f} bytes",
            f"{one.kept:.2f} blocks",
        ]
        for one in layers
    ]
    return markdown_table(["", "time", "peak", "kept"], rows)


def _wire_table(ways: Sequence[Timed]) -> str:
    rows = [
        [
            one.name,
            str(one.trips),
            one.seconds.text(lambda seconds: f"{1e6 * seconds:.0f} µs"),
            one.cpu.text(lambda seconds: f"{1e6 * seconds:.0f} µs"),
        ]
        for one in ways
    ]
    return markdown_table(["", "round trips", "time", "cpu"], rows)


def _pairs_table(pairs: Sequence[Pair]) -> str:
    rows = [
        [
            one.name,
            f"{one.rows:,}",
            _rate(one, one.bare_seconds.median),
            one.seconds.text(partial(_rate, one)),
            f"{one.ratio:.2f}",
            f"{100 * one.python_share:.1f} %",
        ]
        for one in pairs
    ]
    return markdown_table(["", "items", "bare, items/s", "ours, items/s", "time ours/bare", "Python"], rows)


def _rate(pair: Pair, seconds: float) -> str:
    return f"{pair.rows / seconds:,.0f}"


def _layer_json(one: Layer) -> dict[str, Any]:
    return {
        "name": one.name,
        "cpu_seconds": one.cpu.as_json(),
        "peak_bytes": one.peak,
        "kept_blocks": one.kept,
    }


def _timed_json(one: Timed) -> dict[str, Any]:
    return {
        "name": one.name,
        "round_trips": one.trips,
        "seconds": one.seconds.as_json(),
        "cpu_seconds": one.cpu.as_json(),
    }


def _pair_json(one: Pair) -> dict[str, Any]:
    return {
        "name": one.name,
        "rows": one.rows,
        "bare_seconds": one.bare_seconds.as_json(),
        "bare_cpu_seconds": one.bare_cpu.as_json(),
        "seconds": one.seconds.as_json(),
        "cpu_seconds": one.cpu.as_json(),
        "ratio": one.ratio,
        "python_share": one.python_share,
    }
