"""Where a result comes from: commit, versions, machine, server. Nothing of a DSN, nor a machine's folder."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dbop_raw.sizing.options import Options

__all__ = ["about", "cpu_model", "server_settings"]

_PACKAGES = ("dbop-raw", "asyncpg", "anyio", "numpy", "matplotlib")
_SETTINGS = (
    "server_version",
    "shared_buffers",
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "wal_level",
    "max_connections",
)
_ROOT = Path(__file__).resolve().parents[2]


def about(options: Options, server: dict[str, str], load: float | None) -> dict[str, Any]:
    """The header of a result, from `server_settings`, and the machine's load before the run."""
    asked = asdict(options)
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
        "server": server,
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
    """The commit of this package's own checkout, with a + where there is more than was committed."""
    if not (_ROOT / ".git").exists():
        return "a release"
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--", ":!bench/results") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - it is git
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
