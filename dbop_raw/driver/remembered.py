"""What the driver remembers: a user's codecs, and the types of the statements in its cache.

asyncpg has no public way to ask for either, so this is the one place that looks inside. Where that can't be
done (another version), each function gives the answer that is safe.
"""

from __future__ import annotations

import gc
from typing import Any

from dbop_raw.driver import sql
from dbop_raw.driver.connection import Connection

__all__ = ["bare", "columns_query", "has_binary_codec", "has_own_codec", "kept_statement", "types_of"]

# asyncpg's ServerDataFormat.
_ANY, _BINARY = -1, 1
_IGNORE_OWN = True


def bare(conn: Connection) -> Any:
    """Return the connection itself where `conn` is the proxy that a pool hands out for one."""
    return getattr(conn, "_con", conn)


def has_own_codec(conn: Connection, oid: int) -> bool:
    """Has the user set a codec for the type on this connection? True where that can't be told."""
    try:
        settings = bare(conn)._protocol.get_settings()
        codec = settings.get_data_codec(oid)
        if codec is settings.get_data_codec(oid, _ANY, _IGNORE_OWN):
            return False
    except (AttributeError, TypeError):
        return True
    # The driver keeps a codec of its own for an enum, or for an extension's type, where it keeps the user's.
    # But only the user's refers to functions of Python, and the garbage collector can tell that.
    refers_to = gc.get_referents(codec)
    return not refers_to or any(callable(one) for one in refers_to if one is not type(codec))


def has_binary_codec(conn: Connection, oid: int) -> bool:
    """Does the driver encode the type in the server's binary format? False where that can't be told."""
    try:
        return bare(conn)._protocol.get_settings().get_data_codec(oid, _BINARY) is not None
    except (AttributeError, TypeError):
        return False


def columns_query(relation: str, columns: tuple[str, ...]) -> str:
    """Return the query by which `copy_records_to_table` learns the columns' types, as the driver writes it.

    Args:
        relation: The table, quoted.
        columns: The names, not quoted.
    """
    return f"SELECT {', '.join(map(sql.identifier, columns))} FROM {relation} LIMIT 1"


def kept_statement(conn: Connection, query: str) -> Any:
    """Return what the driver keeps of a statement in its cache; None where it keeps nothing."""
    con = bare(conn)
    try:
        return con._stmt_cache.get((query, con._protocol.get_record_class(), False))
    except (AttributeError, TypeError):
        return None


def types_of(statement: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the types (`pg_type.oid`) of a statement's parameters and columns.

    Args:
        statement: A prepared statement of the driver's, or what `kept_statement` gives.
    """
    state = getattr(statement, "_state", statement)
    parameters = tuple(type_.oid for type_ in state._get_parameters())
    return parameters, tuple(column.type.oid for column in state._get_attributes() or ())
