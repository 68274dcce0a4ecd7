"""Where figures come from: commit, versions, processor, server. Nothing of a DSN, no folder of a machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg

from bench.pool.about import cpu_model, server_settings

__all__ = ["RESULTS", "header", "header_markdown"]

_ROOT = Path(__file__).resolve().parent.parent
RESULTS = _ROOT / "bench" / "results"


async def header(
    dsn: str, packages: Sequence[str], options: Mapping[str, Any], *, embedded: bool
) -> dict[str, Any]:
    """What a reader has to know of the figures below it."""
    conn = await asyncpg.connect(dsn)
    try:
        server = await server_settings(conn)
    finally:
        await conn.close()
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {package: found for package in packages if (found := _version(package))},
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.release()}",
        },
        "server": {"kind": "embedded, on the same machine" if embedded else "named by --dsn", **server},
        "options": dict(options),
    }


def header_markdown(about: Mapping[str, Any]) -> str:
    """The same, for people."""

    def listed(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items())

    machine = about["machine"]
    return "\n".join(
        (
            f"- {about['when']}, commit {about['commit']}, Python {about['python']}",
            f"- {machine['cpu']}, {machine['cores']} cores, {machine['system']}",
            f"- {listed(about['packages'])}",
            f"- PostgreSQL: {listed(about['server'])}",
            f"- options: {listed(about['options'])}",
            "",
        )
    )


def _version(package: str) -> str | None:
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
    done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
