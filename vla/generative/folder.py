"""Which kind of system a checkpoint folder holds, told without loading it."""

from __future__ import annotations

import json
from pathlib import Path

KINDS = ("visual", "video")
"""SuSIE: one subgoal and a goal-conditioned policy; UniPi: a short video and inverse dynamics."""


def kind_of(folder: str | Path) -> str | None:
    """One of `KINDS`; None for a folder that holds no such system."""
    try:
        found = json.loads((Path(folder) / "config.json").read_text())
        return str(found["kind"]) if found["kind"] in KINDS else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
