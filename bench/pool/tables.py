"""The numbers as tables, for the terminal, for Markdown and for HTML: one source for all three."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.pool.histogram import Spread
from bench.pool.model import Estimate, little
from bench.pool.spike import Spike
from bench.pool.sweep import Row, Sweep

__all__ = ["Table", "milliseconds", "spike_tables", "sweep_tables"]


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
            lines.append(f"| {' | '.join(self.head)} |")
            lines.append(f"|{'|'.join('---' if not n else '---:' for n in range(len(self.head)))}|")
        for number, row in enumerate(self.rows):
            cells = [f"**{cell}**" if number == self.marked else cell for cell in row]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])


def milliseconds(seconds: float) -> str:
    """With three digits or more."""
    value = seconds * 1000
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def sweep_tables(found: Sweep) -> list[Table]:
    """All that was measured, and the model."""
    advice, sizes = found.advice, [row.cell.size for row in found.of("dbop_raw")]
    marked = sizes.index(advice.leaning)
    return [
        _main("dbop_raw, times in ms", found.of("dbop_raw"), marked),
        _main("asyncpg by hand, times in ms: pool.acquire() and the same SQL", found.of("asyncpg"), None),
        _waits(found.of("dbop_raw"), marked),
        _server(found.of("dbop_raw")),
        _model(found),
    ]


def _main(title: str, rows: Sequence[Row], marked: int | None) -> Table:
    lines = []
    for row in rows:
        low, high = min(row.throughputs), max(row.throughputs)
        lines.append(
            (
                str(row.cell.size),
                f"{row.throughput:,.0f}",
                f"{(high - low) / 2 / row.throughput:.1%}" if row.throughput else "",
                *_percentiles(row.latencies.spread()),
                f"{row.failed:.2%}" if row.failed else "0",
            )
        )
    note = "`±`: half of what lies between the slowest round and the quickest."
    head = ("size", "req/s", "±", "p50", "p95", "p99", "p99.9", "max", "failed")
    return Table(title, head, tuple(lines), note if marked is not None else "", marked)


def _percentiles(spread: Spread) -> tuple[str, ...]:
    return tuple(
        milliseconds(value) for value in (spread.p50, spread.p95, spread.p99, spread.p999, spread.max)
    )


def _waits(rows: Sequence[Row], marked: int) -> Table:
    head = ("size", "waited", "p50", "p95", "p99", "p99.9", "max", "in use", "by Little", "queue")
    lines = tuple(
        (
            str(row.cell.size),
            f"{row.wait_share:.0%}",
            *_percentiles(row.waits.spread()),
            f"{row.mean('in_use'):.2f}",
            f"{little(row.throughput, row.mean('hold')):.2f}",
            f"{row.mean('queue'):.1f}",
        )
        for row in rows
    )
    note = (
        "dbop_raw. `waited`: more than 0.1 ms; the percentiles are of all that asked, waiting or not. "
        "`in use`: connections, on average over the time; `by Little`: the same, as throughput times the "
        "mean hold."
    )
    return Table("The wait for a connection, in ms", head, lines, note, marked)


def _server(rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        server = row.server
        events = ", ".join(f"{name} {mean:.1f}" for name, mean in list(server.events.items())[:4])
        lines.append(
            (
                str(row.cell.size),
                f"{server.active:.1f}",
                f"{server.blocked:.1f}",
                f"{row.mean('client_cpu'):.0%}",
                events or "none seen",
            )
        )
    note = (
        "dbop_raw. Means over samples of pg_stat_activity: backends with a statement, those of them that "
        "wait inside the server, and what the backends did (CPU: no wait of the server's own; "
        "Client:ClientRead: in a transaction, the client's turn). `client`: of one core, used by the "
        "measuring process."
    )
    head = ("size", "active", "waiting", "client", "backends by wait event")
    return Table("The server meanwhile", head, tuple(lines), note)


def _model(found: Sweep) -> Table:
    law = found.fit
    title, head = "Universal Scalability Law", ("parameter", "fitted", "95 % interval")
    if law is None:
        return Table(title, head, (), f"No fit: {found.unfitted}.")
    lines = [
        ("requests/s of one connection", f"{law.rate.value:,.0f}", _interval(law.rate, ",.0f")),
        ("sigma, what must be done in turn", f"{law.sigma.value:.3g}", _interval(law.sigma, ".3g")),
        ("kappa, what each costs each other", f"{law.kappa.value:.3g}", _interval(law.kappa, ".3g")),
    ]
    if law.peak is None:
        lines.append(("size of the peak", "none", "far beyond what was measured"))
    else:
        lines.append(("size of the peak", f"{law.peak.value:.1f}", _interval(law.peak, ".1f")))
    return Table(title, head, tuple(lines), f"R² = {law.explained:.3f}.")


def _interval(estimate: Estimate, form: str) -> str:
    if math.isinf(estimate.high):
        return f"{estimate.low:{form}} or more"
    return f"{estimate.low:{form}} to {estimate.high:{form}}"


def spike_tables(found: Spike) -> list[Table]:
    """The bursts."""
    head = ("pool", "opened", "all done", "p50", "p95", "p99", "p99.9", "max", "failed")
    lines = tuple(
        (
            row.name,
            f"{row.mean('opened'):.1f}",
            milliseconds(row.mean("seconds")),
            *_percentiles(row.latencies.spread()),
            str(sum(sum(burst.errors.values()) for burst in row.bursts)),
        )
        for row in found.rows
    )
    waits = tuple((row.name, *_percentiles(row.waits.spread())) for row in found.rows)
    return [
        Table(
            "A burst, times in ms", head, lines, "`opened`: connections opened during a burst, on average."
        ),
        Table("The wait for a connection, in ms", ("pool", "p50", "p95", "p99", "p99.9", "max"), waits),
    ]
