"""What long work says while it runs: log lines, progress with an ETA, tables. `rich` is imported on first use."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import DiskSpaceError

PLAIN_PERIOD = 5.0  # [s] between progress lines where no terminal is attached


@cache
def _rich(stderr: bool) -> Any:
    """One console a stream, so that log lines are printed above a running progress bar."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


_silent: list[bool] = []


@contextmanager
def silence() -> Iterator[None]:
    """Log nothing: of several processes that do the same, one speaks."""
    _silent.append(True)
    try:
        yield
    finally:
        _silent.pop()


def log(message: str) -> None:
    """Print one line on stderr, above a running progress bar; stdout is left to results."""
    if _silent:
        return
    if sys.stderr.isatty():
        _rich(True).print(message, markup=False)
    else:
        print(message, file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table on stdout; columns in which every row is empty are left out."""
    cells = [[str(cell) for cell in row] for row in rows]
    keep = [i for i in range(len(columns)) if not cells or any(row[i] for row in cells)]
    if not sys.stdout.isatty():
        widths = [max(len(columns[i]), *(len(row[i]) for row in cells), 0) for i in keep]
        print(title)
        for line in [columns, *cells]:
            print("  " + "  ".join(line[i].ljust(width) for i, width in zip(keep, widths)).rstrip())
        return
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title, title_justify="left", show_edge=False)
    for i in keep:
        grid.add_column(columns[i], overflow="fold")
    for row in cells:
        grid.add_row(*(Text(row[i], style=_STYLES.get(row[i], "")) for i in keep))
    _rich(False).print(grid)


_STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


class Progress:
    """Progress of long work: a bar on a terminal, otherwise one plain line at most every five seconds.

    Args:
        description: What is being done, for example ``recording reach``.
        total: Number of units in all; None when unknown.
        unit: Name of a unit, plural.
    """

    def __init__(self, description: str, total: int | None = None, unit: str = "steps") -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = 0
        self.fields: dict[str, Any] = {}
        self._bar: Any = None
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if sys.stderr.isatty():
            from rich import progress as rp

            self._bar = rp.Progress(
                rp.TextColumn("{task.description}", markup=False),
                rp.BarColumn(bar_width=28),
                rp.TextColumn("{task.fields[line]}", markup=False),
                console=_rich(True),
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(self.description, total=self.total, line=self.line())
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, line=self.line())
            self._bar.stop()
            self._bar = None
        else:
            end = "done" if kind is None else "stopped"
            print(f"{self.description}: {self.line()}, {end}", file=sys.stderr, flush=True)

    def update(self, n: int = 1, **fields: Any) -> None:
        """Say that `n` more units are done; `fields` (for example ``loss=0.1``) are shown at the end of the line."""
        self.done += n
        self.fields.update(fields)
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, line=self.line())
        elif now - self._last >= PLAIN_PERIOD:
            self._last = now
            print(f"{self.description}: {self.line()}", file=sys.stderr, flush=True)

    @property
    def elapsed(self) -> float:
        """Time since the start [s]."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return self.done / max(self.elapsed, 1e-9)

    def line(self) -> str:
        """Return counts, percentage, rate, time left and fields in one line."""
        if self.total:
            parts = [f"{self.done}/{self.total} {self.unit} ({100 * self.done // self.total} %)"]
        else:
            parts = [f"{self.done} {self.unit}"]
        if self.done:
            parts.append(f"{self.rate:.3g} {self.unit}/s" if self.rate >= 0.1 else f"{1 / self.rate:.3g} s each")
        if self.total and 0 < self.done < self.total:
            parts.append(f"ETA {human_time((self.total - self.done) / self.rate)}")
        else:
            parts.append(human_time(self.elapsed))
        parts += [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.fields.items()]
        return ", ".join(parts)


def progress(description: str, total: int | None = None, unit: str = "steps") -> Progress:
    """Return a `Progress` to be used with ``with``."""
    return Progress(description, total, unit)


def human_time(seconds: float) -> str:
    """Return a duration such as ``0.8 s``, ``42 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def human_bytes(n: float) -> str:
    """Return a size such as ``512 B``, ``1.5 kB`` or ``20 GB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5:
            return f"{n:.3g} {unit}" if unit != "B" else f"{n:.0f} B"
        n /= 1000
    return f"{n:.3g} TB"


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Return the free space of the disk that holds `path`, which need not exist yet [bytes]."""
    place = Path(path).resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_disk(path: str | os.PathLike[str], n_bytes: float, what: str) -> None:
    """Raise DiskSpaceError unless `n_bytes` are free where `path` is to be written; `what` needs them."""
    free = free_bytes(path)
    if free < n_bytes:
        raise DiskSpaceError(
            f"{what}: expected {human_bytes(n_bytes)} of free disk at {path}, got {human_bytes(free)}.\n"
            f"Free some space (old runs lie in outputs/), or write to another disk."
        )


def typed() -> list[str] | None:
    """The words typed after ``brachium``, where that is what runs."""
    program = Path(sys.argv[0])
    ours = program.stem == "brachium" or program.resolve() == Path(__file__).resolve().parent / "__main__.py"
    return sys.argv[1:] if ours else None
