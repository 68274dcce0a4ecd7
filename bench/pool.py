"""`python -m bench pool`: `dbop-raw pool-size` with every table, its result beside those of the others."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.results import RESULTS
from dbop_raw.cli import __main__ as command_line

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Run the command; it ends the process with its exit code."""
    sys.argv = ["dbop-raw", "pool-size", "--details", "--out", str(RESULTS), *arguments]
    command_line.main()
    return 0
