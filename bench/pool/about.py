"""Where a result comes from: commit, versions, machine, server. Nothing of the DSN."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.pool.options import Options

__all__ = ["about", "cpu_model", "load_now", "server_settings", "unquiet"]

_PACKAGES = ("dbop-raw", "asyncpg", "anyio", "numpy", "scipy", "hdrhistogram", "matplotlib")
_SETTINGS = (
    "server_version",
    "shared_buffers",
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "wal_level",
    "max_connections",
)
# A load of less than this a core is a quiet machine.
QUIET = 0.5
_ROOT = Path(__file__).resolve().parent.parent.parent


def about(options: Options, server: dict[str, str], load: float | None) -> dict[str, Any]:
    """The header of a result, from `server_settings`, and from `load_now` before the run."""
    asked = asdict(options)
    # Neither the DSN nor a folder of this machine belongs in a result that others read.
    for private in ("dsn", "out"):
        del asked[private]
    if options.workload.endswith(".sql"):
        asked["workload"] = Path(options.workload).name
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "machine": {
            "load_before": load,
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.release()}",
        },
        "server": {"kind": "named by --dsn" if options.dsn else "embedded, on the same machine", **server},
        "options": asked,
    }


async def server_settings(conn: Any) -> dict[str, str]:
    """The settings that matter to a reader, as the server has them now."""
    rows = await conn.fetch(
        "SELECT name, pg_catalog.current_setting(name) AS value FROM pg_catalog.pg_settings "
        "WHERE name = ANY($1::text[])",
        list(_SETTINGS),
    )
    found = {row["name"]: row["value"] for row in rows}
    return {name: found[name] for name in _SETTINGS if name in found}


def load_now() -> float | None:
    """The machine's load over the last minute; None where it has no such number."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def unquiet(load: float | None) -> tuple[str, ...]:
    """A warning where the machine was busy with something else before the run."""
    cores = os.cpu_count() or 1
    if load is None or load <= cores * QUIET:
        return ()
    return (f"The machine was not quiet: its load was {load:g} on {cores} cores before this run began.",)


def cpu_model() -> str:
    """The processor's name, or what kind it is."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the checkout, with a + where there is more than was committed."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--", ":!bench/results") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
