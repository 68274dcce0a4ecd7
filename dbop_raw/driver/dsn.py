"""Checks a DSN before the driver reads it, so that no error message can quote a password.

asyncpg finds a malformed DSN as well, but its error quotes what it took for a port, and with an unescaped `/`
or `@` in the password that is a part of the password.
"""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

from dbop_raw.failure.errors import PolicyError

__all__ = ["UNREADABLE", "check_dsn"]

UNREADABLE = (
    "the dsn can't be read: it is postgresql://user:password@host:port/database, with / ? # @ : [ ] % of a "
    "password written as %2F %3F %23 %40 %3A %5B %5D %25, and a port of at most 65535"
)
"""What is said of a DSN whose parts can't be told apart, instead of any of them."""

_LARGEST_PORT = 65_535


def check_dsn(dsn: str | None) -> None:
    """Check that the parts of a DSN can be told apart.

    Args:
        dsn: A connection URI (PostgreSQL, "Connection URIs"), or None, which leaves all to the environment.

    Raises:
        PolicyError: The URI can't be parsed. The message explains how to escape a password, and quotes no
            part of the DSN.
    """
    if dsn is None:
        return
    if not _readable(dsn):
        # Not inside an except block: there the parser's error, which quotes the DSN, would be the context.
        raise PolicyError(UNREADABLE)


def _readable(dsn: str) -> bool:
    """Return whether hosts, ports and options can be parsed."""
    try:
        parts = urlsplit(dsn)
        hosts = parts.netloc.partition("@")[2] if "@" in parts.netloc else parts.netloc
        ports = [host.rpartition("]")[2].partition(":")[2] for host in hosts.split(",")]
        if parts.query:
            query = parse_qs(parts.query, strict_parsing=True)
            ports += [port for value in query.get("port", ()) for port in value.split(",")]
        return all(0 <= int(port) <= _LARGEST_PORT for port in ports if port)
    except ValueError:
        return False
