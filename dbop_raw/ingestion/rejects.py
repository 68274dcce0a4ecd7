"""Where an ingest puts the items that could not be written: a protocol, and a file of JSON lines.

A reject must not be lost because it is odd: what JSON has no form for is kept as its text.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import asyncpg
from anyio import to_thread

from dbop_raw.failure.errors import PolicyError

__all__ = ["JsonlRejects", "Reject", "RejectSink", "text_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """An item that was not written, and why."""

    index: int
    """Its place in the source, from 0."""
    item: Any = field(repr=False)
    sqlstate: str | None
    """None where the client found it."""
    condition: str
    """PostgreSQL's name of the SQLSTATE, or the name of the Python exception."""
    message: str
    """What the server or the driver said; it may quote values of the item."""
    constraint: str | None = None


class RejectSink(Protocol):
    """What `ingest(rejects=…)` takes."""

    async def write(self, rejects: Sequence[Reject]) -> None:
        """Keep them: when this returns they are safe.

        Called once for each chunk that has any, from several tasks but one at a time.

        Args:
            rejects: Those of one chunk, in the order of the source.
        """
        ...


class JsonlRejects:
    """Appends one JSON object a line: index, item, sqlstate, condition, message, constraint.

    The file is made for its owner alone (mode 0600), since it holds the items as they came. Whole lines are
    appended in one write; a last line that a crash cut short is ended first, so that the next one stands by
    itself.
    """

    def __init__(self, path: str | os.PathLike[str], *, sync: bool = False) -> None:
        """Name the file; it is opened with the first reject.

        Args:
            path: A file in a folder that is there.
            sync: Each write waits for the disk.

        Raises:
            PolicyError: The path is a folder, or in none.
        """
        self.path = Path(path)
        self._sync = sync
        if self.path.is_dir():
            raise PolicyError(f"rejects file {str(self.path)!r} is a folder: name a file in it")
        if not self.path.parent.is_dir():
            raise PolicyError(
                f"rejects file {str(self.path)!r} can't be made: there is no folder {str(self.path.parent)!r}"
            )

    def __repr__(self) -> str:
        return f"JsonlRejects({str(self.path)!r})"

    async def write(self, rejects: Sequence[Reject]) -> None:
        """Append them.

        Args:
            rejects: What to append, a line each.

        Raises:
            OSError: The file can't be written (a full disk, say); the error names it.
        """
        lines = "".join(map(_line, rejects))
        # Not to be abandoned by a cancellation: half a line would be lost.
        await to_thread.run_sync(self._append, lines.encode())

    def _append(self, data: bytes) -> None:
        try:
            self._append_whole(data)
        except OSError as exc:
            # Of a write, Python's own error names no file.
            what = f"{exc.strerror}: rejects can't be kept; make room, or name a file in another place"
            raise OSError(exc.errno, what, str(self.path)) from exc

    def _append_whole(self, data: bytes) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data
            while data:
                data = data[os.write(descriptor, data) :]
            if self._sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def text_of(value: object) -> str:
    """Give an object's text, or say what it is where it has none: an item or an error of the user's own."""
    try:
        return str(value)
    except Exception as exc:  # noqa: BLE001 - it may raise what it likes
        return f"a {type(value).__name__} that can't be printed: {type(exc).__name__}"


def _line(reject: Reject) -> str:
    fields = {
        "index": reject.index,
        "item": reject.item,
        "sqlstate": reject.sqlstate,
        "condition": reject.condition,
        "message": reject.message,
        "constraint": reject.constraint,
    }
    try:
        return _encode(fields)
    except Exception:  # noqa: BLE001 - NaN, a key that is no text, a circle, a property that raises
        return _encode(fields | {"item": _presentable(reject.item)})


def _presentable(item: object) -> object:
    """Make of an item what JSON can hold: it must not be lost for want of a form."""
    try:
        _encode(numbered := _with_words(item))
    except Exception:  # noqa: BLE001 - as above
        return text_of(item)
    return numbered


def _with_words(value: Any) -> Any:
    """Write the numbers that JSON does not know as PostgreSQL does."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, (list, tuple)):
        return [_with_words(one) for one in value]
    if isinstance(value, dict):
        return {key: _with_words(one) for key, one in value.items()}
    if isinstance(value, asyncpg.Record):
        return _with_words(dict(value.items()))
    return value


def _plain(value: object) -> object:
    """Give what JSON has no form for: bytes as hex, a record by its columns, the rest as its text."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "\\x" + bytes(value).hex()
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, asyncpg.Record):
        return dict(value.items())
    return text_of(value)


def _encode(fields: object) -> str:
    # Plain ASCII: a lone surrogate is escaped, and no line end of another alphabet ends the line.
    return json.dumps(fields, ensure_ascii=True, allow_nan=False, default=_plain) + "\n"
