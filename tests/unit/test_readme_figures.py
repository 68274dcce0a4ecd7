"""The figures in the README are those of the committed result files, to the last digit shown."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([≤≥] [\d.]+) \|$", README, re.MULTILINE)


def _result(name: str) -> Any:
    return json.loads((ROOT / f"bench/results/{name}.json").read_text(encoding="utf-8"))


FIGURES = {figure["name"]: figure for figure in _result("foundation")["figures"]}
PEERS, COST, POOL = _result("peers"), _result("cost"), _result("pool")


def test_every_figure_that_was_measured_is_shown_the_missed_ones_too() -> None:
    assert [name for name, _, _ in ROWS] == list(FIGURES)


@pytest.mark.parametrize(("name", "shown", "bound"), ROWS)
def test_it_is_what_the_file_says(name: str, shown: str, bound: str) -> None:
    figure = FIGURES[name]
    assert shown == f"{figure['value']:.2f}"
    sign = "≥" if figure["better"] == "at least" else "≤"
    assert bound == f"{sign} {figure['bound']:g}"


def _section(title: str) -> str:
    found = re.search(rf"^### {re.escape(title)}\n(.*?)(?=^#)", README, re.MULTILINE | re.DOTALL)
    assert found is not None, f"the README has no section '{title}'"
    return found[1]


def _table(lines: list[list[str]]) -> str:
    head, *rows = lines
    rule = ["---", *(["---:"] * (len(head) - 1))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _name(way: dict[str, Any]) -> str:
    return f"**{way['name']}**" if way["role"] == "ours" else str(way["name"])


def peers_table() -> str:
    """Each way and each work on the direct line: its rate over the limit's."""
    cases = [case for case in PEERS["cases"] if case["line"] == PEERS["cases"][0]["line"]]
    rows = [
        [_name(way), *(_ratio(case["ways"][place]) for case in cases)]
        for place, way in enumerate(cases[0]["ways"])
    ]
    return _table([["rows/s over those of COPY", *(case["name"] for case in cases)], *rows])


def _ratio(way: dict[str, Any]) -> str:
    return way["reason"] or f"{way['ratio_to_limit']:.2g}"


def singles_table() -> str:
    """Each way to do one operation: messages, and time on both lines."""
    rows = [
        [
            _name(one),
            one["reason"] or f"{one['round_trips']:g}",
            *(
                "" if one["reason"] else f"{1000 * one[line]['median']:.2f} ms"
                for line in ("seconds", "seconds_slow_line")
            ),
        ]
        for one in PEERS["one_operation"]
    ]
    return _table([["one operation", "round trips", "loopback", "slow line"], *rows])


def wire_table() -> str:
    """What `run` costs beside the same by hand."""
    rows = [
        [
            near["name"],
            f"{near['round_trips']}",
            f"{1e6 * near['seconds']['median']:.0f} µs",
            f"{1000 * far['seconds']['median']:.2f} ms",
        ]
        for near, far in zip(COST["wire"], COST["wire_slow_line"], strict=True)
    ]
    return _table([["acquire to release", "round trips", "loopback", "slow line"], *rows])


def facts() -> Iterator[str]:
    """What the README says in words, word for word."""
    slow = max(PEERS["round_trip_seconds"].values())
    yield f"a round trip of {1000 * slow:.1f} ms"
    yield f"{COST['speedup_over_by_hand']:.2f} times as fast on loopback"
    yield f"{COST['speedup_over_by_hand_slow_line']:.2f} on the slow line"
    share = max(one["python_share"] for one in COST["items"] if one["rows"] >= 1000)
    yield f"at most {100 * share:.0f} % of a clean batch's time"
    yield "> " + POOL["recommendation"]["sentence"]


@pytest.mark.parametrize(
    ("section", "make"),
    [
        ("Beside others", peers_table),
        ("Beside others", singles_table),
        ("The layer's own cost", wire_table),
    ],
)
def test_a_table_is_what_the_file_says_with_every_loser(section: str, make: Any) -> None:
    assert make() in _section(section), make()


@pytest.mark.parametrize("said", list(facts()))
def test_what_is_said_in_words_is_what_the_file_says(said: str) -> None:
    assert said in README


@pytest.mark.parametrize("name", ["foundation", "peers", "cost", "pool"])
def test_a_result_is_of_a_whole_run_and_says_of_which_commit_and_machine(name: str) -> None:
    result = _result(name)
    assert not result.get("quick")
    about = result.get("header") or result["about"]
    assert about["commit"]
    assert about["machine"]["cpu"]
    assert about["server"]["fsync"] == "on"


def test_the_soak_report_says_that_nothing_was_lost() -> None:
    text = json.dumps(_result("soak"))
    for name in ("lost", "doubled", "leaked"):
        assert re.search(rf'"{name}": (0|\[\])', text), text[:500]
