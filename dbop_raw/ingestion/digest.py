"""A digest of a chunk's items: by it a ledger knows whether a source is still the same.

It has to be the same in every process, or a second run is refused for nothing. So it is made of the items'
JSON, which any version of Python writes alike, and never of an object's address, a set's order or a pickle.
What has no value that could be compared counts by its type alone: better to overlook a change there than to
stop whoever goes on after a crash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import asyncpg

__all__ = ["digest"]

# Bytes: two different chunks of one ledger never have the same, by any chance that matters.
_SIZE = 16

# Modules whose types write their value, and nothing else, as their repr.
_BY_REPR = frozenset(
    {
        "asyncpg",
        "builtins",
        "datetime",
        "decimal",
        "enum",
        "fractions",
        "ipaddress",
        "numpy",
        "pathlib",
        "uuid",
    }
)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def digest(items: Sequence[Any]) -> bytes:
    """Make the digest of some items.

    Args:
        items: Of any types; a list and a tuple of the same values are the same.

    Returns:
        16 bytes.
    """
    try:
        text = _encode(list(items))
    except Exception:  # noqa: BLE001 - a key that is no text, a circle, a property that raises
        # One item that JSON can't hold: the others count as they are.
        text = "\n".join(map(_encode_one, items))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_SIZE).digest()


def _encode_one(item: object) -> str:
    return _first(_encode, lambda one: _encode(_outline(one)), _kind)(item)


def _first(*ways: Callable[[object], str]) -> Callable[[object], str]:
    """Give a function that takes the first of some ways that does not raise; the last one never does."""

    def encode(value: object) -> str:
        for way in ways[:-1]:
            with contextlib.suppress(Exception):
                return way(value)
        return ways[-1](value)

    return encode


def _outline(value: object) -> object:
    """Take apart what JSON can't hold as a whole."""
    part = _first(_encode, _kind)
    if isinstance(value, Mapping):
        return ["mapping", *([part(key), part(one)] for key, one in value.items())]
    if isinstance(value, (list, tuple)):
        return ["sequence", *map(part, value)]
    return _kind(value)


def _plain(value: object) -> object:
    """Give what JSON has no form for in one that it has; the type goes along, for b'1' is not '1'."""
    return [_kind(value), *_parts(value)]


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return [bytes(value).hex()]
    if isinstance(value, AbstractSet):
        return sorted(map(_encode, value))
    if isinstance(value, (Mapping, asyncpg.Record)):
        return [[_encode(key), one] for key, one in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [[one.name, getattr(value, one.name)] for one in dataclasses.fields(value)]
    if {one.__module__.partition(".")[0] for one in type(value).__mro__[:-1]} & _BY_REPR:
        return [_ADDRESS.sub("", repr(value))]
    return value if isinstance(value, Sequence) else ()


def _kind(value: object) -> str:
    # Without its module: that is `__main__` in one process, and the module's own name in another.
    return type(value).__qualname__


# check_circular: a circle ends in a RecursionError as well, and looking for one takes longer than the rest.
_encode = json.JSONEncoder(default=_plain, separators=(",", ":"), check_circular=False).encode
