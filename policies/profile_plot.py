"""The plot of a profile: time of each part beside its floor, and the kinds of operations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..vla.profiling import BETWEEN, KINDS_OF_TIME, Profile
from .report_plots import GRID, INK, MUTED, SERIES, new_axes

FLOORS = {"arithmetic": SERIES[1], "memory": SERIES[2]}
"""Colour of a floor, by what sets it."""
KINDS = dict(zip(KINDS_OF_TIME, (*SERIES, "#9aa3ad", "#d5dade")))


def draw(passes: Mapping[str, Profile], hardware: str, path: Path) -> None:
    """Draw profiles below each other.

    Args:
        passes: What was measured, in words -> its profile.
        hardware: On what, in words.
        path: Where to write the PNG.
    """
    from matplotlib.figure import Figure

    heights = [1.1 + 0.3 * len(found.parts) for found in passes.values()]
    figure = Figure((9.0, 0.5 + sum(h + 1.15 for h in heights)), layout="constrained", dpi=130)
    rows = figure.subfigures(len(passes), 1, squeeze=False, height_ratios=heights)
    for (title, found), (row,) in zip(passes.items(), rows):
        above, below = row.subplots(2, 1, height_ratios=[0.3 * len(found.parts) + 0.2, 0.45])
        _parts(new_axes(above), found)
        _kinds(new_axes(below), found)
        floor = "" if found.floor_ms is None else f", floor {found.floor_ms:.2f} ms"
        row.suptitle(f"Where the time of {title} goes: median {found.median_ms:.2f} ms{floor}", size=11, color=INK)
    figure.supxlabel(hardware, size=8.5, color=MUTED)
    figure.savefig(path)


def _parts(axes: Any, found: Profile) -> None:
    """Bars of the parts; inside each, its floor."""
    names = list(found.parts)
    longest = max(part.ms for part in found.parts.values())
    for y, part in enumerate(found.parts.values()):
        axes.barh(y, part.ms, 0.72, color="#c6d9e8")
        if part.floor_ms:
            axes.barh(y, part.floor_ms, 0.36, color=FLOORS[part.bound])
        text = f" {part.ms:.2f} ms" + ("" if part.far is None else f", {part.far:.1f} x floor")
        axes.text(max(part.ms, part.floor_ms or 0.0), y, text, va="center", color=MUTED, size=8.5)
    labels = [name + (f" (x{found.parts[name].calls})" if found.parts[name].calls > 1 else "") for name in names]
    axes.set_yticks(range(len(names)), labels, color=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.28 * longest)
    axes.grid(axis="x", color=GRID, lw=0.8)
    for bound, color in FLOORS.items():
        axes.barh([0], [0], color=color, label=f"floor by {bound}")
    axes.legend(loc="lower right", frameon=False, fontsize=8.5, labelcolor=MUTED)


def _kinds(axes: Any, found: Profile) -> None:
    """One bar, of the kinds of operations."""
    left, total = 0.0, sum(found.kinds.values())
    for kind, ms in found.kinds.items():
        if ms < 0.003 * total:
            continue
        hatch = "////" if kind == BETWEEN else None
        axes.barh(0, ms, 0.7, left=left, color=KINDS[kind], hatch=hatch, edgecolor="white", label=f"{kind} {ms:.2f} ms")
        left += ms
    axes.set_yticks([0], ["operations"], color=INK)
    axes.set_xlim(0, left)
    axes.set_xlabel("ms")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.75), ncols=4, frameon=False, fontsize=8, labelcolor=MUTED)
