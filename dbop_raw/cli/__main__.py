"""The console command `dbop-raw`: `main` says what to install where the extra `cli` is missing.

`dbop-raw ingest FILE.csv --table T` loads a CSV file into a table, bad rows set aside;
`dbop-raw sqlstate 40P01` says what a code means, and what is done about it.
"""

from __future__ import annotations

import sys

__all__ = ["main"]

_NEEDED = frozenset({"rich", "typer"})


def main() -> None:
    """Run the command that `sys.argv` names; ends the process with its exit code."""
    try:
        # Here and not above: the core installs neither.
        from dbop_raw.cli.app import app  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        package = (exc.name or "").partition(".")[0]
        if package not in _NEEDED:
            raise
        print(
            f"dbop-raw: the command line needs the package {package}: pip install 'dbop-raw[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    app()


if __name__ == "__main__":
    main()
