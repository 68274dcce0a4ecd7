"""The processes of a server, and what its postmaster.pid says about them."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PidFile", "alive", "children", "postmaster", "send"]

PROC = Path("/proc")
HAS_PROC = PROC.joinpath("self", "stat").exists()


@dataclass(frozen=True, slots=True)
class PidFile:
    """The lines of postmaster.pid that matter here (LOCK_FILE_LINE_* in PostgreSQL's ``miscadmin.h``)."""

    pid: int
    port: int | None
    socket_dir: str
    ready: bool


def postmaster(data_dir: Path) -> PidFile | None:
    """Return what is known of the server that runs in a data directory; ``None`` where none does.

    The file alone proves nothing: it outlives a server that was killed, and its number may be another
    program's by now.
    """
    status = _read_pid_file(data_dir)
    if status is None or not alive(status.pid):
        return None
    if HAS_PROC and not _stat(status.pid)[0].startswith("post"):
        return None
    return status


def _read_pid_file(data_dir: Path) -> PidFile | None:
    """Return what postmaster.pid says; ``None`` where there is none, or where it is only being written."""
    try:
        lines = (data_dir / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        pid = int(lines[0])
        port = int(lines[3]) if len(lines) > 3 else None  # noqa: PLR2004 - line numbers
    except (OSError, ValueError, IndexError):
        return None
    lines += [""] * 8
    return PidFile(pid, port, lines[4], ready=lines[7].strip() == "ready")


def alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie, which nobody has waited for yet, does not."""
    if HAS_PROC:
        return _stat(pid)[1] not in {"", "Z", "X"}
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def children(parent: int) -> list[int]:
    """Return the children of a process (a postmaster's are all of its backends)."""
    if HAS_PROC:
        pids = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
        return [pid for pid in pids if _stat(pid)[2] == parent]
    command = ["ps", "-A", "-o", "pid=,ppid="]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
    pairs = [line.split() for line in done.stdout.splitlines()]
    return [int(pid) for pid, its_parent in pairs if int(its_parent) == parent]


def send(pid: int, signal: int) -> None:
    """Send a signal; a process that is gone already is no error."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal)


def _stat(pid: int) -> tuple[str, str, int]:
    """Return the name, the state letter and the parent of a process, on Linux; empty where there is none."""
    try:
        text = PROC.joinpath(str(pid), "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", "", 0
    # The second field is the program's name in parentheses, and may contain both.
    head, _, tail = text.rpartition(")")
    state, ppid = tail.split()[:2]
    return head.partition("(")[2], state, int(ppid)
