"""Standbys of a local server: how one is made and promoted, and how an old primary becomes one.

Only servers made of processes of this machine can do it (:class:`LocalServer`): pg_basebackup and pg_rewind
need their data directories. For the fault tests of fail-over, and for the engine's tests of a lost primary.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dbop_raw.testing import Server, ServerError
from dbop_raw.testing.folders import free_port, own, temporary_root
from dbop_raw.testing.local import LocalServer, Place

__all__ = ["promote", "rewind", "standby"]

RELOAD_TIMEOUT = 10.0


@contextmanager
def standby(primary: LocalServer, *, name: str | None = None) -> Iterator[LocalServer]:
    """Give a streaming hot standby, made by pg_basebackup; at the end, it and its slot are removed.

    Args:
        primary: A running server.
        name: The standby's replication slot and its ``application_name``; ``None`` makes up a unique one.

    Raises:
        ServerError: It could not be copied, or did not start; the message has the output or the log.

    """
    with temporary_root() as root:
        own(root, primary.binaries.account)
        place = Place(root, root / "data", primary.place.settings, primary.place.durable, keep=False)
        made = LocalServer(primary.binaries, place, free_port())
        slot = _base_backup(primary, place, name)
        try:
            made.start_first()
            yield made
        finally:
            made.discard("immediate")
            _drop_slot(primary, slot)


def promote(server: Server) -> None:
    """Make a standby a primary, and wait until it takes writes.

    Raises:
        ServerError: It is no standby, or not done within 25 seconds.

    """
    if server.sql("SELECT pg_promote(wait => true, wait_seconds => 25)") is not True:
        raise ServerError(f"{server} was not promoted within 25 s; its log ends:\n{server.log_tail()}")


def rewind(old: LocalServer, source: Server) -> None:
    """Turn an old primary into a standby of `source` by pg_rewind; it is stopped first, and left stopped.

    Args:
        old: The old primary.
        source: The promoted server, running.

    Raises:
        ServerError: pg_rewind refused; the message has its output.

    """
    old.stop()
    data_dir, conninfo = old.place.data_dir, _conninfo(source, f"rewound_{old.port}")
    with _full_page_writes(source):
        # The source's control file has the new timeline only after its first checkpoint.
        source.sql("CHECKPOINT")
        # -R writes standby.signal and primary_conninfo.
        old.binaries.run(
            "pg_rewind", "-R", "--target-pgdata", data_dir, "--source-server", f"{conninfo} dbname=postgres",
            *old.place.sync,
        )  # fmt: skip
    configuration = data_dir / "postgresql.auto.conf"
    with configuration.open("a", encoding="utf-8") as file:
        # It came from the source, where it names a slot that only the *old* primary had.
        file.write("primary_slot_name = ''\n")
    own(configuration, old.binaries.account)


def _base_backup(primary: LocalServer, place: Place, name: str | None) -> str:
    """Copy a running server to the data directory of `place`, as its standby; return its slot's name."""
    slot = name or f"standby_{uuid.uuid4().hex[:12]}"
    arguments: tuple[str | Path, ...] = (
        *("-D", place.data_dir),
        *("-R", "-X", "stream", "-C", "-S", slot),
        "--checkpoint=fast",
        *place.sync,
    )
    try:
        primary.binaries.run("pg_basebackup", "-d", _conninfo(primary, slot), *arguments)
    except ServerError:
        _drop_slot(primary, slot)  # it is made first, and would hold back the WAL for ever
        raise
    return slot


def _drop_slot(primary: LocalServer, slot: str) -> None:
    """Drop a replication slot and end whoever uses it; nothing where the server does not run or has none."""
    if primary.pid is None:
        return
    literal = "'" + slot.replace("'", "''") + "'"
    found = f"FROM pg_replication_slots WHERE slot_name = {literal}"
    try:
        primary.sql(f"SELECT pg_terminate_backend(active_pid, 5000) {found} AND active")
        primary.sql(f"SELECT pg_drop_replication_slot(slot_name) {found}")
    except ServerError:
        # The server may be paused, or have been made something else by the test: it is the test's by now.
        return


@contextmanager
def _full_page_writes(source: Server) -> Iterator[None]:
    """Turn them on for a while: pg_rewind refuses a source without, as one that is not durable is."""
    if source.sql("SHOW full_page_writes") == "on":
        yield
        return
    source.sql("ALTER SYSTEM SET full_page_writes = on")
    try:
        source.sql("SELECT pg_reload_conf()")
        deadline = time.monotonic() + RELOAD_TIMEOUT
        while source.sql("SHOW full_page_writes") != "on":
            if time.monotonic() > deadline:
                raise ServerError(f"{source} did not reload its configuration within {RELOAD_TIMEOUT:g} s")
        yield
    finally:
        source.sql("ALTER SYSTEM RESET full_page_writes")
        source.sql("SELECT pg_reload_conf()")


def _conninfo(server: Server, application: str) -> str:
    return f"host={server.host} port={server.port} user={server.user} application_name={application}"
