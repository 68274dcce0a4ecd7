"""The figures in the README are those of the committed result files, to the last digit shown."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([≤≥] [\d.]+) \|$", README, re.MULTILINE)
FIGURES = {
    figure["name"]: figure
    for figure in json.loads((ROOT / "bench/results/foundation.json").read_text(encoding="utf-8"))["figures"]
}


def test_every_figure_that_was_measured_is_shown_the_missed_ones_too() -> None:
    assert [name for name, _, _ in ROWS] == list(FIGURES)


@pytest.mark.parametrize(("name", "shown", "bound"), ROWS)
def test_it_is_what_the_file_says(name: str, shown: str, bound: str) -> None:
    figure = FIGURES[name]
    assert shown == f"{figure['value']:.2f}"
    sign = "≥" if figure["better"] == "at least" else "≤"
    assert bound == f"{sign} {figure['bound']:g}"


def test_the_soak_report_says_that_nothing_was_lost() -> None:
    report = json.loads((ROOT / "bench/results/soak.json").read_text(encoding="utf-8"))
    text = json.dumps(report)
    for name in ("lost", "doubled", "leaked"):
        assert re.search(rf'"{name}": (0|\[\])', text), text[:500]
