"""The verb ``brachium eval``: closed-loop success rates with intervals, per task and kind of instruction."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from ..console import human_time, log, progress, require_disk, table, typed
from ..errors import ConfigError, did_you_mean
from ..identity import digest
from ..spec import EmbodimentSpec, Observation
from ..vla.accelerate import PLAIN, Acceleration
from ..vla.generative.folder import kind_of
from ..vla.slowfast import is_pair
from .base import Policy
from .intervals import rate
from .report_words import SPLIT_NAMES
from .rollout import EpisodeResult
from .vla_policy import VLAPolicy
from .workers import Job, LocalWorkers, Setting, Workers

CONTROLS = ("none", "shuffle", "blind")
"""``shuffle``: the instruction names another thing of the scene, drawn at random; ``blind``: images are black."""


def evaluate(
    *,
    checkpoint: str,
    executor: Callable[..., Policy],
    vector: Callable[..., VectorEnv],
    suite: Mapping[str, Callable[..., Any]] | None = None,
    env: Callable[..., Any] | None = None,
    out: str = "outputs/eval",
    episodes: int = 100,
    splits: Mapping[str, float] | None = None,
    seed: int = 1_000_000,
    num_envs: int = 8,
    control: str = "none",
    planner: Callable[..., Any] | None = None,
    rollout: Workers | None = None,
    acceleration: Acceleration | None = None,
    videos: int = 4,
    report: bool = True,
    device: str = "cpu",
) -> int:
    """Roll a checkpoint out in simulation and report success rates with 95 % Wilson intervals.

    The result depends on neither `num_envs` nor the order of episodes. Every finished episode is written at once;
    typed again after an interruption, the command goes on from there.

    Args:
        checkpoint: Folder of the checkpoint: of a policy, or of ``brachium train-visual`` or ``train-video``.
        executor: Turns chunks into actions.
        vector: Makes a vector environment from factories.
        suite: Task name -> environment factory.
        env: One environment instead of a suite.
        out: Folder for results, videos and the report.
        episodes: Episodes a task.
        splits: Kind of instruction -> share of the episodes.
        seed: First seed; demonstrations use seeds below a million.
        num_envs: Environments at once.
        control: ``none``, or an honesty check: ``shuffle`` or ``blind``.
        planner: Makes the planner over a checkpoint that generates subgoals; null for the one of its kind.
        rollout: Where episodes are run: ``local``, ``processes`` or ``ray``; null for local. Results are the same.
        acceleration: How chunks are made faster: ``plain``, ``compiled``, ``bf16``, ``gpu`` or ``fp8``; null for not.
        videos: Videos a task, failures first; 0 for none.
        report: Write a self-contained report.html.
        device: Where the model runs.
    """
    if control not in CONTROLS:
        raise ConfigError(f"unknown control {control!r}. {did_you_mean(control, CONTROLS)}")
    if episodes < 1 or num_envs < 1:
        raise ConfigError(f"expected episodes and num_envs of at least 1, got {episodes} and {num_envs}")
    tasks = _tasks(env, suite)
    limits, spec, known = {}, None, None
    for name, make in tasks.items():
        limits[name], spec, known = look_at(make, spec)
    hurry = None if acceleration == PLAIN else acceleration
    policy = _policy(checkpoint, executor, planner, spec, device, hurry)
    folder = Path(out)
    require_disk(folder, 50e6, "evaluation")
    key = _run_key(checkpoint, policy, control, hurry)
    store = EpisodeLog(folder / "episodes.jsonl", key)
    begin, before = time.monotonic(), len(store.rows)
    shares = _shares(splits or {"train": 0.5, "paraphrase": 0.25, "pair": 0.25}, known)
    seeds = _seeds(episodes, shares, seed)
    workers = rollout or LocalWorkers()
    local = isinstance(workers, LocalWorkers)
    if not local and (hasattr(policy, "cost") or hasattr(policy, "album")):
        raise ConfigError("subgoals are shown and counted where they are made: expected rollout=local with a planner")
    # Here the policy is there already; elsewhere it is loaded by each worker.
    making = partial(_acting, checkpoint, executor, planner, device, control, hurry)
    setting = Setting(
        policy=(lambda spec: _under(policy, control)) if local else making,
        envs=tasks,
        vector=vector,
        num_envs=num_envs,
        threads=torch.get_num_threads(),
        key=uuid.uuid4().hex,
    )
    waiting = {
        name: _jobs(name, make, store, seeds, control, None if local else 2 * num_envs) for name, make in tasks.items()
    }
    if local:
        for name, jobs in waiting.items():
            _run(name, workers, setting, jobs, store, control)
    else:
        _run("", workers, setting, [job for jobs in waiting.values() for job in jobs], store, control)
    seconds = time.monotonic() - begin
    places = {name: digest(make) for name, make in tasks.items()}
    order = {name: k for k, name in enumerate(tasks)}  # whoever was ready first
    rows = sorted(store.asked(places, seeds), key=lambda row: (order[row["task"]], row["seed"]))
    summary = summarise(rows, checkpoint, policy, control, seconds)
    for name, limit in limits.items():
        summary["tasks"][name]["max_steps"] = limit
    new = store.rows[before:]
    summary["this_run"] = {"episodes": len(new), "env_steps": int(sum(r["steps"] for r in new))}
    summary["settings"] = {"episodes": episodes, "seed": seed, "splits": shares, "num_envs": num_envs, "device": device}
    summary["asked"] = {"envs": places, "seeds": {split: [each[0], each[-1]] for split, each in seeds.items() if each}}
    summary["command"] = typed()
    cost = getattr(policy, "cost", None)
    if cost is not None and cost["made"]:
        summary["subgoals"] = cost
    elif cost is not None:  # nothing was left to do: what was measured before stands
        summary["subgoals"] = _earlier(folder / "summary.json").get("subgoals")
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    album = getattr(policy, "album", None)
    if album is not None and (pictures := album.write(folder / "subgoals.png")) is not None:
        log(f"generated subgoals: {pictures}")
    if videos:
        from .video import record_videos

        record_videos(folder, rows, tasks, videos)
    _print(summary)
    if report:
        from .report import write_report

        log(f"report: {write_report(folder, Path(checkpoint))}")
    return 0


def _earlier(path: Path) -> dict[str, Any]:
    """The summary of an evaluation that was run before; empty where there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _policy(
    checkpoint: str,
    executor: Callable[..., Policy],
    planner: Callable[..., Any] | None,
    spec: EmbodimentSpec | None,
    device: str,
    acceleration: Acceleration | None,
) -> Policy:
    """What acts: a checkpoint's policy, or a planner over one that generates subgoals."""
    generates = is_pair(checkpoint) or kind_of(checkpoint) is not None
    if acceleration is not None and (generates or planner is not None):
        raise ConfigError("planners run their models as they are: expected acceleration=plain with a planner")
    if is_pair(checkpoint):
        from .planners.latent import SlowFastRunner

        return SlowFastRunner.from_checkpoint(checkpoint, executor, planner, spec)
    if kind_of(checkpoint) is not None or (planner is not None and not Path(checkpoint).is_dir()):
        from .planners.subgoals import SubgoalRunner

        return SubgoalRunner.from_checkpoint(checkpoint, executor, planner, spec)
    if planner is not None:
        raise ConfigError(
            f"{checkpoint} generates no subgoals: expected a checkpoint of brachium train-visual, train-video or "
            "train-latent beside planner=visual, video or latent"
        )
    return executor(VLAPolicy.from_checkpoint(checkpoint, like=spec, device=device, acceleration=acceleration))


def _tasks(
    env: Callable[..., Any] | None, suite: Mapping[str, Callable[..., Any]] | None
) -> dict[str, Callable[..., Any]]:
    if env is not None:
        made = env()
        name = str(made.task.name) if hasattr(made, "task") else "task"
        made.close()
        return {name: env}
    if not suite:
        raise ConfigError("nothing to evaluate in: give env=tabletop/reach or suite=basics")
    return dict(suite)


def look_at(
    make: Callable[..., Any], spec: EmbodimentSpec | None
) -> tuple[int | None, EmbodimentSpec, tuple[str, ...] | None]:
    """An environment's number of steps, where the task says it, its embodiment, which must be that of all, and the
    kinds of instructions it has, where it says them."""
    made = make()
    try:
        own: EmbodimentSpec = made.spec_embodiment
        if spec is not None:
            own.require_same(spec, "environment", "the other environments of the suite")
        limit = getattr(getattr(made, "task", None), "max_steps", None)
    finally:
        made.close()
    return limit if isinstance(limit, int) else None, own, getattr(made, "splits", None)


def _shares(wanted: Mapping[str, float], known: tuple[str, ...] | None) -> dict[str, float]:
    """Shares of the kinds of instructions that there are; suites of others have one kind."""
    found = {split: share for split, share in wanted.items() if known is None or split in known}
    if not found:
        raise ConfigError(f"splits: expected {list(known or ())}, which these environments have, got {list(wanted)}")
    return found


def _seeds(episodes: int, shares: Mapping[str, float], first: int) -> dict[str, list[int]]:
    """Seeds of each kind of instruction; the first kinds get what rounding leaves over."""
    total = sum(shares.values())
    if total <= 0:
        raise ConfigError(f"expected positive shares in splits, got {dict(shares)}")
    counts = {split: int(episodes * share / total) for split, share in shares.items()}
    for split in list(counts)[: episodes - sum(counts.values())]:
        counts[split] += 1
    seeds, start = {}, first
    for split, count in counts.items():
        seeds[split] = list(range(start, start + count))
        start += count
    return seeds


def _acting(
    checkpoint: str,
    executor: Callable[..., Policy],
    planner: Callable[..., Any] | None,
    device: str,
    control: str,
    acceleration: Acceleration | None,
    spec: EmbodimentSpec,
) -> Policy:
    """What acts, in a worker."""
    return _under(_policy(checkpoint, executor, planner, spec, device, acceleration), control)


def _under(policy: Policy, control: str) -> Policy:
    return BlindPolicy(policy) if control == "blind" else policy


def _jobs(
    name: str,
    make: Callable[..., Any],
    store: EpisodeLog,
    seeds: Mapping[str, Sequence[int]],
    control: str,
    size: int | None,
) -> list[Job]:
    """The episodes of a task that are not there yet, so many a job; None for all of a kind of instruction."""
    place = digest(make)
    done = {(row["split"], row["seed"]) for row in store.rows if row["task"] == name and row.get("env") == place}
    found = []
    for split, each in seeds.items():
        todo = [s for s in each if (split, s) not in done]
        options = {"split": split, "misname": control == "shuffle"}
        step = size or max(len(todo), 1)
        parts = (tuple(todo[k : k + step]) for k in range(0, len(todo), step))
        found += [Job(task=name, split=split, seeds=part, options=options) for part in parts]
    if not found:
        log(f"{name}: all {sum(map(len, seeds.values()))} episodes are there already")
    return found


def _run(name: str, workers: Workers, setting: Setting, jobs: Sequence[Job], store: EpisodeLog, control: str) -> None:
    """Run jobs and note every episode as it ends."""
    if not jobs:
        return
    places = {task: digest(make) for task, make in setting.envs.items()}
    successes = steps = 0
    label = f"evaluating {name}" if name else f"evaluating {len({job.task for job in jobs})} tasks"
    with progress(label, total=sum(len(job.seeds) for job in jobs), unit="episodes") as bar:
        for job, result in workers.run(setting, jobs):
            store.add(job.task, places[job.task], job.split, job.options, result)
            successes += result.success
            steps += result.steps
            bar.update(1, success=f"{successes}/{bar.done + 1}", env_steps_per_s=round(steps / bar.elapsed))


class BlindPolicy:
    """A policy that is shown black images: what it still achieves, it does without seeing."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.embodiment = policy, policy.embodiment

    def reset(self, lane: int, seed: int) -> None:
        """Start an episode."""
        self.policy.reset(lane, seed)

    def act(self, observations: Sequence[Observation], lanes: Sequence[int]) -> np.ndarray:
        """Act on the same observations without light."""
        dark = [replace(o, images={k: np.zeros_like(v) for k, v in o.images.items()}) for o in observations]
        return self.policy.act(dark, lanes)


class EpisodeLog:
    """One JSON line an episode, written when it ends; rows of another checkpoint or setting are dropped."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a kill tore the last line
                if row.get("key") == key:
                    self.rows.append(row)
            if self.rows:
                log(f"{path}: going on after {len(self.rows)} finished episodes")
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def asked(self, places: Mapping[str, str], seeds: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
        """Episodes of these tasks in these environments, kinds of instructions and seeds: what is told of no others."""
        wanted = {split: set(each) for split, each in seeds.items()}
        return [
            row
            for row in self.rows
            if row.get("env") == places.get(row["task"], "") and row["seed"] in wanted.get(row["split"], ())
        ]

    def add(self, task: str, place: str, split: str, options: Mapping[str, Any], result: EpisodeResult) -> None:
        """Append a finished episode; `place` tells its environment from others."""
        row = {
            "key": self.key,
            "task": task,
            "env": place,
            "split": split,
            "options": dict(options),
            "seed": result.seed,
            "instruction": result.instruction,
            "success": result.success,
            "failure": result.failure,
            "steps": result.steps,
            "seconds": round(result.seconds, 3),
            "actions": result.actions.astype(float).tolist(),
        }
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _run_key(checkpoint: str, policy: Policy, control: str, acceleration: Acceleration | None) -> str:
    """What a result depends on: weights, executor, control, and how chunks are computed."""
    found = hashlib.sha256((Path(checkpoint) / "model.safetensors").read_bytes())
    options = {k: v for k, v in vars(policy).items() if isinstance(v, (int, float, str, bool))}
    hurried = [] if acceleration is None else [vars(acceleration)]
    found.update(json.dumps([type(policy).__name__, options, control, *hurried], sort_keys=True).encode())
    return found.hexdigest()[:16]


def summarise(
    rows: Sequence[Mapping[str, Any]], checkpoint: str, policy: Policy, control: str, seconds: float
) -> dict[str, Any]:
    """Counts, rates and intervals in all, per task, per kind of instruction, and per both."""

    def group(chosen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = rate(sum(bool(r["success"]) for r in chosen), len(chosen))
        return result | {"mean_steps": round(float(np.mean([r["steps"] for r in chosen])), 2) if chosen else 0.0}

    tasks: dict[str, Any] = {}
    for name in dict.fromkeys(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == name]
        parts = {s: group([r for r in mine if r["split"] == s]) for s in dict.fromkeys(r["split"] for r in mine)}
        tasks[name] = group(mine) | {"splits": parts}
    splits = {s: group([r for r in rows if r["split"] == s]) for s in dict.fromkeys(r["split"] for r in rows)}
    meta = VLAPolicy.describe(checkpoint)
    return {
        "checkpoint": checkpoint,
        "head": meta.get("head"),
        "parameters": meta.get("parameters"),
        "train_seed": meta.get("seed"),
        "executor": type(policy).__name__,
        "control": control,
        "seconds": round(seconds, 2),
        "env_steps": int(sum(r["steps"] for r in rows)),
        "total": group(rows),
        "tasks": tasks,
        "splits": splits,
    }


def _print(summary: Mapping[str, Any]) -> None:
    def cell(group: Mapping[str, Any] | None) -> str:
        if group is None:
            return ""
        low, high = group["ci95"]
        share = f"{100 * group['success_rate']:.0f} %"
        return f"{group['success']}/{group['episodes']}  {share}  [{100 * low:.0f}, {100 * high:.0f}]"

    splits = list(summary["splits"])
    rows = [
        [name, cell(task), *(cell(task["splits"].get(s)) for s in splits), f"{task['mean_steps']:.1f}"]
        for name, task in summary["tasks"].items()
    ]
    rows.append(["all", cell(summary["total"]), *(cell(summary["splits"][s]) for s in splits), ""])
    control = "" if summary["control"] == "none" else f", control: {summary['control']}"
    table(
        f"success with 95 % intervals ({summary['head']}{control}, {human_time(summary['seconds'])})",
        ["task", "all", *(SPLIT_NAMES.get(s, s) for s in splits), "steps"],
        rows,
    )
