"""A synchronous standby for a test: commits wait for it, it can be cut off from its primary and let back."""

from __future__ import annotations

from dbop_raw.testing import Server

__all__ = ["cut_off", "let_back", "wait_for_standby", "who_waits_for_it"]

_WHILE = (
    "DO $$BEGIN FOR i IN 1..1000 LOOP IF NOT {} THEN RETURN; END IF; "
    "PERFORM pg_sleep(0.01); PERFORM pg_stat_clear_snapshot(); END LOOP; RAISE 'not within 10 s'; END$$"
)


def wait_for_standby(primary: Server, name: str) -> None:
    """Let commits wait for the standby of that name from now on; it has all that came before."""
    primary.sql(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    primary.sql("SELECT pg_reload_conf()")
    _until_in_sync(primary)


def cut_off(primary: Server, standby: Server) -> str:
    """Let the standby have all up to now, and nothing more; gives what `let_back` takes."""
    conninfo: str = standby.sql("SHOW primary_conninfo")
    end = primary.sql("SELECT pg_current_wal_lsn()::text")
    standby.sql(_WHILE.format(f"pg_last_wal_replay_lsn() < '{end}'"))
    standby.sql("ALTER SYSTEM SET primary_conninfo = ''")
    standby.sql("SELECT pg_reload_conf()")
    standby.sql(_WHILE.format("EXISTS (SELECT FROM pg_stat_wal_receiver)"))
    return conninfo


def let_back(primary: Server, standby: Server, conninfo: str) -> None:
    """Let the standby have what it missed, and all that comes."""
    quoted = conninfo.replace("'", "''")
    standby.sql(f"ALTER SYSTEM SET primary_conninfo = '{quoted}'")
    standby.sql("SELECT pg_reload_conf()")
    _until_in_sync(primary)


def _until_in_sync(primary: Server) -> None:
    primary.sql(
        _WHILE.format(
            "NOT EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = 'sync' AND state = 'streaming')"
        )
    )


def who_waits_for_it(primary: Server) -> list[int]:
    """Give the processes whose COMMIT waits for a standby now."""
    found: list[int] | None = primary.sql(
        "SELECT array_agg(pid) FROM pg_stat_activity "
        "WHERE wait_event = 'SyncRep' AND backend_type = 'client backend'"
    )
    return found or []
