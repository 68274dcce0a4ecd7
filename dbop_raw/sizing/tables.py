"""The numbers as tables, for people, and as JSON has them: each measurement."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from dbop_raw.sizing.load import Window
from dbop_raw.sizing.model import PERCENTS, Estimate, Spread, percentiles
from dbop_raw.sizing.sweep import Row, Sweep

__all__ = ["Table", "rows_data", "spike_tables", "sweep_data", "sweep_tables"]


@dataclass(frozen=True, slots=True)
class Table:
    """A table: the first column is a name, the others are numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    marked: int | None = None
    """The row to point out."""

    def markdown(self) -> str:
        """As Markdown."""
        lines = [f"### {self.title}", ""]
        if self.rows:
            rule = ["---", *["---:"] * (len(self.head) - 1)]
            lines += [f"| {' | '.join(self.head)} |", f"|{'|'.join(rule)}|"]
        for number, row in enumerate(self.rows):
            cells = [f"**{cell}**" for cell in row] if number == self.marked else row
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])


def milliseconds(seconds: float) -> str:
    """With three digits or more."""
    value = seconds * 1000
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


_PERCENTILES = ("p50", "p95", "p99", "p99.9", "max")


def _percentiles(spread: Spread) -> tuple[str, ...]:
    return tuple(map(milliseconds, (spread.p50, spread.p95, spread.p99, spread.p999, spread.max)))


def sweep_tables(found: Sweep) -> list[Table]:
    """All that was measured, and the model."""
    ours = found.of("dbop_raw")
    marked = [row.cell.size for row in ours].index(found.advice.leaning)
    return [
        _times("dbop_raw, times in ms", ours, marked),
        _times("asyncpg by hand, times in ms: pool.acquire() and the same SQL", found.of("asyncpg"), None),
        _waits(ours, marked),
        _server(ours),
        _model(found),
    ]


def _times(title: str, rows: Sequence[Row], marked: int | None) -> Table:
    lines = []
    for row in rows:
        half = (max(row.throughputs) - min(row.throughputs)) / 2
        spread = f"{half / row.throughput:.1%}" if row.throughput else ""
        failed = f"{row.failed_share:.2%}" if row.failed_share else "0"
        lines.append(
            (str(row.cell.size), f"{row.throughput:,.0f}", spread, *_percentiles(row.latency), failed)
        )
    note = "`±`: half of what lies between the slowest round and the quickest."
    head = ("size", "req/s", "±", *_PERCENTILES, "failed")
    return Table(title, head, tuple(lines), note if marked is not None else "", marked)


def _waits(rows: Sequence[Row], marked: int) -> Table:
    head = ("size", "waited", *_PERCENTILES, "in use", "by Little", "queue")
    lines = [
        (
            str(row.cell.size),
            f"{row.wait_share:.0%}",
            *_percentiles(row.wait),
            f"{row.seen.in_use:.2f}",
            f"{row.in_use_by_little:.2f}",
            f"{row.seen.queue:.1f}",
        )
        for row in rows
    ]
    note = (
        "dbop_raw. `waited`: more than 0.1 ms; the percentiles are of all that asked, waiting or not. "
        "`in use` and `queue`: connections, and callers that wait, on average over samples; `by Little`: "
        "connections as throughput times the mean hold, which ends before a session is reset."
    )
    return Table("The wait for a connection, in ms", head, tuple(lines), note, marked)


def _server(rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        side = row.seen
        events = ", ".join(f"{name} {mean:.1f}" for name, mean in list(side.events.items())[:4])
        numbers = (f"{side.active:.1f}", f"{side.blocked:.1f}", f"{row.client_cpu:.0%}")
        lines.append((str(row.cell.size), *numbers, events or "none seen"))
    note = (
        "dbop_raw. Means over samples of pg_stat_activity: backends with a statement, those of them that "
        "wait inside the server, and what the backends did (CPU: no wait of the server's own; "
        "Client:ClientRead: in a transaction, the client's turn). `client`: of one core, used by the "
        "measuring process."
    )
    head = ("size", "active", "waiting", "client", "backends by wait event")
    return Table("The server meanwhile", head, tuple(lines), note)


def _model(found: Sweep) -> Table:
    law, title, head = found.fit, "Universal Scalability Law", ("parameter", "fitted", "95 % interval")
    if law is None:
        return Table(title, head, (), f"No fit: {found.unfitted}.")
    lines = [
        ("requests/s of one connection", *_estimate(law.rate, ",.0f")),
        ("sigma, what must be done in turn", *_estimate(law.sigma, ".3g")),
        ("kappa, what each costs each other", *_estimate(law.kappa, ".3g")),
        ("size of the peak", *(_estimate(law.peak, ".1f") if law.peak else _NO_PEAK)),
    ]
    return Table(title, head, tuple(lines), f"R² = {law.explained:.3f}.")


_NO_PEAK = ("none", "far beyond what was measured")


def _estimate(found: Estimate, form: str) -> tuple[str, str]:
    most = "or more" if math.isinf(found.high) else f"to {found.high:{form}}"
    return f"{found.value:{form}}", f"{found.low:{form}} {most}"


def spike_tables(rows: Sequence[Row]) -> list[Table]:
    """The bursts."""
    lines, waits = [], []
    for row in rows:
        name = (
            f"{'full' if row.cell.least == row.cell.size else 'grows'}, {row.cell.least} to {row.cell.size}"
        )
        opened = sum(one.opened for one in row.rounds) / len(row.rounds)
        done = sum(one.load.window.seconds for one in row.rounds) / len(row.rounds)
        failed = str(sum(one.load.failed for one in row.rounds))
        lines.append((name, f"{opened:.1f}", milliseconds(done), *_percentiles(row.latency), failed))
        waits.append((name, *_percentiles(row.wait)))
    note = "`opened`: connections opened during a burst, on average."
    return [
        Table(
            "A burst, times in ms",
            ("pool", "opened", "all done", *_PERCENTILES, "failed"),
            tuple(lines),
            note,
        ),
        Table("The wait for a connection, in ms", ("pool", *_PERCENTILES), tuple(waits)),
    ]


# --- JSON


def sweep_data(found: Sweep) -> dict[str, Any]:
    """A sweep for JSON; times in seconds, shares from 0 to 1."""
    law: dict[str, Any] = {"why_not": found.unfitted}
    if found.fit is not None:
        names = ("rate", "sigma", "kappa", "peak", "explained")
        law = {"law": "X(N) = rate N / (1 + sigma (N - 1) + kappa N (N - 1))"}
        law |= {name: _plain(getattr(found.fit, name)) for name in names}
    return {"recommendation": _plain(found.advice), "model": law, **rows_data(found.rows)}


def rows_data(rows: Sequence[Row]) -> dict[str, Any]:
    """The measurements for JSON: each; at `percents` is the `curve` of durations."""
    return {"percents": list(PERCENTS), "rows": _plain(rows)}


def _plain(value: Any) -> Any:
    """As JSON has it, numbers to six digits; it has no infinity: null means that there is no bound.

    Of a window its seconds are kept, and of an array of durations two percentiles.
    """
    if isinstance(value, Window):
        value = value.seconds
    elif isinstance(value, array):
        value = dict(zip(("p50", "p99"), percentiles(value, (50, 99)), strict=True))
    elif is_dataclass(value):
        value = {one.name: getattr(value, one.name) for one in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
