"""A PgBouncer between a test and its server: Debian's, or whichever is on the PATH.

It can be killed and started again at its port, as no pooler of somebody else's may be.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from dbop_raw.testing import Server, ServerError, ServerUnavailable
from dbop_raw.testing.binaries import Account, account_for, launch
from dbop_raw.testing.folders import free_port, own, port_is_free, temporary_root

__all__ = ["PgBouncer", "PoolMode", "pgbouncer"]

PoolMode = Literal["session", "transaction", "statement"]

HOST = "127.0.0.1"
START_TIMEOUT = 10.0
POLL = 0.005
PORT_TRIES = 5


class PgBouncer:
    """A pooler that runs, and can be killed and started again.

    Attributes:
        host: The address it listens on.
        port: Its port; stays the same when it is started again.

    """

    def __init__(self, program: Path, root: Path, server: Server, settings: Mapping[str, str]) -> None:
        self.host = HOST
        self.port = free_port()
        self._program = program
        self._root = root
        self._server = server
        self._settings = dict(settings)
        self._account: Account | None = account_for(None)
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<PgBouncer {self.host}:{self.port}>"

    @property
    def dsn(self) -> str:
        """The server's DSN, pointed at the pooler; the database's name may be replaced in it."""
        return self.through(self._server.dsn)

    def through(self, dsn: str) -> str:
        """Return a DSN of the server (a URL), pointed at the pooler."""
        parts = urlsplit(dsn)
        account, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{account}{at}{self.host}:{self.port}"))

    def start(self) -> None:
        """Start it and wait until it listens; nothing where it runs already.

        Raises:
            ServerError: It ended, or did not listen within 10 seconds; the message has its log.

        """
        if self._process is not None and self._process.poll() is None:
            return
        command: list[str | Path] = [self._program, self._write_configuration()]
        self._process = launch(command, log=self._log, account=self._account)
        deadline = time.monotonic() + START_TIMEOUT
        while port_is_free(self.port):
            if self._process.poll() is not None:
                raise ServerError(f"pgbouncer ended with {self._process.returncode}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"pgbouncer did not listen within {START_TIMEOUT:g} s:\n{self.log_tail()}")
            time.sleep(POLL)

    def kill(self) -> None:
        """End it with SIGKILL: every connection through it is lost, on both sides."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(START_TIMEOUT)
            self._process = None

    def restart(self) -> None:
        """Kill it and start it again, at the same port."""
        self.kill()
        self.start()

    def log_tail(self, n: int = 20) -> str:
        """Return the last `n` lines of its log."""
        if not self._log.exists():
            return "(no log)"
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-n:])

    @property
    def _log(self) -> Path:
        return self._root / "pgbouncer.log"

    def _write_configuration(self) -> Path:
        users = self._root / "users.txt"
        users.write_text(f'"{self._server.user}" ""\n', encoding="utf-8")
        lines = [f"{name} = {value}" for name, value in (self._defaults(users) | self._settings).items()]
        target = f"* = host={self._server.host} port={self._server.port}"
        path = self._root / "pgbouncer.ini"
        text = "\n".join(["[databases]", target, "[pgbouncer]", *lines])
        path.write_text(text + "\n", encoding="utf-8")
        for file in (users, path):
            own(file, self._account)
        return path

    def _defaults(self, users: Path) -> dict[str, str]:
        return {
            "listen_addr": self.host,
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": str(users),
            "admin_users": self._server.user,
            # What drivers send at the start, and a transaction pooler can't keep.
            "ignore_startup_parameters": "extra_float_digits,search_path",
            "default_pool_size": "4",
            "max_client_conn": "100",
            "server_login_retry": "0.1",
        }

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


@contextmanager
def pgbouncer(
    server: Server, *, pool_mode: PoolMode = "transaction", settings: Mapping[str, str] | None = None
) -> Iterator[PgBouncer]:
    """Give a PgBouncer before `server`, and take it away at the end of the block.

    It trusts whoever comes as the server's user, and has no more than 4 connections to a database.

    Args:
        server: Where it leads.
        pool_mode: When a server's connection goes to another client.
        settings: For the section ``[pgbouncer]``, such as ``{"query_wait_timeout": "1"}``; they win over
            ours.

    Raises:
        ServerUnavailable: It is not installed; the message says what to install.
        ServerError: It did not start; the message has its log.

    """
    program = _program()
    with temporary_root() as root:
        pooler = PgBouncer(program, root, server, {"pool_mode": pool_mode} | dict(settings or {}))
        own(root, account_for(None))
        try:
            pooler.start_first()
            yield pooler
        finally:
            pooler.kill()


def _program() -> Path:
    # Debian keeps it where an ordinary user's PATH does not look.
    found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise ServerUnavailable(
            "pgbouncer is not on the PATH and not in /usr/sbin: install the package pgbouncer"
        )
    return Path(found)
