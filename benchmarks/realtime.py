"""The demo's policy in real time beside plain simulation: server, controller and simulated robot in three processes.

    python benchmarks/realtime.py success   # 100 episodes a task
    python benchmarks/realtime.py delays    # executors over added delay

The policy of ``brachium demo experiment=realtime``. The same scenes in both: the seeds of an evaluation, instructions
in seen words. Every cell is written when it is done, so that the command typed again goes on; two of them may run side
by side, with ``--tasks``, where there are two cores. Nothing else should run on the machine. Writes
``benchmarks/results/realtime.json``.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from brachium.console import log
from brachium.policies.intervals import rate

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "results" / "realtime.json"
TASKS = ("reach", "push", "place")
EXECUTORS = {"receding": "receding horizon", "ensemble": "temporal ensemble", "rtc": "real-time chunking"}
DELAYS_MS = (0, 75, 150, 225, 300)


def brachium(*words: str) -> None:
    """Run a verb; its exit code is 1 where a run was stopped, which is counted as a failure of that episode."""
    done = subprocess.run([sys.executable, "-m", "brachium", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode not in (0, 1):
        raise SystemExit(f"brachium {' '.join(words)}: exit code {done.returncode}")


def load() -> dict[str, Any]:
    """What is measured already."""
    return json.loads(TARGET.read_text()) if TARGET.exists() else {"machine": f"{os.cpu_count()} cores", "cells": {}}


def plain(checkpoint: str, suite: str, task: str, episodes: int, out: Path) -> dict[str, Any]:
    """Success in plain simulation, on the scenes of the real-time runs."""
    others = [f"~suite.{other}" for other in TASKS if other != task]
    words = [f"checkpoint={checkpoint}", f"suite={suite}", *others, f"episodes={episodes}", "splits={train: 1.0}"]
    brachium("eval", *words, f"out={out}", "videos=0", "report=false")
    found = json.loads((out / "summary.json").read_text())["total"]
    return {key: found[key] for key in ("success", "episodes", "success_rate", "ci95")}


def real(
    checkpoint: str,
    embodiment: str,
    task: str,
    executor: str,
    delay_ms: float,
    episodes: int,
    out: Path,
    extra: list[str],
) -> dict[str, Any]:
    """Success in real time, and what the loop measured."""
    runs: list[dict[str, Any]] = []
    while len(runs) < episodes:  # a run that was stopped ends the command: it has failed, and the next goes on
        words = [f"policy={checkpoint}", f"env@robot.env=tabletop/{task}", f"executor={executor}", *extra]
        words += [f"embodiment@robot.env.embodiment={embodiment}", f"delay_ms={delay_ms}", "keep=false", "report=false"]
        words += [f"episodes={episodes - len(runs)}", f"seed={1_000_000 + len(runs)}", f"out={out}"]
        shutil.rmtree(out, ignore_errors=True)
        brachium("deploy", *words)
        runs += json.loads((out / "summary.json").read_text())["runs"]
        log(f"{task}, {executor}, +{delay_ms:g} ms: {sum(r['success'] for r in runs)}/{len(runs)}")
    failures: dict[str, int] = {}
    for run in runs:
        if not run["success"]:
            kind = run["failure"] if run["ending"] in ("done", "time") else f"{run['ending']}: {run['why'][:60]}"
            failures[kind] = failures.get(kind, 0) + 1
    return {
        **rate(sum(bool(run["success"]) for run in runs), len(runs)),
        "failures": failures,
        "seconds": round(float(np.mean([run["seconds"] for run in runs])), 2),
        "inference_ms": round(float(np.median([run["inference_ms"].get("p50", np.nan) for run in runs])), 1),
        "period_error_ms_p99": round(float(np.median([run["period_error_ms"].get("p99", np.nan) for run in runs])), 3),
        "chunk_jump_p95": round(float(np.median([run["chunk_jump"].get("p95", 0.0) for run in runs])), 4),
        "starved_ticks": int(sum(run["starved_ticks"] for run in runs)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("success", "delays"))
    parser.add_argument("--checkpoint", default="outputs/realtime/flow-0/checkpoint")
    parser.add_argument("--suite", default="basics_pose")
    parser.add_argument("--embodiment", default="arm6_pose")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--executor", default="rtc", choices=list(EXECUTORS), help="of the runs without delay")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--out", default="outputs/realtime")
    options = parser.parse_args()
    out, extra = Path(options.out).resolve(), [f"executor.temperature={options.temperature}"]
    out.mkdir(parents=True, exist_ok=True)
    plans: list[tuple[str, str, float]] = []
    for task in options.tasks:
        if options.part == "success":
            plans += [(task, "plain", 0.0), (task, options.executor, 0.0), (task, "rtc", 150.0)]
        else:
            plans += [(task, executor, delay) for delay in DELAYS_MS for executor in EXECUTORS]
    for task, how, delay in plans:
        results = load()
        key = f"{task}/{how}/{delay:g}/{options.temperature:g}/{options.episodes}"
        if key in results["cells"]:
            continue
        folder = out / key.replace("/", "-")
        if how == "plain":
            found = plain(options.checkpoint, options.suite, task, options.episodes, folder)
        else:
            embodiment = options.embodiment
            found = real(options.checkpoint, embodiment, task, how, delay, options.episodes, folder, extra)
        with Path(__file__).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            results = load()
            results["cells"][key] = found
            TARGET.with_suffix(".partial").write_text(json.dumps(results, indent=1) + "\n")
            TARGET.with_suffix(".partial").replace(TARGET)
        log(f"{key}: {json.dumps(found)}")


if __name__ == "__main__":
    main()
