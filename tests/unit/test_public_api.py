"""What is public stays as it is, or is changed on purpose: `public_api.txt` says what it was.

Each public name with its kind, its signature, its fields and methods; nothing that a base class outside of
dbop_raw brings. Annotations stand as they were written, so that every Python gives the same text.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import dbop_raw
import dbop_raw.events
import dbop_raw.observe
import dbop_raw.testing

FILE = Path(__file__).with_name("public_api.txt")
RENEW = "python tests/unit/test_public_api.py"


# What a dunder method is called by: an operator, a `with`, a loop.
CALLED = {"__init__", "__call__", "__aenter__", "__aiter__", "__enter__", "__iter__", "__add__"}


def modules() -> Iterator[ModuleType]:
    """The public modules: all that a user imports from."""
    yield from (dbop_raw, dbop_raw.events, dbop_raw.testing)
    for found in pkgutil.iter_modules(dbop_raw.observe.__path__, "dbop_raw.observe."):
        yield importlib.import_module(found.name)


class Plain:
    """Stands for an annotation or a default in a signature: shown as its text, without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def value(thing: object) -> str:
    """A default or a constant, the same on every machine: what has an address in its `repr` by its name."""
    name = None if "[" in repr(thing) else getattr(thing, "__qualname__", None)
    return name if isinstance(name, str) else repr(thing)


def annotation(written: object) -> str:
    """As it was written; a type that was evaluated by its name."""
    return written if isinstance(written, str) else value(written)


def signature(function: Any) -> str:
    """The parameters as they are called, each with its annotation and default, and the result."""
    found = inspect.signature(function)
    empty = inspect.Signature.empty
    parameters = [
        one.replace(
            annotation=one.annotation if one.annotation is empty else Plain(annotation(one.annotation)),
            default=one.default if one.default is empty else Plain(value(one.default)),
        )
        for one in found.parameters.values()
    ]
    result = found.return_annotation
    return str(
        found.replace(
            parameters=parameters,
            return_annotation=result if result is empty else Plain(annotation(result)),
        )
    )


def kind_of(function: Any) -> str:
    """How a function is called: plainly, with `await`, or with `with` and `async with`."""
    wrapped = inspect.unwrap(function)
    if inspect.isasyncgenfunction(wrapped):
        return "async with" if wrapped is not function else "async for"
    if inspect.isgeneratorfunction(wrapped):
        return "with" if wrapped is not function else "for"
    return "async def" if inspect.iscoroutinefunction(function) else "def"


def get_original_bases(cls: type) -> tuple[Any, ...]:
    """The bases as written, `Generic[T]` say; `types` has this since Python 3.12."""
    bases: tuple[Any, ...] = vars(cls).get("__orig_bases__", cls.__bases__)
    return bases


def is_protocol(cls: type) -> bool:
    """Is the class a protocol itself, not one that follows it?"""
    return bool(vars(cls).get("_is_protocol"))


def members(cls: type) -> Iterator[str]:
    """Methods, properties and class attributes that dbop_raw defines, a base's included."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("dbop_raw"):
            continue
        for name, member in sorted(vars(base).items()):
            if name in seen or (name.startswith("_") and name not in CALLED):
                continue
            seen.add(name)
            if isinstance(member, property):
                assert member.fget is not None
                yield f"property {name}: {annotation(inspect.signature(member.fget).return_annotation)}"
            elif isinstance(member, (classmethod, staticmethod)):
                word = type(member).__name__
                yield f"{word} {kind_of(member.__func__)} {name}{signature(member.__func__)}"
            elif inspect.isfunction(member):
                # A dataclass shows its fields, and a protocol is never made.
                if not (name == "__init__" and (dataclasses.is_dataclass(cls) or is_protocol(cls))):
                    yield f"{kind_of(member)} {name}{signature(member)}"
            elif isinstance(member, str) and not dataclasses.is_dataclass(base):
                yield f"{name} = {member!r}"


def fields(cls: Any) -> Iterator[str]:
    """The fields of a dataclass that its caller gives or reads."""
    for field in dataclasses.fields(cls):
        if field.name.startswith("_"):
            continue
        default = ""
        if field.default is not dataclasses.MISSING:
            default = f" = {value(field.default)}"
        elif field.default_factory is not dataclasses.MISSING:
            default = f" = {value(field.default_factory)}()"
        yield f"{field.name}: {annotation(field.type)}{default}" + ("" if field.init else "  (not given)")


def described(name: str, thing: Any) -> Iterator[str]:
    """One public name: a headline, then what is inside."""
    if inspect.isfunction(thing):
        yield f"{kind_of(thing)} {name}{signature(thing)}"
    elif not inspect.isclass(thing):
        yield f"{name} = {value(thing)}"
    elif issubclass(thing, enum.Enum):
        yield f"enum {name}"
        yield from (f"    {member.name} = {member.value!r}" for member in thing)
    else:
        bases = ", ".join(value(base) for base in get_original_bases(thing) if base is not object)
        head = f"{name}({bases})" if bases else name
        if dataclasses.is_dataclass(thing):
            options: Any = vars(thing)["__dataclass_params__"]
            frozen = "frozen " if options.frozen else ""
            only = " (by keyword)" if all(f.kw_only for f in dataclasses.fields(thing) if f.init) else ""
            yield f"{frozen}dataclass {head}{only}"
            yield from (f"    {line}" for line in fields(thing))
        else:
            yield f"class {head}"
        if isinstance(vars(thing).get("name"), str):
            yield f"    name = {vars(thing)['name']!r}"
        yield from (f"    {line}" for line in members(thing) if not line.startswith("name = "))


def public_api() -> str:
    """All of it as text."""
    lines = [f"# The public API, compared by test_public_api.py. After a change on purpose: {RENEW}"]
    for module in modules():
        lines += ["", "", module.__name__]
        for name in module.__all__:
            lines += ["", *described(name, getattr(module, name))]
    return "\n".join(lines) + "\n"


def test_the_public_api_is_the_one_that_was_agreed_on() -> None:
    was, now = FILE.read_text(encoding="utf-8"), public_api()
    difference = "\n".join(
        difflib.unified_diff(was.splitlines(), now.splitlines(), "public_api.txt", "the code", lineterm="")
    )
    assert was == now, (
        f"the public API has changed:\n{difference}\n"
        f"If that was meant, renew the file with `{RENEW}`, and say so in CHANGELOG.md."
    )


def test_every_public_name_is_in_the_file() -> None:
    text = FILE.read_text(encoding="utf-8")
    missing = [name for name in dbop_raw.__all__ if f" {name}" not in text and f"\n{name} =" not in text]
    assert missing == []


if __name__ == "__main__":
    FILE.write_text(public_api(), encoding="utf-8")
