"""The charts, drawn without a display."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from bench.pool.spike import Spike
from bench.pool.sweep import Row, Sweep

__all__ = ["draw_spike", "draw_sweep"]

OURS, BARE, MODEL, MARK, WAITS = "#1f5fa8", "#8a8a8a", "#7aa6d8", "#c2410c", "#b45309"
# Wait events in the last panel; what is rarer is added up.
EVENTS = 5


def draw_sweep(found: Sweep, title: str) -> bytes:
    """Throughput, p99, wait share and what client and server did over size, and the pool over time: a PNG."""
    figure = Figure(figsize=(15, 8), dpi=110, layout="constrained")
    panels = figure.subplots(2, 3)
    ours, bare = found.of("dbop_raw"), found.of("asyncpg")
    _throughput(panels[0][0], found, ours, bare)
    _p99(panels[0][1], ours, bare)
    _wait_share(panels[0][2], ours)
    _server(panels[1][0], ours)
    _client(panels[1][1], ours, bare)
    for axes in (*panels[0], *panels[1][:2]):
        _mark(axes, found)
    _over_time(panels[1][2], ours)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return _png(figure)


def _sizes(axes: Axes, rows: Sequence[Row]) -> list[int]:
    sizes = [row.cell.size for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("connections in the pool")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return sizes


def _throughput(axes: Axes, found: Sweep, ours: Sequence[Row], bare: Sequence[Row]) -> None:
    sizes = _sizes(axes, ours)
    axes.set_title("Throughput", loc="left")
    axes.set_ylabel("requests a second")
    if found.fit is not None:
        grid = np.geomspace(sizes[0], sizes[-1], 60)
        law = [found.fit.throughput(float(size)) for size in grid]
        axes.fill_between(
            grid, [one.low for one in law], [one.high for one in law], color=MODEL, alpha=0.25, linewidth=0
        )
        axes.plot(grid, [one.value for one in law], color=MODEL, label="scalability law, 95 %", zorder=2)
    for rows, colour, name in ((bare, BARE, "asyncpg by hand"), (ours, OURS, "dbop_raw")):
        axes.plot(sizes, [row.throughput for row in rows], "o-", color=colour, label=name, markersize=5)
        for row in rows:
            axes.plot([row.cell.size] * len(row.throughputs), row.throughputs, ".", color=colour, alpha=0.4)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _p99(axes: Axes, ours: Sequence[Row], bare: Sequence[Row]) -> None:
    sizes = _sizes(axes, ours)
    axes.set_title("99th percentile", loc="left")
    axes.set_ylabel("milliseconds")
    for rows, colour, name in ((bare, BARE, "asyncpg by hand"), (ours, OURS, "dbop_raw")):
        axes.plot(
            sizes, _ms(row.latencies.at(99) for row in rows), "o-", color=colour, label=name, markersize=5
        )
        for row in rows:
            by_round = _ms(one.latencies.at(99) for one in row.rounds)
            axes.plot([row.cell.size] * len(by_round), by_round, ".", color=colour, alpha=0.4)
    waits = _ms(row.waits.at(99) for row in ours)
    axes.plot(sizes, waits, "s--", color=WAITS, label="of it, the wait for a connection", markersize=4)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _ms(seconds: Iterable[float]) -> list[float]:
    return [value * 1000 for value in seconds]


def _wait_share(axes: Axes, ours: Sequence[Row]) -> None:
    sizes = _sizes(axes, ours)
    axes.set_title("Requests that waited for a connection", loc="left")
    axes.plot(sizes, [row.wait_share for row in ours], "o-", color=WAITS, label="dbop_raw", markersize=5)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(0, 1.05)


def _server(axes: Axes, ours: Sequence[Row]) -> None:
    sizes = _sizes(axes, ours)
    axes.set_title("What the backends did", loc="left")
    axes.set_ylabel("backends, mean")
    totals: dict[str, float] = {}
    for row in ours:
        for name, mean in row.server.events.items():
            totals[name] = totals.get(name, 0.0) + mean
    names = sorted(totals, key=lambda name: -totals[name])
    shown = names[:EVENTS]
    layers = {name: [row.server.events.get(name, 0.0) for row in ours] for name in shown}
    if len(names) > EVENTS:
        layers["other waits"] = [
            sum(mean for name, mean in row.server.events.items() if name not in shown) for row in ours
        ]
    if layers:
        axes.stackplot(sizes, *layers.values(), labels=list(layers), alpha=0.8)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.set_ylim(bottom=0)


def _client(axes: Axes, ours: Sequence[Row], bare: Sequence[Row]) -> None:
    sizes = _sizes(axes, ours)
    axes.set_title("The client's own CPU, of one core", loc="left")
    for rows, colour, name in ((bare, BARE, "asyncpg by hand"), (ours, OURS, "dbop_raw")):
        busy = [row.mean("client_cpu") for row in rows]
        axes.plot(sizes, busy, "o-", color=colour, label=name, markersize=5)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(0, 1.1)
    axes.legend(frameon=False, fontsize=8)


def _over_time(axes: Axes, ours: Sequence[Row]) -> None:
    axes.set_title("Connections in use over time, last round", loc="left")
    axes.set_xlabel("seconds")
    for number, row in enumerate(ours):
        looks = row.rounds[-1].samples
        colour = colormaps["viridis"](number / max(1, len(ours) - 1) * 0.9)
        label = str(row.cell.size)
        axes.plot([look.at for look in looks], [look.in_use for look in looks], color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, title="size", title_fontsize=8, loc="center right")


def _mark(axes: Axes, found: Sweep) -> None:
    """The recommended size; dotted where the data can't decide."""
    advice = found.advice
    decided = advice.size is not None
    axes.axvline(advice.leaning, color=MARK, linestyle="-" if decided else ":", linewidth=1.2, zorder=1)
    low, high = axes.get_xlim()
    if low <= advice.by_formula <= high:
        axes.axvline(advice.by_formula, color=BARE, linestyle="--", linewidth=0.8, zorder=1)
        axes.annotate(
            " formula",
            (advice.by_formula, 0.94),
            xycoords=("data", "axes fraction"),
            color=BARE,
            va="top",
            fontsize=8,
        )
    label = f" {advice.leaning}" if decided else f" {advice.leaning}?"
    axes.annotate(
        label, (advice.leaning, 1.0), xycoords=("data", "axes fraction"), color=MARK, va="top", fontsize=9
    )


def draw_spike(found: Spike, title: str) -> bytes:
    """How many requests of a burst were done within a time, as a PNG."""
    figure = Figure(figsize=(9, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    percents = np.linspace(0, 100, 201)
    for row, colour in zip(found.rows, (WAITS, OURS), strict=True):
        latencies = row.latencies
        times = [max(latencies.at(float(percent)), 1e-6) for percent in percents]
        axes.plot(times, percents, color=colour, label=f"pool {row.name}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds * 1000:g} ms"))
    axes.set_xlabel("time from the burst to the answer")
    axes.set_ylabel("requests answered")
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    out = BytesIO()
    # By its own canvas and not by pyplot, whose figures are global and look for a display.
    FigureCanvasAgg(figure)
    figure.savefig(out, format="png")
    return out.getvalue()
