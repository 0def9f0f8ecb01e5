"""What a report is made of: files of an evaluation and of the training before it, whole or torn."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import NotFoundError
from .intervals import rate

Row = Mapping[str, Any]

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown", "black", "white", "grey", "gray")
_THING = re.compile(rf"\b({'|'.join(COLORS)})\s+([a-z]+)", re.IGNORECASE)
STAGES = ("ground", "act", "generator", "policy", "progress")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One evaluation, and what is known of the policy's training.

    Attributes:
        summary: Counts, rates and intervals, as the evaluation wrote them.
        rows: One an episode, without actions.
        videos: Those of `rows` that have a file, with ``path``.
        meta: What the checkpoint notes about itself.
        logs: Stage -> entries of its training log.
        extra: What the caller adds: ``seconds``, ``demos``, ``command``, any other fact.
    """

    summary: Mapping[str, Any]
    rows: Sequence[Row] = ()
    videos: Sequence[Row] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    logs: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def control(self) -> str:
        """Which honesty check was run; ``none`` for a real evaluation."""
        return str(self.summary.get("control", "none"))

    @property
    def tasks(self) -> dict[str, Any]:
        """Task name -> its counts, and those of each kind of instruction in ``splits``."""
        return dict(self.summary.get("tasks", {}))

    @property
    def splits(self) -> dict[str, Any]:
        """Kind of instruction -> counts over all tasks."""
        return dict(self.summary.get("splits", {}))

    @cached_property
    def limits(self) -> dict[str, int]:
        """Steps after which an episode of a task is cut off, where that is known.

        Without a note it is taken from the failures: two or more of the same length, longer than any other episode.
        """
        found: dict[str, int] = {}
        for name, task in self.tasks.items():
            if task.get("max_steps"):
                found[name] = int(task["max_steps"])
                continue
            mine = [r for r in self.rows if r["task"] == name]
            longest = max((int(r["steps"]) for r in mine), default=0)
            if sum(not r["success"] and r["steps"] == longest for r in mine) >= 2:
                found[name] = longest
        return found

    def endings(self, task: str | None = None) -> Counter[str]:
        """How failed episodes (of a task) ended: what the environment said, else ``out of time`` by their length.

        ``early`` where the task's rules ended them without a word; ``unknown`` where not even the limit is known.
        """
        result: Counter[str] = Counter()
        for row in self.rows:
            if row["success"] or task not in (None, row["task"]):
                continue
            limit = self.limits.get(row["task"])
            guess = "unknown" if limit is None else "out of time" if row["steps"] >= limit else "early"
            result[str(row.get("failure") or guess)] += 1
        return result


def read_run(folder: Path, checkpoint: Path | None, extra: Mapping[str, Any] | None = None) -> Run:
    """Read what is there; only ``summary.json`` must be.

    Raises:
        NotFoundError: `folder` holds no evaluation.
    """
    summary = read_json(folder / "summary.json")
    if not isinstance(summary, dict):
        raise NotFoundError(
            f"no evaluation in {folder}: expected a readable summary.json. Type: brachium eval checkpoint=CHECKPOINT"
        )
    needed = {"task", "split", "seed", "instruction", "success", "steps"}
    rows = [{k: v for k, v in r.items() if k != "actions"} for r in read_lines(folder / "episodes.jsonl")]
    rows = [r for r in rows if needed <= r.keys() and _asked(r, summary.get("asked"))]
    meta = read_json(checkpoint / "meta.json") if checkpoint else None
    logs = {s: read_lines(checkpoint.parent / f"log-{s}.jsonl") for s in STAGES} if checkpoint else {}
    return Run(
        summary=summary,
        rows=rows,
        videos=_videos(folder, rows),
        meta=meta if isinstance(meta, dict) else {},
        logs=logs,
        extra=dict(extra or {}),
    )


def _asked(row: Row, asked: Any) -> bool:
    """Whether an episode is among those that a summary counts; its file may hold others of earlier settings."""
    if not isinstance(asked, Mapping):
        return True
    first, last = asked["seeds"].get(row["split"], (0, -1))
    return row.get("env") == asked["envs"].get(row["task"], "") and first <= row["seed"] <= last


def _videos(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """Listed videos whose episode is among `rows` and whose file is there: those of an older run are left out."""
    listing = read_json(folder / "videos.json")
    same = ("task", "split", "seed", "instruction", "success", "steps")
    known = {tuple(r[k] for k in same) for r in rows}
    found = []
    for entry in listing if isinstance(listing, list) else []:
        if not isinstance(entry, dict) or tuple(entry.get(k) for k in same) not in known:
            continue
        path = folder / "videos" / Path(str(entry.get("file", ""))).name
        if path.is_file() and path.stat().st_size:
            found.append({**entry, "path": path})
    order = list(dict.fromkeys(r["task"] for r in rows))
    return sorted(found, key=lambda v: (order.index(v["task"]), bool(v["success"])))


def read_json(path: Path) -> Any:
    """Content of a JSON file, or None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a jsonl file that hold an object; none where it is missing."""
    entries = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a kill tore the last line
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def series(entries: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one logged quantity, the last value of a step counting."""
    points: dict[float, float] = {}
    for entry in entries:
        step, value = entry.get("step"), entry.get(key)
        if isinstance(step, (int, float)) and isinstance(value, (int, float)) and math.isfinite(value):
            points[float(step)] = float(value)
    steps = sorted(points)
    return steps, [points[s] for s in steps]


def things(instruction: str) -> list[tuple[str, str]]:
    """(colour, kind) of the things that an instruction names, in order."""
    return [(color.lower(), kind.lower()) for color, kind in _THING.findall(instruction)]


def wording(instruction: str) -> str:
    """An instruction with the names of things left out, so that episodes with the same words count together."""
    return _THING.sub("…", instruction)


def counted(rows: Sequence[Row]) -> dict[str, Any]:
    """Successes, episodes, rate and interval of some episodes."""
    return dict(rate(sum(bool(r["success"]) for r in rows), len(rows)))


def grouped(rows: Sequence[Row], key: Any) -> list[tuple[Any, dict[str, Any]]]:
    """(value of `key`, counts) pairs in order of first appearance; rows whose key is None are left out."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        value = key(row)
        if value is not None:
            groups.setdefault(value, []).append(row)
    return [(value, counted(mine)) for value, mine in groups.items()]


def failing(groups: Sequence[tuple[Any, dict[str, Any]]], most: int) -> list[tuple[Any, dict[str, Any]]]:
    """The groups with a failure, most failures first, then the lowest rate; at most `most`."""
    bad = [g for g in groups if g[1]["success"] < g[1]["episodes"]]
    return sorted(bad, key=lambda g: (g[1]["success"] - g[1]["episodes"], g[1]["success_rate"], str(g[0])))[:most]


def by_thing(rows: Sequence[Row]) -> dict[str, Any]:
    """Success by colour and kind of the first thing an instruction names; ``parsed`` says how many name one."""
    named = [(things(str(r["instruction"])), r) for r in rows]
    first = [(found[0], r) for found, r in named if found]
    colors = [c for c in COLORS if any(t[0] == c for t, _ in first)]
    kinds = list(dict.fromkeys(t[1] for t, _ in first))

    def cell(color: str | None, kind: str | None) -> dict[str, Any] | None:
        mine = [r for (c, k), r in first if color in (None, c) and kind in (None, k)]
        return counted(mine) if mine else None

    return {
        "parsed": len(first),
        "kinds": kinds,
        "rows": [(c, [cell(c, k) for k in kinds], cell(c, None)) for c in colors],
        "all": [*(cell(None, k) for k in kinds), cell(None, None)],
    }
