"""An engine's settings as a test wants them: bounds in milliseconds, a clock and randomness of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dbop_raw import Engine

__all__ = ["with_bounds", "with_settings"]


def with_settings(engine: Engine, **changes: Any) -> Engine:
    """The same engine, with other settings than it makes for itself."""
    engine._capacity.settings = replace(engine._capacity.settings, **changes)
    return engine


def with_bounds(engine: Engine, **seconds: float) -> Engine:
    """The same engine, with other bounds for clean-up and answers."""
    return with_settings(engine, bounds=replace(engine.settings.bounds, **seconds))
