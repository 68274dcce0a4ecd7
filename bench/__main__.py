"""The benchmarks' command line: `python -m bench NAME …`, or `./scripts/bench NAME …`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

# A benchmark: the module whose `main(arguments)` gives the exit code, and a line about it. Imported when it
# is asked for, since each needs packages of its own.
COMMANDS = {
    "foundation": ("bench.foundation", "the timed figures of the foundation, each with its bound"),
    "pool": ("bench.pool", "how large a connection pool should be, for this server and this work"),
    "peers": ("bench.peers.command", "the same work by other libraries, and by ours"),
    "cost": ("bench.cost.command", "what the layer itself costs"),
    "quick": ("bench.quick", "all of them in tiny sizes, within two minutes: shows that each works"),
}
# Not for people: one measurement of a benchmark, in a process of its own.
INTERNAL = {"memory-child": "bench.memory"}


def usage() -> str:
    """What there is."""
    width = max(map(len, COMMANDS))
    lines = [f"  python -m bench {name:{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["benchmarks, each with --help of its own:", "", *lines])


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that is named first; the rest is for it."""
    name = arguments[0] if arguments else ""
    module = COMMANDS[name][0] if name in COMMANDS else INTERNAL.get(name)
    if module is None:
        asked_for_help = name in {"-h", "--help"}
        print(usage(), file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    run: Callable[[Sequence[str]], int] = importlib.import_module(module).main
    return run(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
