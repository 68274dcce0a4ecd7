"""SIGTERM as orderly as Ctrl-C: what a process manager sends must lose neither rejects nor the summary."""

from __future__ import annotations

import asyncio
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

__all__ = ["Sigterm"]


class Sigterm:
    """Cancels a task at the first SIGTERM; more of them change nothing, for it is stopping already.

    A context manager, around all up to the last line that is printed. Where somebody else handles the signal,
    or has it ignored, it does nothing.
    """

    def __init__(self) -> None:
        self.received = False
        """Was one received?"""
        self._installed = False
        self._task: asyncio.Task[object] | None = None

    def __enter__(self) -> Self:
        ours = threading.current_thread() is threading.main_thread()
        if ours and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._receive)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def cancels_this_task(self) -> None:
        """Say which task it is; called in it."""
        self._task = asyncio.current_task()
        if self.received:
            self._cancel()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        first, self.received = not self.received, True
        if first:
            self._cancel()

    def _cancel(self) -> None:
        if self._task is not None and not self._task.done():
            # Not at once: a signal comes between any two instructions, also of the event loop's own. This
            # wakes the loop as well.
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)
