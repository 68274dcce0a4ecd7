"""Errors of class 42 that a value raised, though the class says that the statement is wrong.

A malformed tsquery, jsonpath or ltree is a "syntax error", an unknown name read as a regclass an "undefined
table". Where the server says that it was reading a value, or was not reading a statement, the error is its
row's; where it doesn't, only another row can tell: the statement that was right for that one is right.

Pure, no I/O, and no message is looked at: the server translates them. What counts are the error's fields
(PostgreSQL, "Error and Notice Message Fields") and the form of its context.
"""

from __future__ import annotations

import enum
import re

import asyncpg

__all__ = ["Origin", "origin_of", "raised_in_our_function"]

_CLASS = "42"
_SYNTAX_ERROR = "42601"
_NO_PRIVILEGE = "42501"
# Functions of the server that find a statement wrong and don't say where in it; and PL/pgSQL's RAISE, by
# which somebody chose such a code on purpose.
_ABOUT_THE_STATEMENT = frozenset(
    {"rewriteTargetListIU", "infer_arbiter_indexes", "CheckValidResultRel", "exec_stmt_raise"}
)

# `COPY t, line 3, column v: "a & & b"`, or without a column. All words but the first are translated.
_COPY_LINE = re.compile(r"COPY .*?, \D*?\d+", re.DOTALL)
# `portal "p" parameter $2 = '...'`: the server was reading a parameter. Translated but for the number.
_PARAMETER = re.compile(r"""^[^"'$\n]*(?:"[^"\n]*"[^"'$\n]*)?\$\d+(?: = .*)?$""", re.MULTILINE)


class Origin(enum.Enum):
    """What an error is about."""

    VALUE = "value"
    """One row's value."""
    STATEMENT = "statement"
    """What all rows share."""
    UNSURE = "unsure"
    """It can't be told from the error: where another row was written, it was the value."""


def origin_of(error: BaseException) -> Origin:
    """Tell whether an error that by its code is about the statement was raised by a value.

    An error of another class than 42 is what its code says: about the statement.
    """
    code = getattr(error, "sqlstate", None) or ""
    if not isinstance(error, asyncpg.PostgresError) or not code.startswith(_CLASS) or code == _NO_PRIVILEGE:
        return Origin.STATEMENT
    if error.position or error.internal_position or error.server_source_function in _ABOUT_THE_STATEMENT:
        # Whoever parses a statement, the batch's own or a trigger's, says where in it the fault is.
        return Origin.STATEMENT
    if code == _SYNTAX_ERROR:
        return Origin.VALUE
    context = error.context or ""
    copied = _COPY_LINE.match(context)
    # Behind a function's lines COPY's own says only which row called it.
    return Origin.VALUE if copied or _PARAMETER.search(context) else Origin.UNSURE


def raised_in_our_function(error: BaseException) -> bool:
    """Was it raised while a function of ours, in the server, was trying rows: not when it was made?"""
    return "dbop_raw_" in (getattr(error, "context", None) or "")
