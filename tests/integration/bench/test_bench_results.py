"""What all benchmarks share: taking turns, rows, verdicts, the command line. Nothing is timed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import flights, foundation
from bench.command import faults_of
from bench.measure import Case, NotMeasured, measure
from bench.quick import lost
from bench.report import Section, draw, markdown, verdict
from bench.results import ALL, FIGURES, Result

ABOUT = {"command": "", "when": "", "commit": "", "python": "", "machine": {}, "packages": {}}
ABOUT |= {"server": {}, "options": {}, "bench": "test"}


def empty() -> Result:
    return Result("test", ABOUT)


def counting(log: list[str], name: str, fails_at: int = 0) -> Callable[[], Awaitable[Mapping[str, float]]]:
    async def contender() -> Mapping[str, float]:
        log.append(name)
        if log.count(name) == fails_at:
            raise ValueError("no more")
        return {"s": log.count(name)}

    return contender


@pytest.mark.anyio
async def test_contenders_take_turns_and_none_is_always_first() -> None:
    log: list[str] = []
    contenders = {name: counting(log, name) for name in "abc"}
    result = empty()
    await measure([Case(name="x", rounds=3, open=lambda: nullcontext(contenders))], result)
    assert "".join(log) == "abc" + "bca" + "cab"
    assert [(row.round, row.value) for row in result.rows if row.contender == "a"] == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.anyio
async def test_the_round_that_warms_caches_does_not_count() -> None:
    contenders = {"a": counting([], "a")}
    result = empty()
    await measure([Case(name="x", rounds=2, open=lambda: nullcontext(contenders), warm=True)], result)
    assert result.values("x", "a", "s") == [2, 3]


@pytest.mark.anyio
async def test_a_contender_that_fails_has_its_reason_for_a_figure_and_the_others_go_on() -> None:
    log: list[str] = []
    contenders = {"a": counting(log, "a", fails_at=2), "b": counting(log, "b")}
    result = empty()
    await measure([Case(name="x", rounds=3, open=lambda: nullcontext(contenders))], result)
    assert result.values("x", "a", "s") == []
    assert result.why("x", "a") == "failed: ValueError: no more"
    assert result.values("x", "b", "s") == [1, 2, 3]
    assert log.count("a") == 2
    assert result.failures == ["x, a: failed: ValueError: no more"]


@pytest.mark.anyio
async def test_a_case_that_cannot_be_measured_says_why_and_is_no_failure() -> None:
    def unavailable() -> nullcontext[Mapping[str, Callable[[], Awaitable[Mapping[str, float]]]]]:
        raise NotMeasured("not measured: no data")

    result = empty()
    await measure([Case(name="x", rounds=3, open=unavailable)], result)
    assert result.why("x", "anybody") == "not measured: no data"
    assert result.failures == []


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = empty()
    result.add("x: y", "a", 1, {"s": 0.1, "rows/s": 1e9 / 3})
    result.fail("x: y", "b", "not installed")
    result.write(tmp_path / "test.json")
    found = Result.read(tmp_path / "test.json")
    assert (found.header, found.rows) == (result.header, result.rows)


@pytest.mark.parametrize(
    ("value", "sign", "expected"),
    [(1.0, "≥", "PASS"), (0.99, "≥", "MISS"), (1.0, "≤", "PASS"), (1.01, "≤", "MISS")],
)
def test_a_figure_is_held_against_its_bound(value: float, sign: str, expected: str) -> None:
    result = empty()
    result.figure("x", sign, 1.0, [value])
    assert verdict(result, "x") == expected
    assert faults_of(result) == ([] if expected == "PASS" else ["x: MISS"])


def test_a_table_shows_the_median_the_spread_the_ratio_and_why_there_is_none(tmp_path: Path) -> None:
    result = empty()
    for contender, values in {"base": (90, 100, 110), "dbop_raw": (40, 50, 60)}.items():
        for turn, value in enumerate(values, 1):
            result.add("line: work", contender, turn, {"rows/s": value})
    result.fail("line: work", "other", "not installed: x")
    section = Section(title="Title", units=("rows/s",), base="base", chart="rows/s")
    text = markdown(result, "Report", {"line": section})
    assert "|  | work |\n| --- | ---: |\n" in text
    assert (
        "| base | 100 (±10 %), 1 |\n| **dbop_raw** | 50 (±20 %), 0.5 |\n| other | not installed: x |\n"
        in text
    )
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    assert draw(result, {"line": section}, tmp_path / "chart.png") == ""
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_quick_tells_what_is_not_measured_any_more() -> None:
    before, now = empty(), empty()
    for contender in "abc":
        before.add("x: large", contender, 1, {"s": 1.0})
    now.add("x: small", "a", 1, {"s": 1.0})
    now.fail("x: small", "b", "not installed")
    assert list(lost(before, now)) == ["x, c: no s"]
    now.fail("x: other", ALL, "not measured: no data")
    assert list(lost(before, now)) == []


def test_what_was_not_measured_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfetchable(folder: Path) -> flights.Archive:
        raise flights.Unfetchable(f"not in {folder.name}")

    monkeypatch.setattr(flights, "fetch", unfetchable)
    only = ("--quick", "--only", "flights", "--only", "job", "--out", str(tmp_path))
    assert foundation.main(only) == 0
    result = Result.read(tmp_path / "foundation.json")
    assert [verdict(result, name) for name in result.contenders(FIGURES)] == ["not measured"] * 4
    # Where it is a whole run, that is a fault.
    assert len(faults_of(result)) == 4
    # A folder of this machine is nobody else's business.
    assert str(tmp_path) not in (tmp_path / "foundation.json").read_text(encoding="utf-8")


def test_the_command_line_knows_its_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [name for name in command.COMMANDS if f"scripts/bench {name} " not in out] == []
    assert command.main([]) == 2
    assert "foundation" in capsys.readouterr().err
    assert command.main(["nonsense"]) == 2
    assert "there is no benchmark 'nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["0", "-1", "many"])
def test_a_size_that_is_none_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        foundation.main(["--pairs", given])
    assert f"'{given}' is not a whole number of at least 1" in capsys.readouterr().err
