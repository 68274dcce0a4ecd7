"""A bar with the time that is left, as it was planned: on a terminal only; else a line now and then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

__all__ = ["Progress", "progress_bar", "silent"]

Progress = Callable[[float, str], None]
"""Told, after each step, of the seconds that it was planned to take, and what comes next."""

# Without a terminal, seconds between two lines.
QUIET = 30.0


class _Left(ProgressColumn):
    """Time left: what is planned, stretched as what was done so far took longer or shorter than planned."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """As minutes and seconds."""
        left = max(0.0, (task.total or 0.0) - task.completed)
        if task.completed and task.elapsed:
            # Within a step the bar stands still, and the clock does not.
            left = max(0.0, left * task.fields["pace"] - (time.monotonic() - task.fields["since"]))
        minutes, seconds = divmod(round(left), 60)
        return Text(f"{minutes}:{seconds:02d} left", style="cyan")


def silent(_seconds: float, _what: str) -> None:
    """Nobody wants to know."""


@contextlib.contextmanager
def progress_bar(total: float) -> Iterator[Progress]:
    """Show the progress of work that is planned to take `total` seconds; gives what is to be told of it.

    What is planned need not be seconds: what was done so far tells how long one of them takes.
    """
    console = Console(stderr=True)
    bar = Bar(
        BarColumn(),
        TextColumn("{task.description}"),
        _Left(),
        console=console,
        disable=not console.is_terminal,
    )
    began = said = time.monotonic()
    done = 0.0
    task = bar.add_task("", total=total, pace=1.0, since=began)

    def step(seconds: float, what: str) -> None:
        nonlocal done, said
        done += seconds
        now = time.monotonic()
        if seconds:
            bar.update(task, completed=done, pace=(now - began) / done, since=now)
        if what:
            bar.update(task, description=what)
            if not console.is_terminal and now - said > QUIET:
                said = now
                left = max(0.0, total - done) * (now - began) / done if done else total
                console.print(f"{what}; about {left:.0f} s left", highlight=False)

    with bar:
        yield step
