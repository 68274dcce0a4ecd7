"""Retry policies for tests: in milliseconds, or as patient as an outage takes."""

from __future__ import annotations

from dbop_raw import RetryPolicy

__all__ = ["QUICK"]

QUICK = RetryPolicy(attempts=3, first_delay=0.001, max_delay=0.01)
"""Three attempts, at once."""
