"""What the driver remembers of types: a user's codecs, and the columns and parameters of statements in its cache.

asyncpg has no public way to ask for either, so this is the one place that looks inside. Where that can't be done
(another version), each function gives the answer that is safe.
"""

from __future__ import annotations

from typing import Any

from dbop_raw.driver import sql
from dbop_raw.driver.connection import Connection

__all__ = ["bare", "columns_query", "has_binary_codec", "has_own_codec", "kept_statement", "types_of"]

# asyncpg's ServerDataFormat.
_ANY, _TEXT, _BINARY = -1, 0, 1
_IGNORE_OWN = True


def bare(conn: Connection) -> Any:
    """Return the connection itself where `conn` is the proxy that a pool hands out for one."""
    return getattr(conn, "_con", conn)


def has_own_codec(conn: Connection, oid: int, *, enum: bool = False) -> bool:
    """Has the user set a codec for the type? True where that can't be told.

    Args:
        conn: Each connection has codecs of its own.
        oid: The type.
        enum: It is an enum.
    """
    try:
        codec = bare(conn)._protocol.get_settings().get_data_codec
        if enum:
            # The driver keeps its own codec for an enum where it keeps the user's; but its own is there in both
            # formats, and a user's in one.
            return codec(oid, _ANY) is not None and None in (codec(oid, _TEXT), codec(oid, _BINARY))
        return codec(oid) is not codec(oid, _ANY, _IGNORE_OWN)
    except (AttributeError, TypeError):
        return True


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
