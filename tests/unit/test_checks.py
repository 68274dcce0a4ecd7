"""The hooks that run before a commit are the checks that `scripts/check` knows, no more and no fewer."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "scripts/check").read_text(encoding="utf-8")
HOOKS = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")


def test_each_check_is_a_hook_and_each_hook_a_check() -> None:
    known = re.findall(r"^ +([\w-]+)\) ", SCRIPT, re.MULTILINE)
    assert known == ["ruff-check", "ruff-format", "mypy", "lint-imports"]
    assert re.findall(r"entry: scripts/check ([\w-]+)$", HOOKS, re.MULTILINE) == known
    assert re.findall(r"id: ([\w-]+)$", HOOKS, re.MULTILINE) == known


def test_without_a_name_every_check_runs() -> None:
    known = re.findall(r"^ +([\w-]+)\) ", SCRIPT, re.MULTILINE)
    assert f"set -- {' '.join(known)}\n" in SCRIPT
