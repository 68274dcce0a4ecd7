"""What an engine, its sessions and their scopes all need, in one frozen object that is handed down.

It is made once, by the engine, and no constructor repeats its fields. Time and randomness are in it, so that
a test passes its own instead of patching a module.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dbop_raw.driver.underway import now
from dbop_raw.events import Event, Observer, notify
from dbop_raw.failure.policy import RetryBudget
from dbop_raw.failure.sqlstate import Rule

__all__ = ["DEFAULTS", "Bounds", "Settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How long clean-up and answers may take, in seconds."""

    cleanup: float = 2.0
    """The longest that ROLLBACK, ROLLBACK TO or a release may take before the connection is thrown away."""
    grace: float = 0.2
    """The same, once a deadline is over or a server did not keep its own timeout: it hangs, most likely."""
    commit: float = 5.0
    """How long a cancelled caller waits for the answer to a COMMIT that is on its way."""
    answer: float = 30.0
    """A COMMIT that can be looked up counts as in doubt when its answer is not here after so long: the line
    hangs. Without a deadline only; with one, half of the time left is for the look-up."""
    resolve: float = 15.0
    """A COMMIT in doubt is looked up for so long, or until the run's deadline."""
    reset: float = 0.05
    """A release may take so long even where no time is left: a server that is well resets at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all parts of one engine share."""

    observer: Observer | None = None
    """Gets an event for all that happens; None: no event is made."""
    verdicts: Mapping[str, Rule] | None = None
    """Rows that win over the table of SQLSTATEs, as `normalise_overrides` gives them."""
    budget: RetryBudget | None = None
    """What all retries draw on; None: only the policies limit them."""
    clock: Callable[[], float] = now
    """The time in seconds that deadlines are instants of: the event loop's."""
    rng: Callable[[], float] = random.random
    """A float in [0, 1), for the jitter of delays."""
    bounds: Bounds = Bounds()

    def emit(self, event: Event) -> None:
        """Tell the observer. Callers test `observer` first, so that no event is made for nobody."""
        if self.observer is not None:
            notify(self.observer, event)


DEFAULTS = Settings()
"""For a scope that belongs to no engine: an operation that is called with a plain connection."""
