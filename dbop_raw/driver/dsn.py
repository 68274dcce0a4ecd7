"""What may be said of a DSN that can't be read: never a part of it, for that part may be the password."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

from dbop_raw.failure.errors import PolicyError

__all__ = ["check_dsn"]


def check_dsn(dsn: str | None) -> None:
    """Raise `PolicyError` for a DSN whose parts can't be told apart.

    The driver finds that out as well, and quotes what it took for a port: with an unescaped `/` or `@` in
    the password, that is the password.
    """
    if dsn is None:
        return
    if not _readable(dsn):
        # Not in a handler: the driver's or the parser's error would be this one's context.
        raise PolicyError(
            "the dsn can't be read: it is postgresql://user:password@host:port/database, with / ? # @ : [ ] "
            "% of a password written as %2F %3F %23 %40 %3A %5B %5D %25"
        )


def _readable(dsn: str) -> bool:
    try:
        parts = urlsplit(dsn)
        hosts = parts.netloc.partition("@")[2] if "@" in parts.netloc else parts.netloc
        for host in hosts.split(","):
            port = host.rpartition("]")[2].partition(":")[2]
            if port:
                int(port)
        if parts.query:
            parse_qs(parts.query, strict_parsing=True)
    except ValueError:
        return False
    return True
