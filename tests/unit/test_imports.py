"""The house: the core needs three packages, what is public is documented (import-linter has the order)."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import dbop_raw

ROOT = Path(dbop_raw.__file__).parent

CORE = {"asyncpg", "anyio", "structlog"}
# What the extras bring, and who may use it.
EXTRAS = {
    "observe.": {"opentelemetry"},
    "testing.": {"pytest"},
    "cli.": {"rich", "typer"},
    "sizing.": {"markdown_it", "matplotlib", "numpy"},
}


def modules() -> dict[str, Path]:
    """Each module below `dbop_raw` by its dotted name; the package itself is ""."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room_of(module: str) -> str:
    """The folder that `module` is in."""
    return f"{module.partition('.')[0]}."


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Each import in the file, wherever it stands: line and dotted name (of a `from`, a module in it)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner.removeprefix("dbop_raw.") in MODULES else node.module


def inside(name: str) -> str | None:
    """`name` without the package, or None for another package."""
    if name != "dbop_raw" and not name.startswith("dbop_raw."):
        return None
    return name.removeprefix("dbop_raw").removeprefix(".")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_needs_only_what_its_extra_brings(module: str) -> None:
    allowed = sys.stdlib_module_names | CORE | EXTRAS.get(room_of(module), set())
    others = {name.partition(".")[0] for _, name in imports_of(MODULES[module]) if inside(name) is None}
    assert others <= allowed


def test_what_is_public_is_sorted_and_there() -> None:
    assert list(dbop_raw.__all__) == sorted(set(dbop_raw.__all__))
    assert [name for name in dbop_raw.__all__ if not hasattr(dbop_raw, name)] == []


def test_nothing_else_is_public_but_the_modules() -> None:
    # pytest adds names that no identifier can be, "@py_builtins" say, to what a plugin imports.
    names = {name for name in vars(dbop_raw) if name.isidentifier() and not name.startswith("_")}
    assert names - set(dbop_raw.__all__) <= {module.partition(".")[0] for module in MODULES} | {"annotations"}


# The docstrings of type aliases and constants are not kept at run time.
DOCUMENTED = [
    name
    for name in dbop_raw.__all__
    if inspect.isclass(getattr(dbop_raw, name)) or inspect.isfunction(getattr(dbop_raw, name))
]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_is_public_is_documented(name: str) -> None:
    public = getattr(dbop_raw, name)
    doc = vars(public).get("__doc__") if inspect.isclass(public) else public.__doc__
    assert doc
    # dataclasses write "Name(field: type, …)" where there is no docstring: that says nothing.
    assert not doc.startswith(f"{name}(")


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))


def test_the_picture_of_the_house_has_every_room_on_its_floor() -> None:
    project = Path(__file__).parents[2]
    contract = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = [layer.split(" | ") for layer in contract["contracts"][0]["layers"]]
    picture = (project / "bench/house.svg").read_text(encoding="utf-8")
    floors: dict[int, list[str]] = {}
    for y, room in re.findall(r'<text class="room" x="\d+" y="(\d+)">([\w.]+)</text>', picture):
        floors.setdefault(int(y), []).append(room)
    assert [floors[y] for y in sorted(floors)] == layers
