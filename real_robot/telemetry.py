"""What a control loop measures of itself: a few numbers a tick, kept in plain arrays."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TICK = ("start", "late", "work", "age", "source")
"""Of each tick: when it began [s], how late [s], how long it worked [s], age of what the executed action has seen [s],
and who moved the robot (`SOURCES`)."""
SOURCES = ("hold", "policy", "human")
REQUEST = ("captured", "asked", "arrived")


@dataclass
class Telemetry:
    """Ticks and requests of one run."""

    period: float
    ticks: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in TICK})
    requests: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in REQUEST})
    jumps: array[float] = field(default_factory=lambda: array("d"))
    skipped: int = 0
    starved: int = 0
    errors: list[tuple[float, str]] = field(default_factory=list)

    def tick(self, *values: float) -> None:
        """One tick; values as in `TICK`."""
        for name, value in zip(TICK, values):
            self.ticks[name].append(value)

    def request(self, *values: float) -> None:
        """One answered request; values as in `REQUEST`."""
        for name, value in zip(REQUEST, values):
            self.requests[name].append(value)

    def samples(self, most: int = 4000) -> dict[str, list[float]]:
        """What histograms are drawn of, in [ms]: at most `most` evenly chosen values each."""
        start = np.array(self.ticks["start"])
        age = np.array(self.ticks["age"])
        delay = np.array(self.requests["arrived"]) - np.array(self.requests["asked"])
        found = {
            "period": np.diff(start),
            "work": np.array(self.ticks["work"]),
            "inference": delay,
            "age": age[age >= 0],
        }
        return {name: _thinned(values * 1e3, most) for name, values in found.items()}

    def summary(self) -> dict[str, Any]:
        """Figures for people and files; times in [ms]."""
        start, late = (np.array(self.ticks[name]) for name in ("start", "late"))
        periods = np.diff(start)
        spent = np.array(self.ticks["work"])
        age = np.array(self.ticks["age"])
        delay = np.array(self.requests["arrived"]) - np.array(self.requests["asked"])
        seconds = float(start[-1] - start[0]) if len(start) > 1 else 0.0
        source = np.array(self.ticks["source"], int)
        return {
            "ticks": len(start),
            "seconds": round(seconds, 3),
            "rate_hz": round(len(periods) / seconds, 3) if seconds else 0.0,
            "skipped": self.skipped,
            "starved_ticks": self.starved,
            "share": {
                name: round(float((source == k).mean()), 4) if len(source) else 0.0 for k, name in enumerate(SOURCES)
            },
            "period_error_ms": quantiles((periods - self.period) * 1e3, absolute=True),
            "late_ms": quantiles(late * 1e3),
            "work_ms": quantiles(spent * 1e3),
            "inference_ms": quantiles(delay * 1e3),
            "requests": len(delay),
            "action_age_ms": quantiles(age[age >= 0] * 1e3),
            "chunk_jump": quantiles(np.array(self.jumps)),
            "errors": len(self.errors),
        }


def _thinned(values: np.ndarray, most: int) -> list[float]:
    chosen = values if len(values) <= most else values[np.linspace(0, len(values) - 1, most).astype(int)]
    return [round(float(value), 4) for value in chosen]


def quantiles(values: np.ndarray, *, absolute: bool = False) -> dict[str, float]:
    """Median, 95th and 99th percentile, and the largest."""
    values = np.abs(values) if absolute else values
    if not len(values):
        return {}
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    found = {"p50": p50, "p95": p95, "p99": p99, "max": values.max()}
    return {name: round(float(value), 4) for name, value in found.items()}
