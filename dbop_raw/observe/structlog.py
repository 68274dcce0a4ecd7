"""An observer that logs each event with structlog.

It never configures structlog: what a line looks like and where it goes is decided by the application.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import structlog

from dbop_raw import events
from dbop_raw.events import Event

__all__ = ["StructlogObserver"]

# These tell an operator of trouble. The others are for following a single call, and log at debug level.
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
    """Logs every event of an engine: `Engine(pool, observer=StructlogObserver())`.

    The event's name (`pool.acquired`, say) is the log message, its fields are the keys. Trouble (a call that
    was shed, a retry that was refused, a COMMIT in doubt, …) is logged as a warning, all else at debug level.

    Args:
        logger: A structlog logger; None takes `structlog.get_logger("dbop_raw")`.
    """

    def __init__(self, logger: Any = None) -> None:
        self._logger = structlog.get_logger("dbop_raw") if logger is None else logger

    def __call__(self, event: Event) -> None:
        """Log the event."""
        log = self._logger.warning if isinstance(event, _WARNINGS) else self._logger.debug
        log(event.name, **{field.name: getattr(event, field.name) for field in dataclasses.fields(event)})
