"""The report of ``brachium eval planner=...``: rates, and what every shown episode decided, as a line of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..page import write_html
from .events import event_rows

SHOWN = 24
"""Episodes that are drawn, failures first."""
WIDTH = 1000.0
"""Of a line of time, in units of its drawing."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A subgoal on a line of time: where it begins and how long it is, what it was, and how it ended."""

    x: float
    width: float
    text: str
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A decision on a line of time: ``refused`` candidates, ``agreed`` or ``refused`` ends, ``ended``."""

    x: float
    kind: str
    text: str


def timeline(events: Sequence[Mapping[str, Any]], steps: int) -> tuple[list[Bar], list[Mark]]:
    """Bars and marks of an episode of so many steps, left to right."""
    scale = WIDTH / max(1, steps)
    bars: list[Bar] = []
    marks: list[Mark] = []
    begun: tuple[int, str] | None = None
    for event in events:
        step, kind = max(0, int(event["step"])), event["event"]
        if kind == "begin":
            begun = (step, str(event["text"]))
        elif kind == "end" and begun is not None:
            bars.append(_bar(begun, step, str(event["outcome"]), scale))
            begun = None
        elif kind == "proposal":
            for candidate in event["candidates"]:
                if candidate["violations"]:
                    text = f"{candidate['text']}: {'; '.join(candidate['violations'])}"
                    marks.append(Mark(x=scale * step, kind="refused", text=text))
        elif kind == "verdict":
            how = "agreed" if event["accepted"] else "refused"
            marks.append(Mark(x=scale * step, kind=how, text=f"end {how} after {event['looks']} looks"))
        elif kind == "ended":
            marks.append(Mark(x=scale * step, kind="ended", text=str(event["text"])))
    if begun is not None:
        bars.append(_bar(begun, steps, "unfinished", scale))
    return bars, marks


def _bar(begun: tuple[int, str], end: int, outcome: str, scale: float) -> Bar:
    return Bar(x=scale * begun[0], width=max(3.0, scale * (end - begun[0]) - 2.0), text=begun[1], outcome=outcome)


def write_planner_report(folder: Path, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write ``report.html`` into the folder of an evaluation of a planner."""
    ordered = sorted(rows, key=lambda row: (bool(row["success"]), row["seed"]))
    failures = [row for row in ordered if not row["success"]][: SHOWN * 3 // 4]
    shown = [*failures, *[row for row in ordered if row["success"]][: SHOWN - len(failures)]]
    episodes = []
    for row in shown:
        bars, marks = timeline(row["events"], int(row["steps"]))
        episodes.append({**row, "bars": bars, "marks": marks, "told": event_rows(row["events"])})
    parts = {"all": summary["total"], **summary["splits"], **summary["families"]}
    groups = [
        {
            "name": name,
            "episodes": part["episodes"],
            "success": part["success"],
            "ever": part["ever"],
            "premature": part["premature"],
            "goal": part["goal_share"],
            "ratio": part["skills_to_optimum"],
            "refused": part["refused_per_episode"],
        }
        for name, part in parts.items()
        if part["episodes"]
    ]
    content = {"summary": summary, "groups": groups, "episodes": episodes, "count": len(rows), "width": WIDTH}
    filters = {"percent": lambda value: f"{100 * float(value):.0f} %"}
    return write_html(folder / "report.html", __package__, "planners.html.jinja", content, filters)
