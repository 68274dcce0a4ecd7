"""The types are part of the contract: mypy accepts what must pass, and rejects exactly what must not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = ("must_pass.py", "must_fail.py")


@pytest.fixture(scope="module")
def rejected() -> dict[str, dict[int, str]]:
    """By file and line, what mypy says; both files in one run, with this project's own settings."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--no-pretty"]
    command += ["--config-file", str(ROOT / "pyproject.toml"), "--hide-error-context", "--show-error-codes"]
    # The imported package is read for its types; what is wrong in it is not told here.
    done = subprocess.run(
        [*command, "--follow-imports=silent", *(str(HERE / name) for name in FILES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    found: dict[str, dict[int, str]] = {name: {} for name in FILES}
    for name, line, text in re.findall(r"^\S*?(\w+\.py):(\d+): error: (.*)$", done.stdout, re.MULTILINE):
        assert name in found, f"{name}:{line}: {text}"
        found[name].setdefault(int(line), text)
    return found


def marked(name: str) -> set[int]:
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return {number for number, line in enumerate(lines, 1) if "# E: " in line}


def test_what_must_pass_passes(rejected: dict[str, dict[int, str]]) -> None:
    assert rejected["must_pass.py"] == {}
    assert marked("must_pass.py") == set()


def test_exactly_the_marked_lines_are_rejected(rejected: dict[str, dict[int, str]]) -> None:
    found = rejected["must_fail.py"]
    accepted = marked("must_fail.py") - set(found)
    surplus = {line: text for line, text in found.items() if line not in marked("must_fail.py")}
    assert not accepted, f"lines of must_fail.py that mypy accepts: {sorted(accepted)}"
    assert not surplus
    assert len(found) > 40


def test_the_package_says_that_it_has_types() -> None:
    import dbop_raw  # noqa: PLC0415

    assert (Path(dbop_raw.__file__).parent / "py.typed").is_file()
