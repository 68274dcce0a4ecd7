"""`dbop-raw sqlstate`: what a code means, who can repair it, and what the library does about it."""

from __future__ import annotations

import difflib
import sys
import textwrap
from typing import Annotated

import typer

from dbop_raw.failure.sqlstate import CONDITIONS, Repair, Verdict, verdict_of

__all__ = ["HELP", "NotFound", "command", "explain"]

HELP = """Explain a SQLSTATE: what it means, who can repair it, and what dbop_raw does about it.

**Examples**

    dbop-raw sqlstate 40P01

    dbop-raw sqlstate deadlock_detected

    dbop-raw sqlstate 40
"""

_CLASS, _CODE = 2, 5
_WIDTH = 100
# How many near ones a message lists.
_FEW = 4

_REPAIRS = {
    Repair.SAVEPOINT: (
        "rolls back to the savepoint and tries the item or the operation again there, as retry(…) allows; "
        "what outlasts that is tried again in a new transaction by run(retry=…), or is in a batch's `failed`"
    ),
    Repair.TRANSACTION: (
        "rolls the transaction back and starts the whole again after a pause, as retry(…) or run(retry=…) "
        "allows; a batch or an ingest's chunk too"
    ),
    Repair.CONNECTION: (
        "takes another connection and starts the whole transaction again there after a pause, as retry(…) or "
        "run(retry=…) allows; a batch or an ingest's chunk too"
    ),
    Repair.NEVER: "raises it unchanged: no retry",
    Repair.UNKNOWN: (
        "before COMMIT was sent: starts again on a new connection, for nothing is done yet; in the middle of "
        "COMMIT or of an autocommitted statement: raises CommitUnknown, or with resolve_commit=True looks up "
        "what became of it"
    ),
}


class NotFound(LookupError):
    """There is no such code, class or condition; the message names near ones."""


def command(
    code: Annotated[
        str, typer.Argument(metavar="CODE", help="Five characters, a class of two, or a condition's name.")
    ],
) -> None:
    """Explain a code."""
    try:
        print(explain(code))
    except NotFound as exc:
        print(f"dbop-raw: {exc}", file=sys.stderr)
        raise typer.Exit(2) from None


def explain(asked: str) -> str:
    """Explain a SQLSTATE in some lines of text.

    Args:
        asked: A code (`40P01`), a class (`40`) or a condition (`deadlock_detected`), in either case.

    Returns:
        The explanation.

    Raises:
        NotFound: There is none such in PostgreSQL 18.
    """
    code, name = asked.strip().upper(), asked.strip().lower()
    if len(code) == _CLASS and (codes := [one for one in sorted(CONDITIONS) if one.startswith(code)]):
        return _explain_class(code, codes)
    # Some conditions are two codes: an error and a warning.
    codes = [code] if code in CONDITIONS else sorted(one for one, its in CONDITIONS.items() if its == name)
    if not codes:
        raise NotFound(f"{asked!r} is no SQLSTATE, class or condition of PostgreSQL 18{_near(code, name)}")
    return "\n\n".join(_explain_code(one) for one in codes)


def _near(code: str, name: str) -> str:
    found = [condition for condition in CONDITIONS.values() if len(name) >= _CODE and name in condition][
        :_FEW
    ]
    found = found or difflib.get_close_matches(name, CONDITIONS.values(), n=_FEW)
    if len(code) == _CODE and code[:_CLASS] in {one[:_CLASS] for one in CONDITIONS}:
        found += difflib.get_close_matches(code, CONDITIONS, n=_FEW)
        found.append(f"its class {code[:_CLASS]}")
    return f"; near: {', '.join(dict.fromkeys(found))}" if found else ""


def _explain_class(name: str, codes: list[str]) -> str:
    width = max(len(CONDITIONS[code]) for code in codes)
    lines = [f"class {name}: {CONDITIONS.get(f'{name}000', 'no code for the class itself')}", ""]
    lines += [f"  {code}  {CONDITIONS[code]:{width}}  {_short(verdict_of(code))}" for code in codes]
    return "\n".join([*lines, "", "One of them: dbop-raw sqlstate CODE"])


def _short(verdict: Verdict) -> str:
    return verdict.repair.value + (", evict" if verdict.evict else "")


def _explain_code(code: str) -> str:
    verdict = verdict_of(code)
    lines = [f"{code} {verdict.condition}", *_verdict_lines(verdict)]
    told = verdict_of(code, severity="ERROR")
    if (told.repair, told.evict, told.reason) != (verdict.repair, verdict.evict, verdict.reason):
        lines += ["", "  where the server itself says so with severity ERROR:", *_verdict_lines(told)]
    ended = verdict_of(code, severity="FATAL")
    if (ended.repair, ended.evict) != (verdict.repair, verdict.evict):
        lines += ["", f"  with severity FATAL or PANIC, which end the session: {_short(ended)}"]
    return "\n".join(lines)


def _verdict_lines(verdict: Verdict) -> list[str]:
    passing = "passing" if verdict.transient else "permanent"
    kind = "outcome unknown" if verdict.repair is Repair.UNKNOWN else passing
    evicted = "yes: the connection is thrown away" if verdict.evict else "no: the connection is kept"
    told = {
        "verdict": kind,
        "repair": verdict.repair.value,
        "evict": evicted,
        "why": verdict.reason,
        "dbop_raw": _REPAIRS[verdict.repair],
        "a batch": _in_a_batch(verdict),
    }
    return [line for label, text in told.items() for line in _wrapped(label, text)]


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"  {label:10}", subsequent_indent=" " * 12)


def _in_a_batch(verdict: Verdict) -> str:
    if verdict.item:
        return "looks for the item at fault, sets it aside and writes the others"
    if verdict.repair is Repair.NEVER:
        return "stops at once: every item would meet it"
    return "looks for no item: the whole transaction is tried again"
