"""Heads and embodiments in closed loop; figures go to ``benchmarks/results/heads.json``.

Type: .venv/bin/python benchmarks/heads.py heads         (heads on the same data and steps; --heads flow dit)
      .venv/bin/python benchmarks/heads.py embodiments   (two robots apart and in one model)

The encoder is the shipped one, frozen. Everything lands in ``outputs/heads``, and what is there is reused.
``docs/models.md`` shows the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("MUJOCO_GL", "egl")

from demo_controls import OUT, ROOT, TASKS, brachium

from brachium.hardware import processor
from brachium.policies.intervals import rate
from brachium.vla.checkpoint import read_meta

FOLDER = OUT / "heads"
TARGET = ROOT / "benchmarks" / "results" / "heads.json"
HEADS = ("flow", "diffusion", "dit", "regression", "tokenized", "fast", "beast")
SUITES = {"arm6_ee": "basics", "arm7_joint": "basics_arm7"}
TRAINING = ("optimization.batch_size=128", "optimization.ema=0.998", "encoder=nano")


def demonstrations(embodiment: str, count: int) -> str:
    """A store of the first `count` demonstrations of every task by a robot, as the command line names it."""
    path = str((FOLDER / f"store-{embodiment}").relative_to(ROOT))
    for task in TASKS:
        robot = f"embodiment@env.embodiment={embodiment}"
        brachium("record", f"env=tabletop/{task}", robot, f"out={path}", f"episodes={count}")
    return path


def policy(name: str, stores: list[str], embodiments: list[str], words: list[str], episodes: int) -> dict[str, Any]:
    """Train a policy and roll it out with each robot: successes by robot and task, seconds, parameters."""
    run = FOLDER / name
    note = run / "policy.json"
    asked = {"stores": stores, "words": words, "episodes": episodes}
    found: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {}
    if found.get("asked") == asked:
        return found
    shutil.rmtree(run, ignore_errors=True)
    out = run.relative_to(ROOT)
    begin = time.monotonic()
    brachium("train", f"store=[{','.join(stores)}]", f"out={out}", *TRAINING, *words)
    seconds = time.monotonic() - begin
    wins = {}
    for embodiment in embodiments:
        options = [f"suite={SUITES[embodiment]}", f"out={out}/eval-{embodiment}", f"episodes={episodes}"]
        brachium("eval", f"checkpoint={out}/checkpoint", *options, "videos=0", "report=false")
        tasks = json.loads((run / f"eval-{embodiment}" / "summary.json").read_text())["tasks"]
        wins[embodiment] = {task: rate(tasks[task]["success"], tasks[task]["episodes"]) for task in TASKS}
    parameters = read_meta(run / "checkpoint")["parameters"]
    found = {"asked": asked, "tasks": wins, "seconds": seconds, "parameters": parameters}
    note.write_text(json.dumps(found) + "\n")
    return found


def heads(options: argparse.Namespace) -> dict[str, Any]:
    """Every head on one robot."""
    store = demonstrations("arm6_ee", options.demos)
    steps = f"optimization.steps={options.steps}"
    with ThreadPoolExecutor(options.workers) as pool:
        runs = {
            head: pool.submit(
                policy, f"head-{head}", [store], ["arm6_ee"], [f"model/head={head}", steps], options.episodes
            )
            for head in options.heads
        }
        return {head: run.result() for head, run in runs.items()}


def embodiments(options: argparse.Namespace) -> dict[str, Any]:
    """Two robots with a model each, and with one model that saw as much of each."""
    stores = {name: demonstrations(name, options.demos) for name in SUITES}
    jobs = {name: ([stores[name]], [name], options.steps) for name in SUITES}
    jobs["both"] = (list(stores.values()), list(SUITES), 2 * options.steps)
    with ThreadPoolExecutor(options.workers) as pool:
        runs = {
            name: pool.submit(policy, f"robots-{name}", some, robots, [f"optimization.steps={steps}"], options.episodes)
            for name, (some, robots, steps) in jobs.items()
        }
        return {name: run.result() for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("heads", "embodiments"))
    parser.add_argument("--heads", nargs="*", default=HEADS, choices=HEADS, help="which heads")
    parser.add_argument("--demos", type=int, default=200, help="demonstrations a task")
    parser.add_argument("--episodes", type=int, default=200, help="evaluation episodes a task")
    parser.add_argument("--steps", type=int, default=3500, help="steps of every training")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="policies at once, a thread each")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # two small trainings side by side are twice as fast as one on two threads
    found = {"heads": heads, "embodiments": embodiments}[options.part](options)
    results: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {}  # as it is hours later
    results["machine"] = f"{os.cpu_count()} cores, {processor()}, no GPU"
    results |= {"demos": options.demos, "steps": options.steps, "episodes": options.episodes}
    results[options.part] = {**results.get(options.part, {}), **found}
    TARGET.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
