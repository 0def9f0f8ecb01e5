"""Honesty checks of the demo: controls, the expert, training seeds, and success over demonstrations and minutes.

Run by ``make bench-demo``. Everything lands in ``outputs/`` (the demo's own folder is used; what is there is reused);
the figures go to ``benchmarks/results/demo.json`` and, as tables, to ``docs/results.md``. Parts can be run one by one:
figures of other parts are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("MUJOCO_GL", "egl")

import numpy as np

from brachium.console import log, progress
from brachium.hardware import processor
from brachium.policies.intervals import rate

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "outputs"
PARTS = ("demo", "shuffle", "blind", "chance", "expert", "tokenized", "seeds", "minutes", "demonstrations")
TASKS = ("reach", "push", "place")


def brachium(*words: str) -> None:
    """Run the command as a user would."""
    log("$ brachium " + " ".join(words))
    subprocess.run([str(Path(os.sys.executable).with_name("brachium")), *words], check=True)  # type: ignore[attr-defined]


def demo(*words: str, name: str = "demo") -> dict[str, Any]:
    """Run the demo with options and return its result."""
    brachium("demo", f"out={(OUT / name).relative_to(ROOT)}", *words)
    return json.loads((OUT / name / "result.json").read_text())


def seeded(seed: int, *words: str) -> dict[str, Any]:
    """The demo with another seed of its training."""
    return demo(*words, f"optimization.seed={seed}", name=f"demo-seed-{seed}")


def evaluation(run: str, out: str, *words: str) -> dict[str, Any]:
    """Evaluate a checkpoint of the demo with options and return its summary."""
    target = OUT / "controls" / out
    checkpoint = OUT.relative_to(ROOT) / "demo" / run / "checkpoint"
    options = (f"out={target.relative_to(ROOT)}", "videos=0", "report=false")
    brachium("eval", f"checkpoint={checkpoint}", *options, *words)
    return json.loads((target / "summary.json").read_text())


def shorter(steps: int, demonstrated: dict[str, Any], *words: str) -> dict[str, Any]:
    """A head trained for fewer steps, from the demo's demonstrations and encoder; minutes as if it were the demo."""
    full, run = OUT.relative_to(ROOT) / "demo", OUT.relative_to(ROOT) / f"demo-steps-{steps}"
    own = f"optimization.steps={steps}"
    same = ("optimization.batch_size=128", "optimization.ema=0.998", f"encoder={full}/flow-0/checkpoint")
    brachium("train", f"store={full}/store", f"out={run}", own, *same)
    brachium("eval", f"checkpoint={run}/checkpoint", f"out={run}/eval", "videos=0", "report=false", *words)
    summary = json.loads((ROOT / run / "eval" / "summary.json").read_text())

    def head_seconds(folder: Path) -> float:
        lines = [json.loads(line) for line in (folder / "log-act.jsonl").read_text().splitlines()]
        first, last = ([r for r in lines if "loss" in r][k] for k in (0, -1))
        return float(last["step"] * (last["time"] - first["time"]) / max(1, last["step"] - first["step"]))

    saved = head_seconds(ROOT / full / "flow-0") - head_seconds(ROOT / run)
    return {"steps": steps, "tasks": summary["tasks"], "seconds": {"total": demonstrated["seconds"]["total"] - saved}}


def expert(episodes: int) -> dict[str, Any]:
    """Success of the scripted experts on the evaluation's own seeds."""
    from brachium.cli.compose import load

    result: dict[str, Any] = {}
    for task in TASKS:
        env = load(f"env/tabletop/{task}")(images=False)
        wins = 0
        with progress(f"expert {task}", total=episodes, unit="episodes") as bar:
            for seed in range(1_000_000, 1_000_000 + episodes):
                env.reset(seed=seed)
                ended = False
                while not ended:
                    _, _, terminated, truncated, info = env.step(env.expert_action())
                    ended = terminated or truncated
                wins += bool(info["success"])
                bar.update(1)
        result[task] = rate(wins, episodes)
    return result


def chance(episodes: int = 2000) -> dict[str, float]:
    """Success of a perfect actor that does what a shuffled instruction says: the share of instructions still right."""
    from brachium.cli.compose import load
    from brachium.envs.tabletop import misname

    result = {}
    for task in TASKS:
        made = load(f"env/tabletop/{task}")(images=False)
        same = 0
        for seed in range(episodes):
            episode = made.task.sample(np.random.default_rng(seed), "train")
            told = misname(made.task, episode, "train", seed).instruction
            same += all(name in told for name in episode.roles.values())
        result[task] = same / episodes
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=100, help="evaluation episodes a task")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--demos", type=int, nargs="*", default=[25, 50, 100], help="smaller demonstration counts")
    parser.add_argument("--steps", type=int, nargs="*", default=[400, 1200], help="smaller numbers of the head's steps")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, help="what to measure")
    options = parser.parse_args()
    os.chdir(ROOT)
    episodes, parts = f"episodes={options.episodes}", options.parts
    target = ROOT / "benchmarks" / "results" / "demo.json"
    results: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    results["machine"] = f"{os.cpu_count()} cores, {processor()}, no GPU"
    measured: dict[str, Callable[[], Any]] = {
        "demo": lambda: demo(episodes),
        "shuffle": lambda: evaluation("flow-0", "shuffle", episodes, "control=shuffle"),
        "blind": lambda: evaluation("flow-0", "blind", episodes, "control=blind"),
        "chance": chance,
        "expert": lambda: expert(options.episodes),
        "tokenized": lambda: demo(episodes, "model/head=tokenized"),
        "seeds": lambda: [results["demo"], *(seeded(seed, episodes) for seed in range(1, options.seeds))],
        "minutes": lambda: [shorter(steps, results["demo"], episodes) for steps in options.steps],
        "demonstrations": lambda: [
            {"per_task": count, **demo(episodes, f"demos={count}", name=f"demo-{count}")} for count in options.demos
        ],
    }
    from results_page import fill_readme, write_page

    target.parent.mkdir(exist_ok=True)
    for part in parts:
        results[part] = measured[part]()
        target.write_text(json.dumps(results, indent=1) + "\n")  # at once: the parts take an hour in all
        write_page(results, ROOT)
        if part == "demo":
            summary = json.loads((OUT / "demo" / "flow-0" / "eval" / "summary.json").read_text())
            fill_readme(ROOT / "README.md", results["demo"], summary, results["machine"])
    log(f"wrote {target} and docs/results.md")


if __name__ == "__main__":
    main()
