"""What is a readable DSN, and that nothing of an unreadable one is told."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbop_raw import PolicyError
from dbop_raw.driver.dsn import check_dsn


@pytest.mark.parametrize(
    "dsn",
    [
        None,
        "postgresql://",
        "postgres:///app?host=/var/run/postgresql&port=5433",
        "postgresql://app@localhost/app",
        "postgresql://app:secret@db.example:6432/app?sslmode=verify-full&sslrootcert=/etc/ca.pem",
        "postgresql://app@one:5432,two:5433,three/app?target_session_attrs=read-write",
        "postgresql://app@[::1]:5432/app",
        "postgresql://app@[fe80::1]/app",
        "postgresql://app@h/app?application_name=a%20b&options=-c%20geqo%3Doff",
    ],
)
def test_a_good_dsn_passes(dsn: str | None) -> None:
    check_dsn(dsn)


@given(password=st.text(st.characters(codec="utf-8")))
def test_any_password_passes_once_it_is_quoted(password: str) -> None:
    check_dsn(f"postgresql://app:{quote(password, safe='')}@localhost:5432/app")


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://app:s3cret@h:99999/app",
        "postgresql://app:s3cret@one:5432,two:65536/app",
        "postgresql://app:s3cret@h/app?port=99999",
        "postgresql://app:s3cret@h:-1/app",
        "postgresql://app:s3cret@[::1]:70000/app",
    ],
)
def test_a_port_that_can_be_none_is_refused_and_not_quoted(dsn: str) -> None:
    with pytest.raises(PolicyError, match="a port of at most 65535") as caught:
        check_dsn(dsn)
    assert "99999" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


# What ends the host's part before the password does: it leaves the password where the port should be.
@given(password=st.text("/?#", min_size=1, max_size=3).map(lambda text: f"s3cret{text}x"))
def test_a_dsn_with_an_unquoted_password_is_refused_and_not_shown_in_the_error(password: str) -> None:
    with pytest.raises(PolicyError) as caught:
        check_dsn(f"postgresql://app:{password}@localhost:5432/app")
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None
