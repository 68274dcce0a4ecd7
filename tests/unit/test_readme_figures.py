"""The figures in the README are those of the committed result files, to the last digit shown."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.results import FIGURES, Result

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([≤≥] [\d.]+) \|$", README, re.MULTILINE)


def result(name: str) -> Result:
    return Result.read(ROOT / f"bench/results/{name}.json")


FOUNDATION, PEERS, COST = result("foundation"), result("peers"), result("cost")
POOL: dict[str, Any] = json.loads((ROOT / "bench/results/pool.json").read_text(encoding="utf-8"))


def test_every_figure_that_was_measured_is_shown_the_missed_ones_too() -> None:
    assert [name for name, _, _ in ROWS] == FOUNDATION.contenders(FIGURES)


@pytest.mark.parametrize(("name", "shown", "bound"), ROWS)
def test_it_is_what_the_file_says(name: str, shown: str, bound: str) -> None:
    assert shown == f"{FOUNDATION.median(FIGURES, name, 'figure'):.2f}"
    sign, limit = FOUNDATION.header["bounds"][name]
    assert bound == f"{sign} {limit:g}"


def _section(title: str) -> str:
    found = re.search(rf"^### {re.escape(title)}\n(.*?)(?=^#)", README, re.MULTILINE | re.DOTALL)
    assert found is not None, f"the README has no section '{title}'"
    return found[1]


def _table(lines: list[list[str]]) -> str:
    head, *rows = lines
    rule = ["---", *(["---:"] * (len(head) - 1))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _name(way: str) -> str:
    return f"**{way}**" if way.startswith("dbop_raw") else way


def peers_table() -> str:
    """Each way and each work on the direct line: its rate over the limit's."""
    cases = PEERS.cases("direct line")
    limit = "asyncpg COPY, good rows only"
    rows = [
        [_name(way)]
        + [
            PEERS.why(case, way)
            or f"{PEERS.median(case, way, 'rows/s') / PEERS.median(case, limit, 'rows/s'):.2g}"
            for case in cases
        ]
        for way in PEERS.contenders(cases[0])
    ]
    return _table([["rows/s over those of COPY", *(case.partition(": ")[2] for case in cases)], *rows])


def singles_table() -> str:
    """Each way to do one operation: messages, and time on both lines."""
    rows = [
        [
            _name(way),
            PEERS.why("one operation: round trips", way) or _trips(PEERS, way),
            *(_milliseconds(PEERS, line, way, "s") for line in ("direct line", "slow line")),
        ]
        for way in PEERS.contenders("one operation: round trips")
    ]
    return _table([["one operation", "round trips", "loopback", "slow line"], *rows])


def wire_table() -> str:
    """What `run` costs beside the same by hand."""
    rows = [
        [
            way,
            _trips(COST, way),
            f"{1e6 * COST.median('one operation: direct line', way, 'mean s'):.0f} µs",
            _milliseconds(COST, "slow line", way, "mean s"),
        ]
        for way in COST.contenders("one operation: round trips")
    ]
    return _table([["acquire to release", "round trips", "loopback", "slow line"], *rows])


def _trips(found: Result, way: str) -> str:
    return f"{found.median('one operation: round trips', way, 'round trips'):g}"


def _milliseconds(found: Result, line: str, way: str, unit: str) -> str:
    median = found.median(f"one operation: {line}", way, unit)
    return "" if found.why(f"one operation: {line}", way) else f"{1000 * median:.2f} ms"


def facts() -> Iterator[str]:
    """What the README says in words, word for word."""
    yield f"a round trip of {1000 * PEERS.median('round trip', 'slow line', 's'):.1f} ms"
    near, far, share = (COST.median(FIGURES, name, "figure") for name in COST.contenders(FIGURES))
    yield f"{near:.2f} times as fast on loopback"
    yield f"{far:.2f} on the slow line"
    yield f"at most {share:.0f} % of a clean batch's time"
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


@pytest.mark.parametrize("about", [FOUNDATION.header, PEERS.header, COST.header, POOL["about"]])
def test_a_result_is_of_a_whole_run_and_says_of_which_commit_and_machine(about: dict[str, Any]) -> None:
    assert not about.get("quick")
    assert about["commit"]
    assert about["machine"]["cpu"]
    assert about["server"]["fsync"] == "on"


def test_the_soak_report_says_that_nothing_was_lost() -> None:
    soak = result("soak")
    figures = {name: soak.values(FIGURES, name, "figure") for name in soak.contenders(FIGURES)}
    for word in ("lost", "doubled", "leaked"):
        assert [values for name, values in figures.items() if word in name] == [[0]], figures
