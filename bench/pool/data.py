"""The results as JSON has them: each measurement, so that others can look at them in their own way."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from bench.pool.measure import Measured
from bench.pool.model import Estimate, Fit, little
from bench.pool.sampler import Sample, ServerSide
from bench.pool.spike import Burst, Spike
from bench.pool.sweep import Row, Sweep

__all__ = ["spike_data", "sweep_data"]


def sweep_data(found: Sweep) -> dict[str, Any]:
    """A sweep; times in seconds, shares from 0 to 1."""
    advice = found.advice
    return {
        "recommendation": {
            "size": advice.size,
            "leaning": advice.leaning,
            "sentence": advice.sentence,
            "by_formula": advice.by_formula,
            "formula": advice.formula,
            "standings": [
                {
                    "size": one.size,
                    "throughput_share": _estimate(one.throughput),
                    "p99_ratio": _estimate(one.p99),
                    "good": one.good,
                }
                for one in advice.standings
            ],
        },
        "model": {"why_not": found.unfitted} if found.fit is None else _fit(found.fit),
        "rows": [_row(row) for row in found.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "kind": row.cell.kind,
        "size": row.cell.size,
        "throughput": round(row.throughput, 2),
        "latency": row.latencies.spread().as_dict(),
        "wait": row.waits.spread().as_dict(),
        "wait_share": round(row.wait_share, 4),
        "failed_share": round(row.failed, 5),
        "in_use": round(row.mean("in_use"), 3),
        "in_use_by_little": round(little(row.throughput, row.mean("hold")), 3),
        "hold": round(row.mean("hold"), 6),
        "queue": round(row.mean("queue"), 3),
        "client_cpu": round(row.mean("client_cpu"), 3),
        "server": _server(row.server),
        "latency_histogram": row.latencies.encoded(),
        "wait_histogram": row.waits.encoded(),
        "rounds": [_measured(one) for one in row.rounds],
    }


def _measured(one: Measured) -> dict[str, Any]:
    return {
        "throughput": round(one.throughput, 2),
        "completed": one.completed,
        "p50": one.latencies.at(50),
        "p99": one.latencies.at(99),
        "wait_p99": one.waits.at(99),
        "asked": one.asked,
        "queued": one.queued,
        "errors": dict(one.errors),
        "shed": one.shed,
        "unfinished": one.unfinished,
        "client_cpu": round(one.client_cpu, 3),
        # Short keys would save little; short rows do: [at, in use, callers waiting, active, blocked].
        "over_time": [_look(look) for look in one.samples],
    }


def _look(look: Sample) -> list[float]:
    return [round(look.at, 3), look.in_use, look.waiting, look.active, look.blocked]


def _server(server: ServerSide) -> dict[str, Any]:
    return {
        "samples": server.samples,
        "active": round(server.active, 3),
        "waiting": round(server.blocked, 3),
        "events": {name: round(mean, 3) for name, mean in server.events.items()},
    }


def _fit(law: Fit) -> dict[str, Any]:
    return {
        "law": "X(N) = rate N / (1 + sigma (N - 1) + kappa N (N - 1))",
        "rate": _estimate(law.rate),
        "sigma": _estimate(law.sigma),
        "kappa": _estimate(law.kappa),
        "peak": _estimate(law.peak),
        "r2": round(law.explained, 4),
    }


def _estimate(estimate: Estimate | None) -> dict[str, float | None] | None:
    if estimate is None:
        return None
    # JSON has no infinity: null means that there is no bound.
    return {name: value if math.isfinite(value) else None for name, value in asdict(estimate).items()}


def spike_data(found: Spike) -> dict[str, Any]:
    """The bursts; times in seconds."""
    return {
        "sentence": found.sentence,
        "rows": [
            {
                "pool": row.name,
                "min_size": row.least,
                "max_size": row.size,
                "latency": row.latencies.spread().as_dict(),
                "wait": row.waits.spread().as_dict(),
                "latency_histogram": row.latencies.encoded(),
                "rounds": [_burst(one) for one in row.bursts],
            }
            for row in found.rows
        ],
    }


def _burst(one: Burst) -> dict[str, Any]:
    return {
        "seconds": round(one.seconds, 6),
        "opened": one.opened,
        "p50": one.latencies.at(50),
        "p99": one.latencies.at(99),
        "errors": dict(one.errors),
    }
