"""What can go wrong with a server for a test.

RuntimeError
├── ServerUnavailable    there is no PostgreSQL to be had here (a test would skip)
└── ServerError          there is one, and it did not do what it was told (a test fails)
"""

from __future__ import annotations

__all__ = ["ServerError", "ServerUnavailable"]


class ServerUnavailable(RuntimeError):
    """No PostgreSQL can be had here; the message says what was tried, and what to install or set."""


class ServerError(RuntimeError):
    """A server was there and did not do what it was told; the message ends with its log, if it has one."""
