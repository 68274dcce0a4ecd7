"""The SQL files of batches: each explains itself, and only its SQL is sent."""

from __future__ import annotations

import re
import string
from importlib import resources

import pytest

from dbop_raw.batching.sql import read

FOLDER = resources.files("dbop_raw.batching.sql")
NAMES = sorted(file.name.removesuffix(".sql") for file in FOLDER.iterdir() if file.name.endswith(".sql"))


def comments_of(name: str) -> str:
    text = FOLDER.joinpath(f"{name}.sql").read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if line.startswith("--"))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_without_its_comments(name: str) -> None:
    assert comments_of(name)
    assert "--" not in read(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_stands_in_its_braces(name: str) -> None:
    fields = {field for _, field, _, _ in string.Formatter().parse(read(name)) if field is not None}
    comments = comments_of(name)
    assert {
        field for field in fields if f"{field}:" not in comments and f"{field}, " not in comments
    } == set()


# What is no operator: an assignment, all columns of a row, a count, and an item of GET STACKED DIAGNOSTICS.
NO_OPERATOR = re.compile(r"OPERATOR\(pg_catalog\.[^)]+\)|:=|\.\*|\(\*\)|d_\w+ = [A-Z_]+[,;]$", re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_calls_no_operator_by_its_bare_name(name: str) -> None:
    """A bare one could be another's, by search_path."""
    assert re.findall(r".*(?:[=<>+/|*]|\s-\s).*", NO_OPERATOR.sub("", read(name))) == []
