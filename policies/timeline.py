"""Which chunks say what about a moment: chunks on one time axis, as they arrive."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

ROUNDING = 1e-6
"""A row's beginning is not missed for the last digits of a sum of periods."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A chunk on the time axis.

    Attributes:
        start: Moment that row 0 is meant for, in steps.
        rows: float32 (h, a).
    """

    start: float
    rows: np.ndarray

    def index(self, moment: float) -> int:
        """Which row is meant for `moment`; below 0 or from h on there is none."""
        return math.floor(moment - self.start + ROUNDING)

    def row(self, moment: float) -> np.ndarray | None:
        """The row (a,) meant for `moment`, if there is one."""
        index = self.index(moment)
        return self.rows[index] if 0 <= index < len(self.rows) else None

    def path(self, moment: float) -> np.ndarray:
        """Absolute targets (a,) at a moment, on straight lines: row k is reached when its step is over.

        Before the first row is reached the line is that to the second one; after the last it stays.
        """
        place = moment - self.start - 1.0
        if len(self.rows) == 1 or place >= len(self.rows) - 1:
            return self.rows[-1]
        k = max(0, math.floor(place))
        return self.rows[k] + (self.rows[k + 1] - self.rows[k]) * (place - k)


@dataclass
class Timeline:
    """Chunks in the order in which they were asked for; time is counted in steps of the policy (1 / control_hz).

    A reply that comes late loses its first rows by itself, one that comes after its successor is put before it, and one
    that comes twice counts once.
    """

    chunks: list[Planned] = field(default_factory=list)

    def add(self, start: float, rows: np.ndarray) -> bool:
        """Put a chunk on the axis; False for one that is there already."""
        if any(abs(chunk.start - start) < ROUNDING for chunk in self.chunks):
            return False
        self.chunks.append(Planned(start=start, rows=rows))
        self.chunks.sort(key=lambda chunk: chunk.start)
        return True

    def at(self, moment: float) -> list[np.ndarray]:
        """What live chunks say of `moment`, the oldest chunk first; chunks that are over are forgotten."""
        self.chunks = [chunk for chunk in self.chunks if chunk.index(moment) < len(chunk.rows)]
        found = (chunk.row(moment) for chunk in self.chunks)
        return [row for row in found if row is not None]

    def way(self, begin: float, end: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Where chunks that are live at `begin` have absolute targets then and at `end`, the oldest chunk first."""
        live = [chunk for chunk in self.chunks if 0 <= chunk.index(begin) < len(chunk.rows)]
        return [chunk.path(begin) for chunk in live], [chunk.path(end) for chunk in live]

    @property
    def end(self) -> float:
        """Until when there is a plan, in steps; -inf without one."""
        return max((chunk.start + len(chunk.rows) for chunk in self.chunks), default=-math.inf)

    def ahead(self, start: float, horizon: int, *, smooth: bool = False) -> tuple[np.ndarray, int] | None:
        """The newest chunk's rows for `horizon` steps from `start`, the last one repeated, and how many are real.

        Where `start` lies between two of its rows the nearer is taken, or with `smooth`, for absolute targets, what the
        robot will have reached on the line between them.
        """
        if not self.chunks:
            return None
        newest = self.chunks[-1]
        first = max(0.0, start - newest.start)
        real = min(len(newest.rows) - round(first), horizon)
        if real <= 0:
            return None
        if smooth:
            return np.stack([newest.path(newest.start + first + k + 1.0) for k in range(horizon)]), real
        return newest.rows[np.minimum(round(first) + np.arange(horizon), len(newest.rows) - 1)], real

    def clear(self) -> None:
        """Forget everything."""
        self.chunks.clear()
