"""Where figures come from: command, commit, versions, machine, server; nothing of a DSN or a folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from bench import ROOT, connected
from dbop_raw.sizing.origin import cpu_model, server_settings


async def header(
    bench: str, dsn: str, packages: Sequence[str], options: Mapping[str, Any], *, command: str, embedded: bool
) -> dict[str, Any]:
    """What a reader has to know of the figures below it."""
    async with connected(dsn) as conn:
        server = await server_settings(conn)
    return {
        "bench": bench,
        "command": command,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {package: found for package in packages if (found := version(package))},
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.release()}",
            "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        },
        "server": {"kind": "embedded, on the same machine" if embedded else "named by --dsn", **server},
        "options": dict(options),
    }


def version(package: str) -> str | None:
    """The installed version of a package, as its registry calls it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the checkout, with a + where there is more than was committed."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--", ":!bench/results") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
