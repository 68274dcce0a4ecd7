"""An observer that logs with structlog.

It never configures structlog: how a line looks and where it goes is the user's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import structlog

from dbop_raw import events
from dbop_raw.events import Event

__all__ = ["StructlogObserver"]

# What a person should see by default; all else is for following one call, and logs at debug.
_WARNINGS: tuple[type[Event], ...] = (
    events.AcquireTimedOut,
    events.Shed,
    events.LeakSuspected,
    events.PoolExpired,
    events.RetryRefused,
    events.CommitInDoubt,
    events.CommitResolved,
)


class StructlogObserver:
    """`Engine(pool, observer=StructlogObserver())`.

    Each event is a line, its name the message and its fields the keys.

    `logger`: any structlog logger; None takes `structlog.get_logger("dbop_raw")`.
    """

    def __init__(self, logger: Any = None) -> None:
        self._logger = structlog.get_logger("dbop_raw") if logger is None else logger

    def __call__(self, event: Event) -> None:
        """Log it."""
        log = self._logger.warning if isinstance(event, _WARNINGS) else self._logger.debug
        log(event.name, **{field.name: getattr(event, field.name) for field in dataclasses.fields(event)})
