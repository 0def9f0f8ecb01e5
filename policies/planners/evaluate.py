"""The verb ``brachium eval planner=...``: planners on the same episodes, and what became of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium

from ...console import log, progress, table
from ...errors import ConfigError
from ...spec import EmbodimentSpec
from ..base import Policy
from .chains import CHAINED, require_chains, run_chains, summarise_chains
from .episode import run_episode, summarise
from .lm.base import LanguageModel
from .timeline import write_planner_report
from .wiring import Factory, TrueGoals, assemble

SETTINGS = ("families", "only", "kinds", "gap", "failure", "drop", "disturbance", "max_steps")
"""What an environment's results depend on."""


def evaluate_planner(
    *,
    planner: Factory,
    env: Callable[[], gymnasium.Env[Any, Any]],
    goals: Factory | None = None,
    lm: Callable[[], LanguageModel] | None = None,
    affordance: Factory | None = None,
    fallback: Factory | None = None,
    gate: Factory | None = None,
    checkpoint: str | None = None,
    executor: Callable[..., Any] | None = None,
    eyes: Factory | None = None,
    detector: Factory | None = None,
    termination: str = "two_key",
    look_error: float = 0.05,
    latency: int = 0,
    streak: int = 3,
    look_every: int = 1,
    confirm: int = 1,
    episodes: int = 200,
    chains: int = 0,
    splits: Mapping[str, float] | None = None,
    seed: int = 1_000_000,
    out: str = "outputs/eval-planner",
) -> int:
    """Run a planner over long-horizon work and report success when the system itself stopped, with intervals.

    Episodes depend on their seed alone: planners that are compared meet the same work, the same luck and the same
    errors of the detectors. Every episode is written when it ends; typed again, the command goes on.

    Args:
        planner: What says what to do next.
        env: Long-horizon work.
        goals: What says what an instruction comes to; the truth where null.
        lm: Language model of planner and goals.
        affordance: What says how likely skills are to succeed.
        fallback: Planner that is asked when the first proposes nothing that may be done.
        gate: What refuses skills; by default what the scene speaks against.
        checkpoint: Policy that carries out skills in a world with physics; scripted experts do when null.
        executor: Turns its chunks into actions.
        eyes: What reads scenes; the truth is told when null.
        detector: What sees whether a skill is done; the scene's literals say so when null.
        termination: ``two_key``, ``planner`` or ``goal``.
        look_error: Share of looks at success and at the end that are wrong; in a world with physics nothing is made
            wrong, but the test of the end takes that many looks to be.
        latency: Steps that a proposal takes to come.
        streak: Looks in a row that end the work although the planner goes on; 0 for never.
        look_every: Steps between two looks at scene, success and end.
        confirm: Looks in a row that tell that a skill is done.
        episodes: To run.
        chains: Chains of five tasks to run too (CALVIN's protocol): each is told when the system has ended the one
            before, and counts where it is done then.
        splits: Kind of wording -> share of the episodes.
        seed: First seed; training uses seeds below a million.
        out: Folder for episodes and summary.
    """
    if episodes < 1 or chains < 0:
        raise ConfigError(f"expected at least one episode and chains from 0, got {episodes} and {chains}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    world: Any = env().unwrapped
    for name in ("library", "calls", "instructions"):
        if not hasattr(world, name):
            raise ConfigError(f"planners are compared on long-horizon work; {type(world).__name__} has no {name}")
    if chains:
        require_chains(world)
    require_physics(world, checkpoint, eyes, detector)
    model = None if lm is None else lm()
    runner, parts = assemble(
        world,
        planner=planner,
        goals=goals,
        lm=model,
        affordance=affordance,
        fallback=fallback,
        gate=gate,
        options={
            "termination": termination,
            "latency": latency,
            "streak": streak,
            "look_every": look_every,
            "confirm": confirm,
        },
        look_error=look_error,
        policy=load_policy(checkpoint, executor, world.spec_embodiment),
        eyes=eyes,
        detector=detector,
    )
    models = [each for each in (model, getattr(parts["goals"], "lm", None)) if each is not None]
    shares = splits or {"train": 1.0}
    plan = [(seed + k, split) for k, split in enumerate(_spread(shares, episodes))]
    acts = None if checkpoint is None else [digest(checkpoint), repr(getattr(executor, "keywords", executor))]
    key = _key(world, parts, termination, look_error, latency, streak, look_every, confirm, acts)
    rows = finished(folder / "episodes.jsonl", key, plan)
    if rows:
        log(f"{folder / 'episodes.jsonl'}: going on after {len(rows)} finished episodes")
    todo = [each for each in plan if each not in {(row["seed"], row["split"]) for row in rows}]
    with (
        (folder / "episodes.jsonl").open("a") as file,
        progress(runner.planner.name, total=len(plan), unit="episodes") as bar,
    ):
        bar.update(len(rows))
        for number, split in todo:
            row = {"key": key, **run_episode(world, runner, number, split, models)}
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            bar.update(1, success=f"{sum(r['success'] for r in rows)}/{len(rows)}")
    summary = {"planner": runner.planner.name, "termination": termination, "look_error": look_error, "key": key}
    summary |= {
        "total": summarise(rows),
        "splits": {s: summarise([r for r in rows if r["split"] == s]) for s in shares},
    }
    families = sorted({row["family"] for row in rows})
    summary["families"] = {f: summarise([r for r in rows if r["family"] == f]) for f in families}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _show(summary)
    if chains:
        seeds = [seed + CHAINED + k for k in range(chains)]
        told = summarise_chains(run_chains(world, runner, seeds, folder / "chains.jsonl", key))
        summary["chains"] = told
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        log(f"{chains} chains of five tasks: {told['mean']:.2f} done in a row ({folder / 'chains.jsonl'})")
    log(f"episodes with every decision: {folder / 'episodes.jsonl'}")
    log(f"report: {write_planner_report(folder, summary, rows)}")
    return 0


def require_physics(world: Any, *parts: object) -> None:
    """Raise ConfigError where a part is given that only a world with physics has a use for."""
    if any(part is not None for part in parts) and not hasattr(world, "expert_action"):
        raise ConfigError(
            f"checkpoint, eyes and detector are for a world with physics; {type(world).__name__} has none. "
            "Type: env=longhorizon/physical"
        )


def load_policy(checkpoint: str | None, executor: Callable[..., Any] | None, spec: EmbodimentSpec) -> Policy | None:
    """The policy of a checkpoint for one robot; None without one."""
    if checkpoint is None:
        return None
    if executor is None:
        raise ConfigError("a checkpoint needs what turns its chunks into actions. Type: executor=receding")
    from ..vla_policy import VLAPolicy

    return executor(VLAPolicy.from_checkpoint(checkpoint, like=spec, batch_size=1))


def digest(checkpoint: str) -> str:
    """Of a checkpoint's weights."""
    return hashlib.sha256((Path(checkpoint) / "model.safetensors").read_bytes()).hexdigest()[:16]


def _spread(shares: Mapping[str, float], count: int) -> list[str]:
    """A kind of wording for each episode, the kinds evenly mixed."""
    total = sum(shares.values())
    if total <= 0.0 or min(shares.values()) < 0.0:
        raise ConfigError(f"expected shares that are positive, got {dict(shares)}")
    taken = dict.fromkeys(shares, 0.0)
    found = []
    for k in range(count):
        name = max(shares, key=lambda s: shares[s] / total * (k + 1) - taken[s])
        taken[name] += 1.0
        found.append(name)
    return found


def _key(world: Any, parts: Mapping[str, Any], *options: Any) -> str:
    """What results depend on: the values of all parts, two levels deep."""

    def told(part: Any, depth: int) -> Any:
        if isinstance(part, (int, float, str, bool, tuple, list, Path)) or part is None:
            return repr(part)
        if isinstance(part, Mapping):
            return {str(k): told(v, depth - 1) for k, v in part.items()}
        weights = Path(str(getattr(part, "folder", ""))) / "model.safetensors"
        if hasattr(part, "folder") and weights.exists():
            return [type(part).__name__, hashlib.sha256(weights.read_bytes()).hexdigest()]
        values = vars(part) if hasattr(part, "__dict__") else {}
        kept = {k: told(v, depth - 1) for k, v in values.items() if depth > 0 and not k.startswith("_")}
        return [type(part).__name__, kept]

    settings = {name: repr(getattr(world, name, None)) for name in SETTINGS}
    shown = {name: told(part, 3) for name, part in parts.items() if not isinstance(part, TrueGoals)}
    text = json.dumps([settings, shown, [repr(o) for o in options]], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished(path: Path, key: str, plan: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """Those of the planned episodes that were run before with the same settings; a torn last line is dropped."""
    lines, rows, wanted = [], {}, set(plan)
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        lines.append(line)
        if row.get("key") == key and (row["seed"], row["split"]) in wanted:
            rows[row["seed"], row["split"]] = row
    path.write_text("".join(line + "\n" for line in lines))
    return list(rows.values())


def _show(summary: Mapping[str, Any]) -> None:
    def share(found: Mapping[str, Any]) -> str:
        low, high = found["ci95"]
        return f"{100 * found['success_rate']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"

    parts = {"all": summary["total"], **summary["splits"], **summary["families"]}
    rows = [
        [
            name,
            str(part["episodes"]),
            share(part["success"]),
            share(part["ever"]),
            share(part["premature"]),
            f"{100 * part['goal_share']:.0f} %",
            f"{part['invalid_per_episode']:.2f}",
            "" if part["skills_to_optimum"] is None else f"{part['skills_to_optimum']:.2f}",
            f"{part['ms_per_proposal']:.1f} ms",
        ]
        for name, part in parts.items()
        if part["episodes"]
    ]
    columns = ["", "episodes", "success", "ever", "ended too early", "goal", "invalid", "skills/optimum", "a proposal"]
    table(f"planner {summary['planner']}, termination {summary['termination']}", columns, rows)
    log(f"endings: {summary['total']['endings']}")
