"""Does the pretrained encoder pay, and how is it best adapted? Figures go to ``benchmarks/results/adaptation.json``.

Type: .venv/bin/python benchmarks/adaptation.py amount    (pretrained against scratch, over demonstrations)
      .venv/bin/python benchmarks/adaptation.py modes     (frozen, LoRA, whole, insulated; what is forgotten)

Scratch and pretrained are the same network, trained for the same steps of the same batches; seeds draw weights,
noise and evaluation episodes anew. Everything lands in ``outputs/adaptation``, and what is there is reused.
``docs/results.md`` shows the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("MUJOCO_GL", "egl")

from demo_controls import OUT, ROOT, TASKS, brachium

from brachium.hardware import processor
from brachium.policies.intervals import rate
from brachium.vla.pretrained import identity_of

FOLDER = OUT / "adaptation"
TARGET = ROOT / "benchmarks" / "results" / "adaptation.json"
WAYS = {
    "scratch": ["encoder=null", "tune=full"],
    "whole": ["encoder=nano", "tune=full"],
    "frozen": ["encoder=nano", "tune=frozen"],
    "frozen, 8 x the steps": ["encoder=nano", "tune=frozen", "optimization.steps=8000"],
    "LoRA": ["encoder=nano", "tune=lora"],
    "LoRA, insulated": ["encoder=nano", "tune=lora", "insulate=true"],
    "whole, insulated": ["encoder=nano", "tune=full", "insulate=true"],
}
AMOUNTS = ("scratch", "frozen", "frozen, 8 x the steps", "whole")
MODES = ("frozen", "LoRA", "LoRA, insulated", "whole", "whole, insulated")
LEARNT = ("color", "shape", "count", "left", "exists", "place")
"""Kinds of questions whose mean score says what is left of the language."""


def demonstrations(count: int) -> Path:
    """A store of the first `count` demonstrations of every task."""
    path = (FOLDER / f"store-{count}").relative_to(ROOT)
    for task in TASKS:
        brachium("record", f"env=tabletop/{task}", f"out={path}", f"episodes={count}")
    return path


def folder_name(name: str) -> str:
    """A way's name without what paths and the command line would trip over."""
    return name.replace(",", "").replace(" ", "-")


def policy(name: str, count: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and roll out one policy; its successes by task, and the seconds of its training."""
    run = FOLDER / f"{folder_name(name)}-{count}-{seed}"
    note = run / "policy.json"
    per_seed = -(-options.episodes // options.seeds)
    asked: dict[str, Any] = {"steps": options.steps, "batch": options.batch, "episodes": per_seed}
    if "encoder=nano" in WAYS[name]:
        asked["encoder"] = identity_of("nano")
    found: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {}
    if found.get("asked") == asked:
        return found
    shutil.rmtree(run, ignore_errors=True)
    out = run.relative_to(ROOT)
    steps = [f"optimization.steps={options.steps}", f"optimization.batch_size={options.batch}"]
    begin = time.monotonic()
    store = (FOLDER / f"store-{count}").relative_to(ROOT)
    words = [f"optimization.seed={seed}", "optimization.lr=0.0005", *steps, *WAYS[name]]
    brachium("train", f"store={store}", f"out={out}", *words)
    seconds = time.monotonic() - begin
    first = f"seed={1_000_000 + 10_000 * seed}"
    quiet = ("videos=0", "report=false")
    brachium("eval", f"checkpoint={out}/checkpoint", f"out={out}/eval", first, f"episodes={per_seed}", *quiet)
    tasks = json.loads((run / "eval" / "summary.json").read_text())["tasks"]
    wins = {task: [tasks[task]["success"], tasks[task]["episodes"]] for task in TASKS}
    found = {"asked": asked, "wins": wins, "seconds": seconds}
    note.write_text(json.dumps(found) + "\n")
    return found


def policies(names: Sequence[str], counts: Sequence[int], options: argparse.Namespace) -> dict[tuple[str, int], Any]:
    """Every policy, `options.workers` at once, pooled over seeds."""
    for count in counts:
        demonstrations(count)
    cells = [(name, count) for name in names for count in counts]
    with ThreadPoolExecutor(options.workers) as pool:
        runs = {cell: [pool.submit(policy, *cell, seed, options) for seed in range(options.seeds)] for cell in cells}
        return {cell: pooled([run.result() for run in some]) for cell, some in runs.items()}


def pooled(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates with intervals over all seeds, and the mean seconds of training."""
    tasks = {t: rate(sum(r["wins"][t][0] for r in runs), sum(r["wins"][t][1] for r in runs)) for t in TASKS}
    return {"tasks": tasks, "seconds": sum(r["seconds"] for r in runs) / len(runs)}


def amount(options: argparse.Namespace) -> dict[str, Any]:
    """Every encoder at every number of demonstrations."""
    made = policies(AMOUNTS, options.demos, options)
    cells = {name: {str(count): made[name, count] for count in options.demos} for name in AMOUNTS}
    return {"steps": options.steps, "batch": options.batch, "seeds": options.seeds, "cells": cells}


def modes(options: argparse.Namespace) -> dict[str, Any]:
    """Every way to adapt at one number of demonstrations, and the language scores of its encoder."""
    count = options.demos[len(options.demos) // 2]
    made = policies(MODES, [count], options)
    cells = {}
    for name in MODES:
        checkpoint = FOLDER / f"{folder_name(name)}-{count}-0" / "checkpoint"
        cells[name] = {**made[name, count], "language": language(checkpoint)}
    return {"demonstrations": count, "steps": options.steps, "batch": options.batch, "cells": cells}


def language(checkpoint: Path) -> dict[str, float]:
    """Scores of a policy's encoder on held-out wordings: answers, and pointing in the front view."""
    import torch

    from brachium.datasets.store import EpisodeStore
    from brachium.vla.checkpoint import load_checkpoint
    from brachium.vla.ground import Grounding
    from brachium.vla.pretrain import evaluate_pretraining
    from brachium.vla.pretrain_data import Mixture, names_of

    path = FOLDER / "questions"
    brachium(
        "record",
        "env=scenes",
        "env.split=paraphrase",
        f"out={path.relative_to(ROOT)}",
        "episodes=100",
        "seed=3000000",
    )
    store, model = EpisodeStore.open(path), load_checkpoint(checkpoint)
    mixture = Mixture(
        [store],
        tokenizer=model.tokenizer,
        max_tokens=model.recipe.max_tokens,
        length=24,
        questions=12,
        options=Grounding(store=""),
        grids=(model.encoder.backbone.token_grid, model.encoder.backbone.grid),
        names=names_of([store]),
        device=torch.device("cpu"),
        evaluation=True,
    )
    found = evaluate_pretraining(model.encoder.eval(), {"new": mixture})
    answers = [found[f"new/accuracy/{kind}"] for kind in LEARNT]
    return {"answers": sum(answers) / len(answers), "px": found["new/px/front"], "px_p90": found["new/px_p90/front"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("amount", "modes"))
    parser.add_argument("--demos", type=int, nargs="*", default=[25, 100, 400], help="demonstrations a task")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--episodes", type=int, default=200, help="evaluation episodes a task, over all seeds")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="policies at once, a thread each")
    parser.add_argument("--steps", type=int, default=1000, help="steps of every training")
    parser.add_argument("--batch", type=int, default=32, help="windows a step")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # two small trainings side by side are twice as fast as one on two threads
    found = {"amount": amount, "modes": modes}[options.part](options)
    results: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {}  # as it is hours later
    results["machine"] = f"{os.cpu_count()} cores, {processor()}, no GPU"
    results[options.part] = found
    TARGET.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
