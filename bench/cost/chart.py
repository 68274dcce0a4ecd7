"""The chart of cost: the layers, the batches' rates, and what is Python's share of them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from bench.cost.report import SHARE_BOUND, CostReport
from bench.cost.wire import speedup

__all__ = ["draw"]

_OURS, _BARE = "#1f77b4", "#9aa0a6"


def draw(report: CostReport, path: Path) -> Path | None:
    """Write the PNG; None where matplotlib is not installed."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        return None
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(2, 2, figsize=(15, 9), layout="constrained")
    _bars(axes[0][0], report)
    _rates(axes[0][1], report)
    _lines(axes[1][0], report, "failures", "share of bad rows (copy_into)")
    _lines(axes[1][1], report, "workers", "workers of an ingest")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _bars(axis: Any, report: CostReport) -> None:
    shown = list(reversed(report.wire))
    colours = [_BARE if "asyncpg" in one.name or "by hand" in one.name else _OURS for one in shown]
    axis.barh([one.name for one in shown], [1e6 * one.seconds.median for one in shown], color=colours)
    axis.set_title(f"One operation on a server, µs ({speedup(report.wire):.2f} times as fast as by hand)")
    axis.tick_params(labelsize=8)


def _rates(axis: Any, report: CostReport) -> None:
    for writer in ("copy_into", "copy_text", "execute_many"):
        pairs = [one for one in report.items if one.name.startswith(writer)]
        axis.plot([one.rows for one in pairs], [100 * one.python_share for one in pairs], "o-", label=writer)
    axis.axhline(100 * SHARE_BOUND, color="#c0392b", linestyle="--", label="bound")
    axis.set_xscale("log")
    axis.set_xlabel("items")
    axis.set_title("Python's share of a batch's time, %")
    axis.legend(fontsize=8)


def _lines(axis: Any, report: CostReport, what: str, label: str) -> None:
    pairs = getattr(report, what)
    names = [one.name.removeprefix("copy_into, two columns, ") for one in pairs]
    axis.plot(
        names, [one.rows / one.bare_seconds.median for one in pairs], "o--", color=_BARE, label="bare COPY"
    )
    axis.plot(names, [one.rows / one.seconds.median for one in pairs], "o-", color=_OURS, label="dbop_raw")
    axis.set_yscale("log")
    axis.set_title(f"Items a second, over {label}")
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8)
