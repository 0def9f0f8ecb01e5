"""One piece of long-horizon work with a planner, and what is counted of several."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..intervals import rate
from .base import Ask, Done, Infeasible
from .executing import observed
from .lm.base import LanguageModel
from .runner import HierarchicalRunner
from .search import search


def run_episode(
    world: Any, runner: HierarchicalRunner, seed: int, split: str, models: Sequence[LanguageModel] = ()
) -> dict[str, Any]:
    """One piece of work until the system stops by itself or its time is over."""
    begin, calls = time.monotonic(), sum(model.usage.calls for model in models)
    observation, info = world.reset(seed=seed, options={"split": split})
    runner.reset(0, seed)
    runner.tell(0, world.errand.past)
    invalid, over = 0, False
    while not over:
        seen = observed(observation, world.spec_embodiment, world.scene.stamp)
        action = runner.act([seen], [0])[0]
        if runner.ended(0) is not None:
            break
        observation, _, terminated, truncated, info = world.step(action)
        over = terminated or truncated
        invalid += info["invalid"]
    ended = runner.ended(0)
    claimed, holds = isinstance(ended, Done), bool(info["success"])
    events = runner.log(0)
    refused = Counter(
        v.partition(":")[0]
        for event in events
        if event["event"] == "proposal"
        for candidate in event["candidates"]
        for v in candidate["violations"]
    )
    best = search(world.library, world.errand.scene, world.errand.goals)
    proposals = [event for event in events if event["event"] == "proposal"]
    return {
        "seed": seed,
        "split": split,
        "family": world.errand.family,
        "instruction": world.errand.instruction,
        "success": claimed and holds,
        "ever": bool(info["ever"]),
        "goal_share": round(float(info["goal_share"]), 4),
        "ended": _ending(ended) if not info.get("failure") else str(info["failure"]),
        "why": "" if ended is None else str(getattr(ended, "reason", getattr(ended, "question", ""))),
        "failure": str(info.get("failure", "")),
        "premature": claimed and not holds and not info["ever"],
        "destroyed": not holds and bool(info["ever"]),
        "overrun": ended is None and bool(info["ever"]),
        "steps": int(world.steps),
        "skills": sum(event["event"] == "begin" for event in events),
        "optimum": len(best.calls) if best.calls is not None else None,
        "invalid": invalid,
        "refused": dict(refused),
        "disturbed": bool(world.disturbed),
        "lm_calls": sum(model.usage.calls for model in models) - calls,
        "plan_s": round(sum(event["latency_s"] for event in proposals), 5),
        "proposals": len(proposals),
        "seconds": round(time.monotonic() - begin, 4),
        "events": events,
    }


def _ending(ended: Any) -> str:
    if ended is None:
        return "out of time"
    if isinstance(ended, Infeasible):
        return f"infeasible: {ended.kind}"
    return "ask" if isinstance(ended, Ask) else "done"


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares with intervals, and means, over some episodes."""
    count = len(rows)
    if not count:
        return {"episodes": 0}
    found: dict[str, Any] = {"episodes": count}
    found["success"] = rate(sum(row["success"] for row in rows), count)
    for name in ("ever", "premature", "destroyed", "overrun"):
        found[name] = rate(sum(bool(row[name]) for row in rows), count)
    done = [row for row in rows if row["success"] and row["optimum"]]
    disturbed = [row for row in rows if row["disturbed"]]
    found["goal_share"] = round(float(np.mean([row["goal_share"] for row in rows])), 4)
    found["skills_to_optimum"] = round(float(np.mean([r["skills"] / r["optimum"] for r in done])), 3) if done else None
    found["invalid_per_episode"] = round(float(np.mean([row["invalid"] for row in rows])), 4)
    found["refused_per_episode"] = round(float(np.mean([sum(row["refused"].values()) for row in rows])), 3)
    found["recovered"] = rate(sum(row["success"] for row in disturbed), len(disturbed)) if disturbed else None
    asked = sum(row["proposals"] for row in rows)
    found["ms_per_proposal"] = round(1e3 * sum(row["plan_s"] for row in rows) / max(1, asked), 2)
    found["endings"] = dict(Counter(row["ended"] for row in rows))
    return found
