"""Whether an error of class 42 is about a value or the statement, by its fields alone."""

from __future__ import annotations

import asyncpg
import pytest

from dbop_raw.batching.value_errors import Origin, origin_of


def error(code: str, **fields: str) -> Exception:
    made: Exception = asyncpg.PostgresError.new({"S": "ERROR", "V": "ERROR", "C": code, "M": "no", **fields})
    return made


@pytest.mark.parametrize(
    ("found", "origin"),
    [
        (error("42601"), Origin.VALUE),
        (error("42601", P="7"), Origin.STATEMENT),
        (error("42601", p="7", W="PL/pgSQL function f() line 1\nCOPY t, line 1"), Origin.STATEMENT),
        (error("42P01", W='COPY t, line 3, column v: "nosuch"'), Origin.VALUE),
        (error("42P01", W="COPY t, Zeile 3"), Origin.VALUE),
        (error("42703", W="PL/pgSQL function f() line 1\nCOPY t, line 3"), Origin.UNSURE),
        (error("42704", W="unnamed portal parameter $2 = '...'"), Origin.VALUE),
        (error("42804", W="Portal »p« Parameter $2"), Origin.VALUE),
        (error("42P01", W='SQL statement "SELECT $1"'), Origin.UNSURE),
        (error("42P01"), Origin.UNSURE),
        (error("42501", W="COPY t, line 3"), Origin.STATEMENT),
        (error("42883", R="exec_stmt_raise"), Origin.STATEMENT),
        (error("53100", W="COPY t, line 3"), Origin.STATEMENT),
        (LookupError("42601"), Origin.STATEMENT),
    ],
)  # fmt: skip
def test_what_an_error_of_class_42_is_about_is_told_by_its_fields(found: Exception, origin: Origin) -> None:
    assert origin_of(found) is origin
