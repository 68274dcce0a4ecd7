"""`python -m bench quick`: every benchmark in tiny sizes, to see that each works and measures all it should.

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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import ROOT
from bench.__main__ import COMMANDS
from bench.results import ALL, RESULTS, Result, section_of

NAMES = [name for name in COMMANDS if name != "quick"]
_POOL = ("--sizes", "1,2", "--clients", "4", "--seconds", "0.3", "--warmup", "0.1", "--rounds", "1")
# Seconds for one of them, on a machine that is busy with other things: only one that hangs takes longer.
_PATIENCE = 300


def main(arguments: Sequence[str]) -> int:
    """Run them; exit code 1 when one failed, or its result is not whole."""
    parser = argparse.ArgumentParser(
        prog="bench quick", description="Every benchmark in tiny sizes: shows that each works."
    )
    parser.add_argument("--only", action="append", choices=NAMES, help="this one; may be repeated")
    parser.add_argument("--out", type=Path, help="keep the results here; default: a temporary folder")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.out or Path(temporary)
        with ThreadPoolExecutor(os.cpu_count()) as several:
            whole = list(several.map(lambda name: _one(name, folder / name), asked.only or NAMES))
    return 0 if all(whole) else 1


def _one(name: str, folder: Path) -> bool:
    """Run one and say how it went."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    command = [sys.executable, "-m", "bench", name, "--out", str(folder)]
    command += _POOL if name == "pool" else ["--quick"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        faults = [f"not done after {_PATIENCE} s"]
    else:
        said = (done.stderr or done.stdout).strip().splitlines()
        faults = [f"exit code {done.returncode}", *said] if done.returncode else list(_read(name, folder))
    print(f"{name}: {'; '.join(faults) or 'whole'} ({time.perf_counter() - started:.0f} s)", flush=True)
    return not faults


def _read(name: str, folder: Path) -> Iterator[str]:
    path = folder / f"{name}.json"
    if not path.is_file():
        yield f"no {path.name}"
    elif name == "pool":
        found = json.loads(path.read_text(encoding="utf-8"))
        if not found.get("about") or len([value for value in found.values() if value]) < 2:
            yield "nothing was measured"
    else:
        yield from lost(Result.read(RESULTS / path.name), Result.read(path))


def lost(before: Result, now: Result) -> Iterator[str]:
    """What the last whole run has measured, and this one has not, and says no reason."""
    said = {(section_of(row.case), row.contender) for row in now.rows if row.value is None}
    there = {(section_of(row.case), row.contender, row.unit) for row in now.rows}
    wanted = {(section_of(row.case), row.contender, row.unit): None for row in before.rows if row.unit}
    for section, contender, unit in wanted:
        if (section, contender, unit) not in there and not {(section, contender), (section, ALL)} & said:
            yield f"{section}, {contender}: no {unit}"
