"""Programs in another process that can import what this one can."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dbop_raw

__all__ = ["run_pytest", "run_python"]


def run_python(script: str, *, code: int = 0) -> str:
    """Run a script and return what it printed.

    Args:
        script: Python's source.
        code: What it is to end with; a signal is negative.

    """
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": _path()}, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout


def run_pytest(test_file: Path, **variables: str) -> str:
    """Run a file of tests with no plugin but ours, and return what pytest said.

    Args:
        test_file: The file.
        variables: For its environment.

    """
    options = ("-rs", "-p", "dbop_raw.testing.plugin", "-p", "no:cacheprovider")
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": _path()} | variables
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(test_file)],
        capture_output=True, text=True, check=False, env=environment, timeout=60,
    )  # fmt: skip
    return done.stdout + done.stderr


def _path() -> str:
    folder = str(Path(dbop_raw.__file__).parents[1])
    return os.pathsep.join([folder, *filter(None, sys.path)])
