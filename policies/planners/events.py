"""A runner's log as rows that people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def event_rows(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Events as (step, what, outcome, why)."""
    rows = []
    for event in events:
        step, kind = str(event["step"]), event["event"]
        if kind == "proposal":
            for candidate in event["candidates"]:
                if candidate["violations"]:
                    rows.append((step, f"proposed: {candidate['text']}", "refused", "; ".join(candidate["violations"])))
        elif kind == "begin":
            rows.append((step, event["text"], "begins", ""))
        elif kind == "end":
            rows.append((step, event["text"], event["outcome"], ""))
        elif kind == "verdict":
            agreed = "agreed" if event["accepted"] else "refused"
            rows.append((step, "proposed: done", agreed, f"{event['looks']} looks at the goal"))
        elif kind == "ended":
            rows.append((step, event["text"], "end", ""))
    return rows
