"""`python -m bench pool`: how large should a pool be, for this server and this work?

`main` needs the extras `bench`, `cli` and `embedded`, and says so where they are missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

_NEEDED = frozenset({"hdrh", "matplotlib", "numpy", "rich", "scipy"})


def main(arguments: Sequence[str]) -> int:
    """Run the command line; gives the exit code."""
    try:
        # Here and not above: the other benchmarks need none of these packages.
        from bench.pool import command  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] not in _NEEDED:
            raise
        print(
            f"bench pool: it needs the package {exc.name}: pip install 'dbop-raw[bench,cli,embedded]'",
            file=sys.stderr,
        )
        return 2
    return command.main(arguments)
