"""What tests change in a DSN (a URL)."""

from __future__ import annotations

__all__ = ["PASSWORD", "with_password", "without_tls"]

PASSWORD = "sesame-4711"


def without_tls(dsn: str) -> str:
    """Return the DSN without asyncpg's question for TLS.

    Cut off or cancelled in the middle of that question, asyncpg leaves an error that nobody retrieves.
    """
    return f"{dsn}{'&' if '?' in dsn else '?'}sslmode=disable"


def with_password(dsn: str, password: str = PASSWORD, user: str = "postgres") -> str:
    """Return the DSN of user postgres with a password, which a server that trusts us does not ask for."""
    return dsn.replace("//postgres@", f"//{user}:{password}@")
