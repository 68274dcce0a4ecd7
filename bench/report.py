"""What a result says, as tables in Markdown and as charts: drawn from its rows alone, so also again later."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results import FIGURES, Result, name_of

_FORMATS = {
    "bytes": ",.0f",
    "blocks": ".2f",
    "MiB": ".1f",
    "figure": ".2f",
    "times bare": ".2f",
    "% Python": ".1f",
}
_OURS, _LIMIT, _OTHER = "#1f77b4", "#9aa0a6", "#e8a33d"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """How the cases of a section are shown: a table with a line a contender, and a column a case and unit."""

    title: str
    text: str = ""
    units: Sequence[str] = ()
    base: str = ""
    """The contender to which each figure's ratio is said."""
    by_case: bool = False
    """A line a case instead, and a column a contender and unit."""
    chart: str = ""
    """The unit that is drawn."""


def shown(value: float, unit: str) -> str:
    if unit in _FORMATS:
        return f"{value:{_FORMATS[unit]}}"
    if unit.endswith("/s"):
        return f"{value:,.0f}"
    if unit != "s" and not unit.endswith(" s"):
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"
    if value < 0.001:
        return f"{1e6 * value:.{1 if value < 0.0001 else 0}f} µs"
    return f"{1000 * value:.2f} ms" if value < 1 else f"{value:.1f} s"


def text_of(result: Result, case: str, contender: str, unit: str, base: str = "") -> str:
    """A cell: the median, half of what lies between the extreme rounds, the ratio; or why there is none."""
    values = result.values(case, contender, unit)
    if not values:
        return result.why(case, contender)
    median = statistics.median(values)
    text = shown(median, unit)
    # Of what is about nothing, a spread in % says nothing.
    if len(values) > 1 and unit not in {"bytes", "blocks"}:
        text += f" (±{50 * (max(values) - min(values)) / median if median else 0:.0f} %)"
    ratio = median / result.median(case, base, unit) if base else 0
    return f"{text}, {ratio:.2g}" if ratio > 0 else text


def markdown(result: Result, title: str, sections: Mapping[str, Section]) -> str:
    """All of it as one document."""
    parts = [f"# {title}\n"]
    if result.header.get("quick"):
        parts.append("**Quick sizes: these figures mean nothing.**\n")
    parts.append(_header(result.header))
    if result.cases(FIGURES):
        parts += ["## Figures and bounds\n", _bounds(result)]
    for name, section in sections.items():
        if result.cases(name) or not section.units:
            parts += [f"## {section.title}\n", section.text and f"{section.text}\n"]
            parts += [_table(result, name, section)] if section.units else []
    return "\n".join(filter(None, parts))


def verdict(result: Result, figure: str) -> str:
    """Is the figure's bound met? PASS or MISS, or that it was not measured."""
    if not result.values(FIGURES, figure, "figure"):
        return "not measured"
    (sign, bound), value = result.header["bounds"][figure], result.median(FIGURES, figure, "figure")
    return "PASS" if (value >= bound if sign == "≥" else value <= bound) else "MISS"


def _bounds(result: Result) -> str:
    lines = [["", "measured", "bound", ""]]
    for figure in result.contenders(FIGURES):
        sign, bound = result.header["bounds"][figure]
        measured = text_of(result, FIGURES, figure, "figure")
        lines.append([figure, measured, f"{sign} {bound:g}", verdict(result, figure)])
    return markdown_table(lines)


def _table(result: Result, name: str, section: Section) -> str:
    cases = result.cases(name)
    contenders = list(dict.fromkeys(one for case in cases for one in result.contenders(case)))
    there = {(row.case, row.unit) for row in result.rows} | {(row.contender, row.unit) for row in result.rows}
    lines, others = (cases, contenders) if section.by_case else (contenders, cases)
    columns = [(other, unit) for other in others for unit in section.units if (other, unit) in there]
    # What all columns have in common is not said in each.
    alone = len(section.units) == 1
    said = [
        {unit: 0} if other == name else {name_of(other): 0} if alone else {name_of(other): 0, unit: 0}
        for other, unit in columns
    ]
    table = [["", *map(", ".join, said)]]
    for line in lines:
        pairs = [(line, other) if section.by_case else (other, line) for other, _ in columns]
        cells = [
            text_of(result, case, contender, unit, section.base)
            for (case, contender), (_, unit) in zip(pairs, columns, strict=True)
        ]
        table.append([_label(line, section), *cells])
    return markdown_table(table)


def _label(line: str, section: Section) -> str:
    return name_of(line) if section.by_case else f"**{line}**" if line.startswith("dbop_raw") else line


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """The first line is the header; the first column is text, the others are numbers."""
    head, *rest = lines
    rule = ["---", *(["---:"] * (len(head) - 1))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rest)) + "\n"


def _header(about: Mapping[str, Any]) -> str:
    def listed(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items())

    lines = (
        f"`{about['command']}`, {about['when']}, commit {about['commit']}, Python {about['python']}",
        listed(about["machine"]),
        listed(about["packages"]),
        f"PostgreSQL: {listed(about['server'])}",
        f"options: {listed(about['options'])}",
    )
    return "\n".join(f"- {line}" for line in lines) + "\n"


def draw(result: Result, sections: Mapping[str, Section], path: Path) -> str:
    """Write the PNG; gives why there is none, empty where there is one."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 - all else works without it
        import matplotlib.pyplot as plt  # noqa: PLC0415
    except ImportError:
        return "no chart: matplotlib is not installed (pip install 'dbop-raw[bench]')"
    panels = [
        (section, cases)
        for name, section in sections.items()
        for cases in ([result.cases(name)] if section.by_case else [[case] for case in result.cases(name)])
        if any(row.unit == section.chart and row.case in cases for row in result.rows)
    ]
    if not panels:
        return "no chart: nothing to draw"
    mpl.use("Agg")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    size = (8.5 * columns, 4.2 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (section, cases) in zip(axes.flat, panels, strict=False):
        axis.tick_params(labelsize=8)
        (_curves if section.by_case else _bars)(axis, result, section, cases)
    figure.suptitle("Medians; whiskers: slowest and fastest round. Blue: dbop_raw")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return ""


def _bars(axis: Any, result: Result, section: Section, cases: Sequence[str]) -> None:
    (case,) = cases
    found = {name: result.values(case, name, section.chart) for name in result.contenders(case)}
    medians = {name: statistics.median(values) for name, values in found.items() if values}
    names = sorted(medians, key=medians.__getitem__)
    low = [medians[name] - min(found[name]) for name in names]
    high = [max(found[name]) - medians[name] for name in names]
    colours = [
        _OURS if name.startswith(("dbop_raw", "run")) else _LIMIT if "good rows only" in name else _OTHER
        for name in names
    ]
    axis.barh(names, [medians[name] for name in names], xerr=[low, high], color=colours)
    for place, name in enumerate(names):
        axis.text(medians[name] * 1.05, place, shown(medians[name], section.chart), va="center", fontsize=7)
    axis.set_title(f"{section.title}: {name_of(case)}, {section.chart}", fontsize=10)
    if names and medians[names[-1]] > 20 * medians[names[0]] > 0:
        axis.set_xscale("log")
        # A bar has no end on a logarithmic scale: all begin at the same power of ten.
        axis.set_xlim(10 ** math.floor(math.log10(medians[names[0]])), medians[names[-1]] * 3)


def _curves(axis: Any, result: Result, section: Section, cases: Sequence[str]) -> None:
    for name in reversed(result.contenders(cases[0])):
        points = {name_of(case): result.median(case, name, section.chart) for case in cases}
        if all(map(math.isnan, points.values())):
            continue
        axis.plot(list(points), list(points.values()), "o-", label=name)
        if max(points.values()) > 20 * min(points.values()) > 0:
            axis.set_yscale("log")
    axis.set_title(f"{section.title}, {section.chart}", fontsize=10)
    axis.legend(fontsize=8)
