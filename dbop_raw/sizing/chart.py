"""The pictures, drawn without a display."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from dbop_raw.sizing.model import percentiles
from dbop_raw.sizing.sweep import Row, Sweep

__all__ = ["draw_spike", "draw_sweep"]

_OURS, _BARE, _MODEL, _MARK, _WAITS = "#1f5fa8", "#8a8a8a", "#7aa6d8", "#c2410c", "#b45309"
# Wait events in their panel; what is rarer is added up.
_EVENTS = 5


def draw_sweep(found: Sweep, title: str) -> bytes:
    """Throughput, p99, wait share and what server and client did, over size: a PNG."""
    figure = Figure(figsize=(15, 8), dpi=110, layout="constrained")
    throughput, p99, share, server, client = figure.subplot_mosaic("TTTPPP;WWSSCC").values()
    ours, bare = found.of("dbop_raw"), found.of("asyncpg")
    pair = ((bare, _BARE, "asyncpg by hand"), (ours, _OURS, "dbop_raw"))
    for axes, heading, unit in (
        (throughput, "Throughput", "requests a second"),
        (p99, "99th percentile", "milliseconds"),
        (share, "Requests that waited for a connection", ""),
        (server, "What the backends did", "backends, mean"),
        (client, "The client's own CPU, of one core", ""),
    ):
        _over_size(axes, heading, unit, [row.cell.size for row in ours])
    _law(throughput, found)
    for rows, colour, name in pair:
        _line(throughput, rows, lambda row: row.throughput, colour, name, lambda row: row.throughputs)
        _line(p99, rows, lambda row: _ms(row.latency.p99), colour, name, lambda row: map(_ms, row.p99s))
        _line(client, rows, lambda row: row.client_cpu, colour, name)
    _line(p99, ours, lambda row: _ms(row.wait.p99), _WAITS, "of it, the wait for a connection", style="s--")
    _line(share, ours, lambda row: row.wait_share, _WAITS, "dbop_raw")
    _events(server, ours)
    for axes, most in ((share, 1.05), (client, 1.1)):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, most)
    for axes in (throughput, p99, share, server, client):
        axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        _mark(axes, found)
    return _png(figure, title)


def _ms(seconds: float) -> float:
    return seconds * 1000


def _over_size(axes: Axes, heading: str, unit: str, sizes: Sequence[int]) -> None:
    axes.set_title(heading, loc="left")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel(unit)
    axes.set_xlabel("connections in the pool")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())


def _line(
    axes: Axes,
    rows: Sequence[Row],
    value: Callable[[Row], float],
    colour: str,
    name: str,
    by_round: Callable[[Row], Iterable[float]] = lambda _: (),
    style: str = "o-",
) -> None:
    axes.plot(
        [row.cell.size for row in rows], list(map(value, rows)), style, color=colour, label=name, markersize=5
    )
    for row in rows:
        dots = list(by_round(row))
        axes.plot([row.cell.size] * len(dots), dots, ".", color=colour, alpha=0.4)


def _law(axes: Axes, found: Sweep) -> None:
    if found.fit is None:
        return
    sizes = [row.cell.size for row in found.rows]
    grid = np.geomspace(min(sizes), max(sizes), 60)
    law = [found.fit.throughput(float(size)) for size in grid]
    low, high = [one.low for one in law], [one.high for one in law]
    axes.fill_between(grid, low, high, color=_MODEL, alpha=0.25, linewidth=0)
    axes.plot(grid, [one.value for one in law], color=_MODEL, label="scalability law, 95 %", zorder=2)


def _events(axes: Axes, rows: Sequence[Row]) -> None:
    names = {
        name: sum(row.seen.events.get(name, 0.0) for row in rows) for row in rows for name in row.seen.events
    }
    shown = sorted(names, key=lambda name: -names[name])[:_EVENTS]
    layers = {name: [row.seen.events.get(name, 0.0) for row in rows] for name in shown}
    if len(names) > _EVENTS:
        whole = [sum(row.seen.events.values()) for row in rows]
        layers["other waits"] = [
            total - sum(column) for total, *column in zip(whole, *layers.values(), strict=True)
        ]
    if layers:
        axes.stackplot([row.cell.size for row in rows], *layers.values(), labels=list(layers), alpha=0.8)


def _mark(axes: Axes, found: Sweep) -> None:
    """The recommended size, dotted where the data can't decide; and the formula's."""
    advice = found.advice
    decided = advice.size is not None
    low, high = axes.get_xlim()
    for size, name, colour, style, height in (
        (advice.leaning, f" {advice.leaning}{'' if decided else '?'}", _MARK, "-" if decided else ":", 1.0),
        (advice.by_formula, " formula", _BARE, "--", 0.94),
    ):
        if low <= size <= high:
            axes.axvline(size, color=colour, linestyle=style, linewidth=1.0, zorder=1)
            place = ("data", "axes fraction")
            axes.annotate(name, (size, height), xycoords=place, color=colour, va="top", fontsize=8)


def draw_spike(rows: Sequence[Row], title: str) -> bytes:
    """How many requests of a burst were done within a time, as a PNG."""
    figure = Figure(figsize=(9, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    shares = [float(share) for share in np.linspace(0, 100, 201)]
    for row, colour in zip(rows, (_WAITS, _OURS), strict=False):
        latencies = np.concatenate([one.load.latencies for one in row.rounds])
        times = [max(time, 1e-6) for time in percentiles(latencies, shares)]
        axes.plot(times, shares, color=colour, label=f"pool of {row.cell.least} to {row.cell.size}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds * 1000:g} ms"))
    axes.set_xlabel("time from the burst to the answer")
    axes.set_ylabel("requests answered")
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.legend(frameon=False)
    return _png(figure, title)


def _png(figure: Figure, title: str) -> bytes:
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    out = BytesIO()
    # By its own canvas and not by pyplot, whose figures are global and look for a display.
    FigureCanvasAgg(figure)
    figure.savefig(out, format="png")
    return out.getvalue()
