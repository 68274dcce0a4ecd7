"""Every block of code in the README runs; every command and file that it names is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dbop_raw.testing import Server

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROGRAMS = [text for language, text in BLOCKS if language == "python"]


def test_every_block_of_the_readme_is_of_a_kind_that_is_tested() -> None:
    assert PROGRAMS
    assert {language for language, _ in BLOCKS} <= {"python", "sh"}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_a_program_of_the_readme_runs(number: int, postgres_server: Server, tmp_path: Path) -> None:
    dsn = postgres_server.create_database()
    try:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", PROGRAMS[number]],
            cwd=tmp_path,
            env={**os.environ, "DATABASE_URL": dsn},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        postgres_server.drop_database(dsn)
    assert done.returncode == 0, done.stderr


def test_the_programs_have_no_line_that_hides_in_a_block_of_another_kind() -> None:
    shell = "\n".join(text for language, text in BLOCKS if language == "sh")
    assert "import " not in shell


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\./(scripts/\w+)", README))))
def test_the_script_is_there_and_can_be_run(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:tests|bench|dbop_raw)/[\w/.]+)`", README))))
def test_the_file_is_there(name: str) -> None:
    assert (ROOT / name).exists()
