"""A PostgreSQL server made of processes of this machine: how it is configured, started, broken and ended.

The server's life is followed by its processes and its ``postmaster.pid``, not by connections: a test may have
taken them all, or have stopped the server in the middle of one.
"""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dbop_raw.testing import processes
from dbop_raw.testing.binaries import launch
from dbop_raw.testing.errors import ServerError
from dbop_raw.testing.folders import free_port, own, port_is_free
from dbop_raw.testing.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from dbop_raw.testing.binaries import Binaries
    from dbop_raw.testing.server import StopMode

__all__ = ["POLL", "START_TIMEOUT", "STOP_TIMEOUT", "USER", "LocalServer", "Place"]

START_TIMEOUT = 30.0
STOP_TIMEOUT = 30.0
POLL = 0.005

PORT_TRIES = 5
SETTINGS_FILE = "dbop_raw.conf"
INCLUDE = f"include_if_exists = '{SETTINGS_FILE}'"
USER = "postgres"
HOST = "127.0.0.1"
STOP_SIGNALS: Mapping[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}

DEFAULTS = {
    "max_connections": "100",
    "wal_level": "replica",
    "wal_log_hints": "on",  # for pg_rewind
    "max_wal_senders": "10",
    "max_replication_slots": "10",
    "hot_standby": "on",
    "lc_messages": "C",
    "logging_collector": "off",
}
# synchronous_commit stays on: what COMMIT waits for is part of what a test looks at.
NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where the parts of a server are, and how it is to live.

    Attributes:
        root: A short folder for its socket, its log and (where needed) a copy of the programs.
        data_dir: Its data directory.
        settings: For its configuration file.
        durable: Whether it may lose data when the machine crashes.
        keep: Whether it outlives this process.

    """

    root: Path
    data_dir: Path
    settings: Mapping[str, str]
    durable: bool
    keep: bool

    @property
    def log(self) -> Path:
        """The server's log: next to its data, but a kept server's inside, where the next process finds it."""
        return self.data_dir / "dbop_raw.log" if self.keep else self.root / "server.log"

    @property
    def sync(self) -> tuple[str, ...]:
        """The option for initdb, pg_basebackup and pg_rewind."""
        return () if self.durable else ("--no-sync",)


class LocalServer(Server):
    """A server whose processes run on this machine, by the same user (or by root)."""

    kind = "the local server"

    def __init__(self, binaries: Binaries, place: Place, port: int) -> None:
        super().__init__(HOST, port, USER, data_dir=place.data_dir)
        self.binaries = binaries
        self.place = place
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the postmaster, while it runs."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None
        status = processes.postmaster(self.place.data_dir)
        return None if status is None else status.pid

    def start(self) -> None:
        """Start it and wait until it takes connections; nothing where it runs already.

        Raises:
            ServerError: It ended, or was not ready within 30 seconds.

        """
        if self.pid is not None:
            return
        self._write_settings()
        try:
            if self.place.keep:
                self._start_detached()
            else:
                self._start_child()
        except BaseException:
            self.kill()
            raise

    def _start_child(self) -> None:
        command: list[str | Path] = [
            self.binaries.path("postgres"),
            "-D",
            self.place.data_dir,
            *self._options(),
        ]
        self._process = launch(command, log=self.place.log, account=self.binaries.account)
        self._wait(self._is_ready, START_TIMEOUT, "was not ready")

    def _start_detached(self) -> None:
        """Start it by pg_ctl, which leaves it with no parent of ours, in a session of its own."""
        arguments = ("-D", self.place.data_dir, "-l", self.place.log, "-o", " ".join(self._options()))
        self._run("pg_ctl", *arguments, "-w", "-t", f"{START_TIMEOUT:g}", "start")

    def _options(self) -> tuple[str, ...]:
        """Return what no configuration file may change; no part of it has a space."""
        network = {"port": self.port, "listen_addresses": HOST, "unix_socket_directories": self.place.root}
        return tuple(part for name, value in network.items() for part in ("-c", f"{name}={value}"))

    def start_first(self) -> None:
        """Start it at a port that may be taken by somebody else in the meantime: then take another."""
        for _ in range(PORT_TRIES - 1):
            try:
                return self.start()
            except ServerError:
                if port_is_free(self.port):
                    raise
                self.port = free_port()
        return self.start()

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop it and wait until it is gone; nothing where it does not run. A paused one is resumed first.

        Args:
            mode: ``smart`` waits for the clients to go, ``fast`` rolls them back, ``immediate`` is a crash.

        Raises:
            ServerError: It was not gone within 30 seconds (``fast`` waits for a standby that is paused, for
            one).

        """
        if mode not in STOP_SIGNALS:
            raise ValueError(f"mode is one of {', '.join(STOP_SIGNALS)}, not {mode!r}")
        pid = self.pid
        if pid is None:
            return
        processes.send(pid, STOP_SIGNALS[mode])
        self.resume()
        self._wait(self._is_gone, STOP_TIMEOUT, f"was not gone after a stop ({mode})")

    def crash(self) -> None:
        """Stop it at once, with no checkpoint and no goodbye: its next start recovers from the WAL."""
        self.stop("immediate")

    def discard(self, mode: StopMode) -> None:
        """Stop it for good, by force where it does not obey: nothing may be left behind."""
        try:
            self.stop(mode)
        finally:
            self.kill()

    def kill(self) -> None:
        """End every process of it with SIGKILL; for clean-up, when it does not obey."""
        for pid in self._family():
            processes.send(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT)
            self._process = None

    def pause(self) -> None:
        """Freeze every process of it (SIGSTOP): connections stay open, and nothing answers."""
        if self.pid is None:
            raise ServerError(self._told("it does not run, so it can't be paused"))
        # The postmaster comes first, and from then on there are no new ones.
        for pid in self._family():
            processes.send(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on (SIGCONT)."""
        for pid in self._family():
            processes.send(pid, signal.SIGCONT)

    def kill_backend(self, pid: int, signal: int) -> None:
        """Send a signal to one process of the server.

        Args:
            pid: As ``pg_backend_pid()`` gives it.
            signal: Such as ``signal.SIGTERM`` (57P01), or ``SIGKILL`` (the whole server recovers).

        Raises:
            ServerError: That is no process of this server.

        """
        if pid not in self._family()[1:]:
            raise ServerError(f"{pid} is no backend of the server at {self.host}:{self.port}")
        processes.send(pid, signal)

    def log_tail(self, n: int = 20) -> str:
        """Return the last `n` lines of the server's log."""
        if not self.place.log.exists():
            return "(no log)"
        return "\n".join(self.place.log.read_text(encoding="utf-8", errors="replace").splitlines()[-n:])

    def bin(self, name: str) -> Path:
        """Return the path of a client program of this very version.

        Raises:
            ServerError: It is not part of this installation.

        """
        return self.binaries.path(name)

    def _family(self) -> list[int]:
        """Return the postmaster and its children; empty where it does not run."""
        pid = self.pid
        return [] if pid is None else [pid, *processes.children(pid)]

    def _is_ready(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            code = "?" if self._process is None else self._process.returncode
            raise ServerError(self._told(f"the server ended with {code} instead of starting"))
        status = processes.postmaster(self.place.data_dir)
        return status is not None and status.pid == self._process.pid and status.ready

    def _is_gone(self) -> bool:
        if self._process is not None:
            return self._process.poll() is not None
        return self.pid is None

    def _wait(self, done: Callable[[], bool], seconds: float, complaint: str) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise ServerError(self._told(f"the server {complaint} within {seconds:g} s"))
            time.sleep(POLL)

    def _run(self, name: str, *arguments: str | Path) -> str:
        try:
            return self.binaries.run(name, *arguments)
        except ServerError as exc:
            raise ServerError(self._told(str(exc))) from exc

    def _write_settings(self) -> None:
        """Write the settings anew: pg_rewind brings those of the other server along."""
        settings = DEFAULTS | ({} if self.place.durable else NOT_DURABLE) | dict(self.place.settings)
        lines = [f"{name} = '{value.replace(chr(39), chr(39) * 2)}'" for name, value in settings.items()]
        target = self.place.data_dir / SETTINGS_FILE
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")
        own(target, self.binaries.account)
        main = self.place.data_dir / "postgresql.conf"
        text = main.read_text(encoding="utf-8")
        if INCLUDE not in text:
            main.write_text(f"{text}\n{INCLUDE}\n", encoding="utf-8")
