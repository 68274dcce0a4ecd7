"""The benchmarks' command line: `python -m bench NAME …`, or `./scripts/bench NAME …`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

# The module that has `main(arguments)`, which gives the exit code. It is imported when it is asked for, since
# each needs packages of its own.
COMMANDS = {
    "foundation": ("bench.foundation", "the timed figures of the foundation, each with its bound"),
    "pool": ("bench.pool", "how large a connection pool should be, for this server and this work"),
    "peers": ("bench.peers", "the same work by other libraries, and by ours"),
    "cost": ("bench.cost", "what the layer itself costs"),
    "quick": ("bench.quick", "all of them in tiny sizes, within two minutes: shows that each works"),
}


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that is named first; the rest is for it."""
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        run: Callable[[Sequence[str]], int] = importlib.import_module(COMMANDS[name][0]).main
        return run(arguments[1:])
    asked_for_help = name in {"-h", "--help"}
    said = [f"there is no benchmark {name!r}", ""] if name and not asked_for_help else []
    said += ["benchmarks, each with --help of its own:", ""]
    said += [
        f"  ./scripts/bench {one:{max(map(len, COMMANDS))}}  {about}" for one, (_, about) in COMMANDS.items()
    ]
    print("\n".join(said), file=sys.stdout if asked_for_help else sys.stderr)
    return 0 if asked_for_help else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
