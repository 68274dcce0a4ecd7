"""Temporary folders and free ports for servers."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dbop_raw.testing.processes import postmaster

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dbop_raw.testing.binaries import Account

__all__ = ["Root", "free_port", "own", "port_is_free", "remove_root", "temporary_root"]

PREFIX = "dbop_raw-"
LOCK = "lock"
# The path of a Unix socket is 107 bytes at most (sun_path); ours ends in /.s.PGSQL.12345.lock
LONGEST = 80


class Root:
    """A temporary folder with a path short enough for a Unix socket, which is removed even if we are killed.

    A lock in it, held by this process, says that it is in use; where the process was killed, the next one
    that makes a root removes it.

    Args:
        lasting: It is to outlive this process, so nobody may think that it was left behind.

    """

    def __init__(self, *, lasting: bool = False) -> None:
        base = tempfile.gettempdir()
        base = base if len(base) < LONGEST else "/tmp"  # noqa: S108
        _sweep(Path(base))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        self._lock = None if lasting else _hold(self.path)

    def remove(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_root(path: Path) -> None:
    """Remove a folder that a :class:`Root` of another process made; any other is left alone."""
    if path.name.startswith(PREFIX):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def temporary_root() -> Iterator[Path]:
    """Give a root's path, and remove it at the end, come what may."""
    root = Root()
    try:
        yield root.path
    finally:
        root.remove()


def _hold(path: Path) -> int:
    """Lock the folder; the lock goes with the process."""
    # Renamed when it is locked, so that nobody else finds it unlocked.
    lock = os.open(path / "lock.new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (path / "lock.new").rename(path / LOCK)
    return lock


def _sweep(base: Path) -> None:
    """Remove the roots of processes that were killed, once their server has ended."""
    for path in base.glob(f"{PREFIX}*"):
        try:
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # somebody else's, or one that lasts
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if postmaster(path / "data") is None:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass  # in use
        finally:
            os.close(lock)


def own(path: Path, account: Account | None) -> None:
    """Hand a file or folder to the account that the server runs as."""
    if account is not None:
        os.chown(path, account.uid, account.gid)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens at just now; somebody may a moment later."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Tell whether nobody listens at a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
