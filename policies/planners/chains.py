"""Chains of tasks on one table, without a reset between them: the protocol of CALVIN (Mees et al. 2022, 2112.03227)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...console import progress
from ...errors import ConfigError
from ..base import Policy
from ..intervals import rate
from .executing import observed
from .runner import HierarchicalRunner

LIMIT = 100
"""Steps for each task; CALVIN gives 360 at 30 Hz, which is 12 s."""
TRIED = 10
"""Skills for each task."""
CHAINED = 100_000
"""Seeds of chains begin so far after those of episodes."""
UP = 0.14
"""Height of the tool at which a task is over [m]."""


def run_chain(world: Any, policy: Policy, seed: int, *, length: int = 5, limit: int = LIMIT) -> dict[str, Any]:
    """Tell a policy one task after another; the world's own measure says when each is done, and a failure ends it.

    Args:
        world: With physics and `chain`; one lane.
        policy: Told each task's instruction.
        seed: Of table, tasks and draws.
        length: Tasks.
        limit: Steps for each task.

    Returns:
        ``seed``, ``tasks`` (what was asked), ``done`` (how many were done in a row) and ``steps``.
    """
    calls = world.chain(seed, length)
    policy.reset(0, seed)
    seen, done, steps = world.observe(), 0, 0
    height = world.spec_embodiment.state.names.index("z")
    for call in calls:
        success = False
        for _ in range(limit):
            observation = replace(observed(seen, world.spec_embodiment), instruction=call.instruction)
            seen, _, lost, _, _ = world.step(policy.act([observation], [0])[0])
            steps += 1
            success = not world.scene.unmet(call.success) and float(seen["state"][height]) > UP
            if success or lost:
                break
        if not success:
            break
        done += 1
    return {"seed": seed, "tasks": [call.key for call in calls], "done": done, "steps": steps}


def run_planned_chain(
    world: Any, runner: HierarchicalRunner, seed: int, *, length: int = 5, limit: int = LIMIT
) -> dict[str, Any]:
    """Tell a planner one task after another; each must be done when the system says that it is, or the chain ends.

    Args:
        world: With `chain` and `say`; one lane.
        runner: Told each task's instruction.
        seed: Of table, tasks and draws.
        length: Tasks.
        limit: Steps for each task.

    Returns:
        As `run_chain`, and ``ended``: how the last task did, ``done``, ``not done`` (the system said so), ``out of
        time``, ``ask``, ``infeasible`` or what the world says was lost.
    """
    calls = world.chain(seed, length)
    runner.reset(0, seed)
    done, steps, told = 0, 0, "done"
    for call in calls:
        world.say(call)
        seen, lost = world.observe(), ""
        for step in range(limit + 1):  # whoever acts looks once more after the last step
            action = runner.act([observed(seen, world.spec_embodiment, world.scene.stamp)], [0])[0]
            if runner.ended(0) is not None or step == limit:
                break
            seen, _, over, _, info = world.step(action)
            steps += 1
            if over:
                lost = str(info.get("failure", "")) or "lost"
                break
        ended, holds = runner.ended(0), not world.scene.unmet(call.success)
        told = lost or ("out of time" if ended is None else type(ended).__name__.lower())
        if told == "done" and not holds:
            told = "not done"
        if told != "done":
            break
        done += 1
    return {"seed": seed, "tasks": [call.key for call in calls], "done": done, "steps": steps, "ended": told}


def require_chains(world: Any) -> None:
    """Raise ConfigError where a world has no chains."""
    lacking = [name for name in ("chain", "say", "observe") if not hasattr(world, name)]
    if lacking:
        raise ConfigError(f"{type(world).__name__} has no chains of tasks: it lacks {lacking}. Leave chains out")


def run_chains(
    world: Any, runner: HierarchicalRunner, seeds: Sequence[int], path: Path, key: str
) -> list[dict[str, Any]]:
    """Some chains of a planner; `LIMIT` steps a task, `TRIED` where a step is a whole skill.

    Each is written to `path` when it ends, with `key`, which names the settings; those that are there are not run anew.
    """
    limit = LIMIT if hasattr(world, "expert_action") else TRIED
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn by a kill
        if row.get("key") == key and row["seed"] in seeds:
            rows[row["seed"]] = row
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    with path.open("a") as file, progress("chains", total=len(seeds), unit="chains") as bar:
        bar.update(len(rows))
        for seed in (s for s in seeds if s not in rows):
            rows[seed] = {"key": key, **run_planned_chain(world, runner, seed, limit=limit)}
            file.write(json.dumps(rows[seed]) + "\n")
            file.flush()
            bar.update(1, mean=f"{sum(row['done'] for row in rows.values()) / len(rows):.2f}")
    return [rows[seed] for seed in seeds]


def summarise_chains(rows: Sequence[dict[str, Any]], length: int = 5) -> dict[str, Any]:
    """Share of chains with at least 1, 2, ... tasks done, and the mean number."""
    count = len(rows)
    found = {f"at_least_{k}": rate(sum(row["done"] >= k for row in rows), count) for k in range(1, length + 1)}
    return {"chains": count, "mean": round(sum(row["done"] for row in rows) / max(1, count), 3), **found}
