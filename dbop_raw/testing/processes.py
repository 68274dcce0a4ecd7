"""The processes of a server, and what its postmaster.pid says about them."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PidFile", "alive", "children", "read_pid_file", "send"]

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class PidFile:
    """The lines of postmaster.pid that matter here (LOCK_FILE_LINE_* in PostgreSQL's ``miscadmin.h``)."""

    pid: int
    port: int | None
    socket_dir: str
    ready: bool


def read_pid_file(data_dir: Path) -> PidFile | None:
    """Return what postmaster.pid says; ``None`` where there is none (or it is only being written)."""
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
    if PROC.joinpath("self", "stat").exists():
        return _state_and_parent(pid)[0] not in {"", "Z", "X"}
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def children(parent: int) -> list[int]:
    """Return the children of a process (a postmaster's are all of its backends)."""
    if PROC.joinpath("self", "stat").exists():
        pids = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
        return [pid for pid in pids if _state_and_parent(pid)[1] == parent]
    done = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True, timeout=10
    )
    pairs = [line.split() for line in done.stdout.splitlines()]
    return [int(pid) for pid, its_parent in pairs if int(its_parent) == parent]


def send(pid: int, signal: int) -> None:
    """Send a signal; a process that is gone already is no error."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal)


def _state_and_parent(pid: int) -> tuple[str, int]:
    """Return the state letter and the parent of a process, on Linux; ("", 0) where there is none."""
    try:
        text = PROC.joinpath(str(pid), "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", 0
    # The second field is the program's name in parentheses, and may contain both.
    state, ppid = text.rpartition(")")[2].split()[:2]
    return state, int(ppid)
