"""The chart of peers: one panel a case, a bar a way, on a logarithmic scale."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from bench.peers.report import Case, PeersReport, measured_cases

__all__ = ["draw"]

_COLOURS = {"limit": "#9aa0a6", "peer": "#e8a33d", "ours": "#1f77b4"}


def draw(report: PeersReport, path: Path) -> Path | None:
    """Write the PNG; None where matplotlib is not installed, or there is nothing to draw."""
    cases = measured_cases(report.cases)
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        return None
    if not cases:
        return None
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(8.5 * columns, 4.2 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        _panel(axis, case)
    figure.suptitle("Rows a second (bars: medians; whiskers: slowest and fastest round). Blue: dbop_raw")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _panel(axis: Any, case: Case) -> None:
    shown = sorted((one for one in case.measured if one.rate.samples), key=lambda one: one.rate.median)
    names = [one.way.name for one in shown]
    medians = [one.rate.median for one in shown]
    low = [one.rate.median - min(one.rate.samples) for one in shown]
    high = [max(one.rate.samples) - one.rate.median for one in shown]
    axis.barh(names, medians, xerr=[low, high], color=[_COLOURS[one.way.role] for one in shown])
    axis.set_xscale("log")
    axis.set_title(f"{case.name}, {case.line}", fontsize=10)
    axis.tick_params(labelsize=8)
    for place, value in enumerate(medians):
        axis.text(value * 1.05, place, f"{value:,.0f}", va="center", fontsize=7)
    # A bar has no end on a logarithmic scale: all begin at the same power of ten.
    axis.set_xlim(10 ** math.floor(math.log10(min(medians))), max(medians) * 3)
