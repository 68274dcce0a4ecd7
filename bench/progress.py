"""A bar with the time that is left: on a terminal only; else a line now and then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

Progress = Callable[[float, str], None]
"""Told, after each step, of the seconds that it was planned to take, and what comes next."""

# Without a terminal, seconds between two lines.
QUIET = 30.0


@contextlib.contextmanager
def progress_bar(total: float) -> Iterator[Progress]:
    """Show the progress of work that is planned to take `total` seconds, or any other measure of steps."""
    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    # A step may take minutes: what is left is told from all that was done.
    bar = Bar(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=86_400)
    task = bar.add_task("", total=total)
    said = time.monotonic()

    def step(done: float, what: str) -> None:
        nonlocal said
        bar.update(task, advance=done, description=what or None)
        if what and not console.is_terminal and time.monotonic() - said > QUIET:
            said = time.monotonic()
            left = bar.tasks[0].time_remaining
            console.print(what if left is None else f"{what}; about {left:.0f} s left", highlight=False)

    with bar:
        yield step
