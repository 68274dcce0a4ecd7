"""One run, from the first connection to the report: what `dbop-raw pool-size` does."""

from __future__ import annotations

import os

from dbop_raw.sizing.chart import draw_spike, draw_sweep
from dbop_raw.sizing.measure import ready
from dbop_raw.sizing.options import Options
from dbop_raw.sizing.origin import about, server_settings
from dbop_raw.sizing.report import Report
from dbop_raw.sizing.sweep import Progress, conclude, planned_seconds, spike_sentence, sweep
from dbop_raw.sizing.tables import rows_data, spike_tables, sweep_data, sweep_tables
from dbop_raw.sizing.workloads import Workload

__all__ = ["planned_seconds", "run"]

# A load of less than this a core is a quiet machine.
_QUIET = 0.5


async def run(dsn: str, options: Options, workload: Workload, *, kind: str, progress: Progress) -> Report:
    """Measure, conclude, and draw.

    Args:
        dsn: The server's. It gets a schema of its own for a built-in workload, which is dropped at the end.
        options: What to measure.
        workload: By `find_workload`.
        kind: What kind of server it is, for the report.
        progress: Told after each measurement of the seconds that it was planned to take, and what is next.

    Raises:
        BadOption: The server, or the workload on it, can't be used.
    """
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    async with ready(dsn, options, workload) as watcher:
        header = about(options, {"kind": kind, **await server_settings(watcher)}, load)
        rows = await sweep(dsn, options, workload, watcher, progress)
    rest = (f"Workload: {workload.description}.", *_unquiet(load))
    if options.spike:
        title, said = f"A burst of {options.burst} requests: {workload.name}", spike_sentence(rows, options)
        return Report(
            name="pool-spike",
            title=title,
            sentences=(said, *rest),
            tables=spike_tables(rows),
            about=header,
            data={"sentence": said, **rows_data(rows)},
            png=draw_spike(rows, title),
            picture="how many requests of a burst were answered within a time, for both kinds of pool",
        )
    found = conclude(rows, options)
    how = f"closed loop of {options.clients} clients"
    title = f"Pool size: {workload.name}, " + (
        how if options.rate is None else f"open loop of {options.rate:g} requests/s"
    )
    return Report(
        name="pool",
        title=title,
        sentences=(found.advice.sentence, found.advice.formula, *rest),
        tables=sweep_tables(found),
        about=header,
        data=sweep_data(found),
        png=draw_sweep(found, title),
        picture="throughput, 99th percentile, wait share and the server's waits over the size of the pool",
    )


def _unquiet(load: float | None) -> tuple[str, ...]:
    """A warning where the machine was busy with something else before the run."""
    cores = os.cpu_count() or 1
    if load is None or load <= cores * _QUIET:
        return ()
    return (f"The machine was not quiet: its load was {load:g} on {cores} cores before this run began.",)
