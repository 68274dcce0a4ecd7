"""What a way of doing the work is, and whether its library is there."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal

from bench.peers.work import Row, Work

__all__ = ["Load", "Once", "Role", "Single", "Way", "missing", "version"]

Role = Literal["limit", "peer", "ours"]
Load = Callable[[Sequence[Row]], Awaitable[int]]
"""Writes rows in one transaction, sets bad ones aside, and gives their number."""
Once = Callable[[str, int], Awaitable[None]]
"""Does one operation: writes a text; its first so many tries meet a lock that is not free (55P03)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way to write many rows of which some are bad."""

    name: str
    role: Role
    note: str
    """How the library is used, for the report."""
    open: Callable[[str, Work], AbstractAsyncContextManager[Load]]
    """From a DSN: connect, give the `Load`, disconnect."""
    needs: tuple[str, ...] = ()
    """Packages, as their registry calls them."""
    text: bool = False
    """It takes rows of text, as a CSV gives them."""
    only_good: bool = False
    """It can't set bad rows aside, so it is given none: a limit that nobody can reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """A way to do one operation with timeouts and retry."""

    name: str
    role: Role
    note: str
    open: Callable[[str], AbstractAsyncContextManager[Once]]
    needs: tuple[str, ...] = ()
    retries: bool = True
    """False: it is a limit with neither timeouts nor retry."""


def missing(needs: Sequence[str]) -> str | None:
    """Why a way can't be measured here; None when it can."""
    absent = [package for package in needs if version(package) is None]
    return f"not installed: {', '.join(absent)} (pip install 'dbop-raw[peers]')" if absent else None


def version(package: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
