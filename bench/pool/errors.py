"""What a person who runs the benchmark did wrong, or what is wrong with the server they named."""

from __future__ import annotations

__all__ = ["BadOption"]


class BadOption(Exception):
    """An option, a file or a server that can't be used; the message is one sentence and shows no DSN."""
