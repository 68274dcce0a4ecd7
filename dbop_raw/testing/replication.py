"""Standbys: how one is made, and how an old primary becomes one."""

from __future__ import annotations

import time
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dbop_raw.testing.errors import ServerError
from dbop_raw.testing.folders import own

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dbop_raw.testing.cluster import LocalServer, Place
    from dbop_raw.testing.server import Server

__all__ = ["base_backup", "drop_slot", "rewind"]

RELOAD_TIMEOUT = 10.0


def base_backup(primary: LocalServer, place: Place, name: str | None) -> str:
    """Copy a running server to the data directory of `place`, as its standby; return its slot's name."""
    slot = name or f"standby_{uuid.uuid4().hex[:12]}"
    arguments: tuple[str | Path, ...] = (
        "-D",
        place.data_dir,
        "-R",
        "-X",
        "stream",
        "-C",
        "-S",
        slot,
        "--checkpoint=fast",
        *place.sync,
    )
    try:
        primary.binaries.run("pg_basebackup", "-d", _conninfo(primary, slot), *arguments)
    except ServerError:
        drop_slot(primary, slot)  # it is made first, and would hold back the WAL for ever
        raise
    return slot


def drop_slot(primary: LocalServer, slot: str) -> None:
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


def rewind(target: LocalServer, source: Server) -> None:
    """Make a stopped old primary a standby of `source`."""
    data_dir, conninfo = target.place.data_dir, _conninfo(source, f"rewound_{target.port}")
    with _full_page_writes(source):
        # The source's control file has the new timeline only after its first checkpoint.
        source.sql("CHECKPOINT")
        # -R writes standby.signal and primary_conninfo.
        target.binaries.run(
            "pg_rewind", "-R", "--target-pgdata", data_dir, "--source-server", f"{conninfo} dbname=postgres",
            *target.place.sync,
        )  # fmt: skip
    configuration = data_dir / "postgresql.auto.conf"
    with configuration.open("a", encoding="utf-8") as file:
        # It came from the source, where it names a slot that only the *old* primary had.
        file.write("primary_slot_name = ''\n")
    own(configuration, target.binaries.account)


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
