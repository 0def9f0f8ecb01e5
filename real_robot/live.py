"""What a person sees while the robot moves: one screen that is drawn anew four times a second."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any

import numpy as np

from ..console import human_time, log
from .controller import Controller
from .telemetry import SOURCES

EVERY_S = 0.25
PLAIN_S = 5.0
RECENT = 100
"""Ticks that the shown figures are of."""


class LiveView:
    """Draws a running controller on a terminal; elsewhere it writes a line every five seconds.

    Args:
        controller: What is drawn.
        title: What runs.
    """

    def __init__(self, controller: Controller, title: str) -> None:
        self._controller, self._title = controller, title
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="live view", daemon=True)
        self._begin = time.monotonic()

    def __enter__(self) -> LiveView:
        self._begin = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end.set()
        self._thread.join(2.0)

    def _draw(self) -> None:
        if not sys.stderr.isatty():
            while not self._end.wait(PLAIN_S):
                log(f"{self._title}: " + ", ".join(f"{k} {v}" for k, v in self.rows()))
            return
        from rich.console import Console
        from rich.live import Live

        with Live(self._panel(), console=Console(stderr=True), refresh_per_second=4, transient=True) as live:
            while not self._end.wait(EVERY_S):
                live.update(self._panel())

    def _panel(self) -> Any:
        from rich.panel import Panel
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        for name, value in self.rows():
            grid.add_row(name, value)
        return Panel(grid, title=self._title, title_align="left", subtitle="Ctrl-C stops the robot", width=100)

    def rows(self) -> list[tuple[str, str]]:
        """What there is to see: (name, value)."""
        controller = self._controller
        telemetry, guard = controller.telemetry, controller.guard
        start = np.array(telemetry.ticks["start"][-RECENT:])
        found = [
            (
                "state",
                f"{guard.state}{': ' + guard.why if guard.why else ''}, {human_time(time.monotonic() - self._begin)}",
            )
        ]
        if len(start) > 2:
            periods = np.diff(start)
            errors = np.abs(periods - telemetry.period) * 1e3
            source = SOURCES[int(telemetry.ticks["source"][-1])]
            found.append(
                ("rate", f"{1.0 / periods.mean():.1f} Hz, period off by {np.percentile(errors, 99):.2f} ms (p99)")
            )
            found.append(("moved by", source))
        asked, arrived = telemetry.requests["asked"][-20:], telemetry.requests["arrived"][-20:]
        if asked:
            delay = (np.array(arrived) - np.array(asked)[: len(arrived)]) * 1e3
            found.append(("inference", f"{np.median(delay):.0f} ms, at most {delay.max():.0f} ms of late"))
            found.append(
                ("plan ahead", f"{max(0.0, controller.plan_ahead_s) * 1e3:.0f} ms, starved {telemetry.starved} ticks")
            )
        counts = guard.log.counts()
        found.append(("interventions", ", ".join(f"{kind} {count}" for kind, count in counts.items()) or "none"))
        if guard.log.entries:
            found.append(("last", guard.log.entries[-1].detail[:70]))
        return found
