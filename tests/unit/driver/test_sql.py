"""Control SQL as text: modes, limits and quoting."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbop_raw import PolicyError
from dbop_raw.driver import sql

names = st.text(min_size=1).filter(lambda s: "\0" not in s)


class TestBegin:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, "BEGIN"),
            ({"isolation": "read committed"}, "BEGIN ISOLATION LEVEL READ COMMITTED"),
            ({"isolation": "repeatable read"}, "BEGIN ISOLATION LEVEL REPEATABLE READ"),
            ({"isolation": "serializable"}, "BEGIN ISOLATION LEVEL SERIALIZABLE"),
            ({"readonly": True}, "BEGIN READ ONLY"),
            (
                {"isolation": "serializable", "readonly": True, "deferrable": True},
                "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE",
            ),
        ],
    )
    def test_the_modes_are_written_as_postgresql_has_them(
        self, options: dict[str, Any], expected: str
    ) -> None:
        assert sql.begin(**options) == expected

    @pytest.mark.parametrize(
        "isolation", ["read uncommitted", "SERIALIZABLE", "serializable; DROP TABLE t", ""]
    )
    def test_an_unknown_isolation_is_refused_with_what_is_known(self, isolation: str) -> None:
        with pytest.raises(PolicyError, match="'repeatable read'") as raised:
            sql.begin(cast("sql.Isolation", isolation))
        assert repr(isolation) in str(raised.value)

    @pytest.mark.parametrize(
        "options", [{}, {"readonly": True}, {"isolation": "serializable"}, {"isolation": "repeatable read"}]
    )
    def test_deferrable_is_refused_where_postgresql_would_ignore_it(self, options: dict[str, Any]) -> None:
        with pytest.raises(PolicyError, match="deferrable=True needs"):
            sql.begin(deferrable=True, **options)


class TestLimits:
    @given(st.floats(1e-9, 1e12))
    def test_the_server_is_told_a_little_less_and_never_0(self, seconds: float) -> None:
        told = sql.server_milliseconds(seconds)
        assert isinstance(told, int)
        assert 1 <= told <= 2**31 - 1
        # Below a millisecond there is nothing less to tell.
        assert told < max(seconds * 1000, 1.0000001)

    @given(st.floats(0.05, 2_000_000))
    def test_the_margin_is_small_and_bounded(self, seconds: float) -> None:
        """Early enough that the server's answer is here in time, and at most a quarter second."""
        told = sql.server_milliseconds(seconds)
        assert told is not None
        assert 10 - 1e-6 <= seconds * 1000 - told <= 251

    @pytest.mark.parametrize("seconds", [0.0, -1.0, -math.inf])
    def test_time_that_is_over_is_the_least_limit_not_none(self, seconds: float) -> None:
        assert sql.server_milliseconds(seconds) == 1

    def test_an_endless_wait_sets_no_limit(self) -> None:
        assert sql.server_milliseconds(math.inf) is None

    def test_half_a_second_is_not_rounded_to_none(self) -> None:
        """int(0.5) is 0, and 0 switches the timeout off."""
        assert sql.server_milliseconds(0.5) == 475

    def test_only_the_limits_that_are_given_are_set(self) -> None:
        both = sql.set_limits((900, 50))
        assert both.count("set_config(") == 2
        assert "'900'" in both
        assert "'50'" in both
        assert "lock_timeout" not in sql.set_limits((900, None))
        assert "statement_timeout" not in sql.set_limits((None, 50))
        assert sql.set_limits((None, None)) == ""


class TestQuoting:
    @given(names)
    def test_an_identifier_is_one_token_that_means_the_name(self, name: str) -> None:
        quoted = sql.identifier(name)
        assert quoted[0] == quoted[-1] == '"'
        inside = quoted[1:-1]
        assert '"' not in inside.replace('""', "")
        assert inside.replace('""', '"') == name

    @pytest.mark.parametrize("name", ["", "a\0b", "\0", None, 3, b"t"])
    def test_a_name_that_postgresql_can_not_have_is_refused(self, name: Any) -> None:
        with pytest.raises(PolicyError, match="not an SQL identifier"):
            sql.identifier(name)

    def test_a_dot_is_part_of_a_name_and_a_schema_is_given_apart(self) -> None:
        assert sql.relation("a.b") == '"a.b"'
        assert sql.relation("b", "a") == '"a"."b"'

    @given(st.text().filter(lambda s: "\0" not in s and "\\" not in s))
    def test_a_literal_is_one_token_that_means_the_text(self, text: str) -> None:
        quoted = sql.literal(text)
        assert quoted[0] == quoted[-1] == "'"
        inside = quoted[1:-1]
        assert "'" not in inside.replace("''", "")
        assert inside.replace("''", "'") == text

    @given(st.text("\\'n"))
    def test_a_backslash_makes_an_escape_string_whatever_the_server_conforms_to(self, text: str) -> None:
        quoted = sql.literal(text)
        if "\\" in text:
            assert quoted.startswith(" E'")
            inside = quoted[3:-1]
            assert inside.replace("\\\\", "").count("\\") == 0
            assert inside.replace("\\\\", "\\").replace("''", "'") == text

    def test_a_text_with_nul_is_refused(self) -> None:
        with pytest.raises(PolicyError, match="NUL"):
            sql.literal("a\0b")
