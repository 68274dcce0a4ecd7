"""`python -m bench pool`: `dbop-raw pool-size` with every table, its result beside those of the others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dbop_raw.cli import __main__ as command_line

__all__ = ["main"]

_RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str]) -> int:
    """Run the command; it ends the process with its exit code."""
    sys.argv = ["dbop-raw", "pool-size", "--details", "--out", str(_RESULTS), *arguments]
    command_line.main()
    return 0
