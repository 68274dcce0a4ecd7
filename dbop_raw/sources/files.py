"""Input files: opened by their ending, unpacked on the way, and how far their reading has come.

What is in them is not looked at here: see the module of each format.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

__all__ = ["READ_ERRORS", "STDIN", "Input", "SourceError", "open_input", "unpacked"]

STDIN = "-"
"""The path that means standard input."""

READ_ERRORS = (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError)
"""What reading a file may raise, packed files among them; a zip that needs a password is a `RuntimeError`."""

# Bytes that are unpacked at a time.
_BUFFER = 1 << 18
# How many names a message lists.
_MANY = 10


class SourceError(Exception):
    """The input can't be used; the message is one sentence for a person, and names the file."""


@dataclass(slots=True)
class Input:
    """An open file of bytes, and how far its reading has come."""

    name: str
    """For messages."""
    data: IO[bytes]
    """What is in it, unpacked."""
    size: int | None = None
    """Bytes of the file as it lies there (packed, if it is); None where that is not known."""
    may_wait: bool = False
    """Reading may take as long as it likes (a pipe), so it is done in a thread."""
    _packed: IO[bytes] | None = None
    _others: list[IO[bytes] | zipfile.ZipFile] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Bytes of the file that were read so far, of `size`."""
        return 0 if self._packed is None or self._packed.closed else self._packed.tell()

    def is_of(self, path: Path) -> bool:
        """Is it read from the regular file at `path`, by whatever name?"""
        try:
            status = os.fstat((self._packed or self.data).fileno())
            return stat.S_ISREG(status.st_mode) and os.path.samestat(status, path.stat())
        except OSError:
            # It has no descriptor (bytes in memory), or there is no file at the path.
            return False

    def close(self) -> None:
        """Close it. Not where a thread may still wait for a read of it: closing would wait for that."""
        if self.may_wait:
            return
        for one in (self.data, *self._others):
            one.close()


def open_input(path: str) -> Input:
    """Open a file: `.gz` as gzip, `.zip` as the one file in it, `-` as standard input, else as it is.

    Args:
        path: The file's path, or `STDIN`.

    Returns:
        The open input; the caller closes it.

    Raises:
        SourceError: It is missing, can't be read, or is a zip of none or several files.
    """
    if path == STDIN:
        # A file object of our own: a thread may be left in the middle of a read of it when the process ends,
        # and the interpreter's own sys.stdin would be locked then.
        return Input("standard input", open(0, "rb", closefd=False), may_wait=True)
    try:
        packed = open(path, "rb")  # noqa: PTH123, SIM115 - Input closes it
        status = os.fstat(packed.fileno())
    except OSError as exc:
        raise SourceError(f"{path} can't be read: {exc.strerror or exc}") from exc
    plain = stat.S_ISREG(status.st_mode)
    source = unpacked(path, packed, status.st_size if plain else None)
    source.may_wait = not plain
    return source


def unpacked(name: str, packed: IO[bytes], size: int | None) -> Input:
    """Look inside of an open file, by the ending of its name.

    Args:
        name: The file's name; its ending says how it is packed.
        packed: Its bytes; closed with the input that is made of it, or here where that fails.
        size: How many bytes they are, where that is known.

    Returns:
        The input, unpacked as it is read.

    Raises:
        SourceError: It is a zip of none or several files, or no zip at all.
    """
    ending = os.path.splitext(name)[1].lower()  # noqa: PTH122 - no path: it may be a name in an archive
    if ending == ".gz":
        data = io.BufferedReader(gzip.GzipFile(fileobj=packed, mode="rb"), _BUFFER)
        return Input(name, data, size, _packed=packed, _others=[packed])
    if ending == ".zip":
        return _only_member(name, packed, size)
    return Input(name, packed, size, _packed=packed)


def _only_member(name: str, packed: IO[bytes], size: int | None) -> Input:
    try:
        archive = zipfile.ZipFile(packed)
        members = [info.filename for info in archive.infolist() if not info.is_dir()]
        data = archive.open(members[0]) if len(members) == 1 else None
    except READ_ERRORS as exc:
        packed.close()
        raise SourceError(f"{name} can't be read as a zip: {exc}") from exc
    if data is None:
        packed.close()
        found = ", ".join(members[:_MANY]) or "none"
        more = f", and {len(members) - _MANY} more" if len(members) > _MANY else ""
        raise SourceError(f"{name} must have exactly one file in it, and has: {found}{more}")
    buffered = io.BufferedReader(data, _BUFFER)  # type: ignore[type-var]
    return Input(f"{name}:{members[0]}", buffered, size, _packed=packed, _others=[archive, packed])
