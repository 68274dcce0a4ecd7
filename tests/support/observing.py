"""An observer that keeps what it is told."""

from __future__ import annotations

from typing import Any

from dbop_raw import Event
from dbop_raw.events import Retried

__all__ = ["Seen"]


class Seen:
    """An observer for an engine.

    Attributes:
        events: What it was told, in order.

    """

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Event]) -> list[Any]:
        """Return the events of exactly this kind."""
        return [event for event in self.events if type(event) is kind]

    def levels(self) -> list[str]:
        """Return the level of each retry."""
        return [event.level for event in self.of(Retried)]
