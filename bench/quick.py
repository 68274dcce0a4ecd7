"""`python -m bench quick`: every benchmark in tiny sizes, to see that each works and says all it should.

The figures mean nothing, so they go to a folder of their own, no bound is held against them, and as many run
at once as there are cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["RUNS", "Run", "faults_of_cost", "faults_of_peers", "main"]

_ROOT = Path(__file__).resolve().parent.parent
# Seconds for one of them, on a machine that is busy with other things: only one that hangs takes longer.
_PATIENCE = 300

Faults = Callable[[Mapping[str, Any]], Iterator[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One benchmark, in tiny sizes."""

    name: str
    arguments: Callable[[Path], list[str]]
    """From the folder for its results."""
    result: str
    """A pattern of its JSON file's name."""
    faults: Faults
    """What is missing in its report."""
    codes: frozenset[int] = frozenset({0})
    """Exit codes that mean that it ran."""


def _needs(report: Mapping[str, Any], *keys: str) -> Iterator[str]:
    for key in keys:
        if not report.get(key):
            yield f"no {key}"


def faults_of_foundation(report: Mapping[str, Any]) -> Iterator[str]:
    """Each figure was measured, or says why not."""
    yield from _needs(report, "header", "figures")
    for figure in report.get("figures", ()):
        if figure["value"] is None and not figure["note"]:
            yield f"{figure['name']}: neither a figure nor a reason"


def faults_of_pool(report: Mapping[str, Any]) -> Iterator[str]:
    """There is something below the header."""
    yield from _needs(report, "about")
    if not any(value for key, value in report.items() if key != "about"):
        yield "nothing was measured"


def faults_of_peers(report: Mapping[str, Any]) -> Iterator[str]:
    """Each way has figures, or the reason why it has none; none was wrong."""
    yield from _needs(report, "header", "round_trip_seconds", "cases", "one_operation")
    for case in report.get("cases", ()):
        if not case["ways"] and not case["reason"]:
            yield f"{case['name']}: neither ways nor a reason"
        for way in case["ways"]:
            yield from _way(case["name"], way, "rows_a_second")
    for way in report.get("one_operation", ()):
        yield from _way("one operation", way, "seconds")


def _way(where: str, way: Mapping[str, Any], figure: str) -> Iterator[str]:
    reason = way["reason"]
    if reason is None and not way[figure]:
        yield f"{where}, {way['name']}: neither figures nor a reason"
    if reason is not None and not reason.startswith("not installed"):
        yield f"{where}, {way['name']}: {reason}"


def faults_of_cost(report: Mapping[str, Any]) -> Iterator[str]:
    """Each section has figures."""
    sections = ("layers", "pipeline_depth", "wire", "wire_slow_line", "items", "failures", "workers")
    yield from _needs(report, "header", "round_trip_seconds", *sections)
    for section in sections:
        for one in report.get(section, ()):
            if not one.get("seconds" if "seconds" in one else "cpu_seconds"):
                yield f"{section}, {one['name']}: no figures"


RUNS = (
    Run(
        name="foundation",
        arguments=lambda folder: ["--quick", "--output", str(folder / "foundation.json")],
        result="foundation.json",
        faults=faults_of_foundation,
        # 1: a bound was missed, which means nothing in these sizes.
        codes=frozenset({0, 1}),
    ),
    Run(
        name="pool",
        arguments=lambda folder: [
            *("--sizes", "1,2", "--clients", "4", "--seconds", "0.3", "--warmup", "0.1", "--rounds", "1"),
            *("--out", str(folder)),
        ],
        result="pool*.json",
        faults=faults_of_pool,
    ),
    Run(
        name="peers",
        arguments=lambda folder: ["--quick", "--out", str(folder)],
        result="peers.json",
        faults=faults_of_peers,
    ),
    Run(
        name="cost",
        arguments=lambda folder: ["--quick", "--out", str(folder)],
        result="cost.json",
        faults=faults_of_cost,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them; exit code 1 when one failed, or its report is not whole."""
    parser = argparse.ArgumentParser(
        prog="bench quick", description="Every benchmark in tiny sizes: shows that each works."
    )
    names = [run.name for run in RUNS]
    parser.add_argument("--only", action="append", choices=names, help="this one; may be repeated")
    parser.add_argument("--out", type=Path, help="keep the reports here; default: a temporary folder")
    asked = parser.parse_args(arguments)
    wanted = [run for run in RUNS if not asked.only or run.name in asked.only]
    with tempfile.TemporaryDirectory() as temporary:
        folders = [(asked.out or Path(temporary)) / run.name for run in wanted]
        with ThreadPoolExecutor(os.cpu_count()) as several:
            faults = list(several.map(_one, wanted, folders))
    return 1 if any(faults) else 0


def _one(run: Run, folder: Path) -> list[str]:
    """Run one and say how it went; gives what is wrong with it."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    faults = _run(run, folder) or list(_read(run, folder))
    print(f"{run.name}: {'; '.join(faults) or 'whole'} ({time.perf_counter() - started:.0f} s)", flush=True)
    return faults


def _run(run: Run, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "bench", run.name, *run.arguments(folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=_ROOT, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return [f"not done after {_PATIENCE} s"]
    if done.returncode in run.codes:
        return []
    last = (done.stderr or done.stdout).strip().splitlines()[-1:]
    return [f"exit code {done.returncode}: {' '.join(last)}"]


def _read(run: Run, folder: Path) -> Iterator[str]:
    found = sorted(folder.glob(run.result))
    if not found:
        yield f"no {run.result}"
        return
    for path in found:
        report: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        yield from run.faults(report)
