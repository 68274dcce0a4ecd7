"""The benchmark of the foundation: with small sizes its report is whole; what it measures is not judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import flights, foundation
from bench.report import Figure

BOUNDS = [0.9, 0.55, 0.28, 0.2, 0.17, 0.15, 0.9]


def run(path: Path, *sections: str) -> dict[str, object]:
    only = [part for section in sections for part in ("--only", section)]
    assert foundation.main(["--quick", "--output", str(path), *only]) == 0
    found: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_its_report_is_whole_without_the_flights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path / "x.json", "pairs", "memory")
    figures = found["figures"]
    assert isinstance(figures, list)
    assert [one["bound"] for one in figures] == [*BOUNDS, 1.1]
    for one in figures:
        assert one["value"] > 0
        assert one["verdict"] in {"PASS", "MISS"}
    out = capsys.readouterr().out
    assert out.count("\n| two columns") == 7
    for text in ("fsync on", "asyncpg", "cores", "these figures mean nothing"):
        assert text in out


def test_its_report_is_whole_with_the_flights(tmp_path: Path) -> None:
    if not (flights.demo_folder() / f"{flights.PACKAGE}-{flights.VERSION}.tar.gz").exists():
        pytest.skip("the real data was not fetched: ./scripts/ingest does")
    figures = run(tmp_path / "x.json", "flights")["figures"]
    assert isinstance(figures, list)
    assert [one["bound"] for one in figures] == [0.5, 0.5, 10]


def test_what_was_not_measured_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfetchable(folder: Path) -> flights.Archive:
        raise flights.Unfetchable(f"not in {folder.name}")

    monkeypatch.setattr(flights, "fetch", unfetchable)
    figures = run(tmp_path / "x.json", "flights", "job")["figures"]
    assert isinstance(figures, list)
    assert {one["verdict"] for one in figures} == {"not measured"}
    assert len(figures) == 4


@pytest.mark.parametrize(
    ("value", "better", "verdict"),
    [
        (1.0, "at least", "PASS"),
        (0.99, "at least", "MISS"),
        (1.0, "at most", "PASS"),
        (1.01, "at most", "MISS"),
    ],
)
def test_a_miss_is_a_miss(value: float, better: str, verdict: str) -> None:
    figure = Figure("x", value, 1.0, "at least" if better == "at least" else "at most")
    assert figure.verdict == verdict


def test_the_command_line_knows_its_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    assert "foundation" in capsys.readouterr().out
    assert command.main(["nonsense"]) == 2
