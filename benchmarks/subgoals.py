"""Generated subgoals and videos in closed loop, beside a language-conditioned policy on the same demonstrations.

    python benchmarks/subgoals.py                 # trains what is not there, then all rows; goes on where it stopped
    python benchmarks/subgoals.py --only visual visual-image --episodes 60

All rows meet the same episodes. Writes ``benchmarks/results/subgoals.json`` and a table of ``docs/planning.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brachium.console import log

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "results" / "subgoals.json"
PAGE = ROOT / "docs" / "planning.md"
SEED = 4_000_000
"""Of the first episode: others than those that were looked at while this was made."""
TASKS = ("reach", "push", "place")
MIX = "splits={train: 0.5, paraphrase: 0.25, pair: 0.25}"
RECORDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "demos": (
        *((f"env=tabletop/{task}", "episodes=250") for task in TASKS),
        # The arm goes astray in every one of these: what comes back from beside a thing is rare in the others.
        ("env=tabletop/push", "episodes=300", "seed=10000", "stumble=1.0"),
        ("env=tabletop/place", "episodes=150", "seed=10000", "stumble=1.0"),
    ),
}
"""Store -> words of the commands that record it."""
SYSTEMS: dict[str, tuple[str, ...]] = {
    "visual": ("train-visual", "store={work}/demos", "editor.steps=2200", "policy.steps=5000"),
    "video": ("train-video", "store={work}/demos", "init={work}/visual/checkpoint"),
    "language": (
        *("train", "store={work}/demos", "encoder=nano", "optimization.steps=3500", "optimization.batch_size=128"),
        *("optimization.ema=0.998", "optimization.warmup=100"),
    ),
}
"""What is trained, in this order: words of the command. Later ones go on from earlier ones, whose time counts too."""
ROWS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "language": ("language-conditioned policy (nano, flow head)", "language", ()),
    "visual": ("**visual**: image subgoals, goal-conditioned policy", "visual", ("planner=visual",)),
    "visual-first": (
        "visual, the first candidate in place of the best",
        "visual",
        ("planner=visual", "planner.rank=false"),
    ),
    "visual-image": (
        "visual, of another episode's image",
        "visual",
        ("planner=visual", "planner.shuffle=image"),
    ),
    "visual-text": ("visual, of another instruction", "visual", ("planner=visual", "planner.shuffle=text")),
    "video": ("**video**: short videos, inverse dynamics", "video", ("planner=video",)),
    "video-image": ("video, of another episode's image", "video", ("planner=video", "planner.shuffle=image")),
    "video-text": ("video, of another instruction", "video", ("planner=video", "planner.shuffle=text")),
}
"""Name -> (what it is, which system, words of ``brachium eval``)."""


def brachium(*words: str) -> None:
    """Run a verb."""
    log("$ brachium " + " ".join(words))
    subprocess.run([sys.executable, "-m", "brachium", *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=100, help="a task")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--work", default="outputs/subgoals", help="demonstrations, checkpoints, evaluations")
    options = parser.parse_args()
    work = Path(options.work)
    for name, recordings in RECORDED.items():
        if not (work / name).exists():
            for words in recordings:
                brachium("record", f"out={work / name}", *words)
    wanted = needed({ROWS[name][1] for name in options.only})
    for name, words in SYSTEMS.items():
        if name in wanted and not (work / name / "checkpoint").exists():
            verb, *rest = (word.format(work=work) for word in words)
            brachium(verb, f"out={work / name}", "resume=true", *rest)
    results: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {"rows": {}}
    for name in options.only:
        _, system, words = ROWS[name]
        checkpoint, out = work / system / "checkpoint", work / "eval" / name
        brachium(
            *("eval", f"checkpoint={checkpoint}", "suite=basics", *words),
            *(f"episodes={options.episodes}", f"seed={SEED}", f"out={out}", MIX, "videos=1", "num_envs=10"),
        )
        results["rows"][name] = measured(out, checkpoint, system)
        results["machine"] = f"{os.cpu_count()} cores"
        TARGET.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)


def needed(systems: set[str]) -> set[str]:
    """These systems and all that they go on from."""
    found = set(systems)
    for name in reversed(SYSTEMS):
        if name in found:
            found |= {other for other in SYSTEMS if any(f"/{other}/checkpoint" in word for word in SYSTEMS[name])}
    return found


def measured(out: Path, checkpoint: Path, system: str) -> dict[str, Any]:
    """What an evaluation and the training before it came to."""
    summary = json.loads((out / "summary.json").read_text())
    meta = json.loads((checkpoint / "meta.json").read_text())
    kept = {key: summary[key] for key in ("total", "tasks", "splits", "seconds", "env_steps", "parameters")}
    found = {**kept, "training_s": meta["seconds"], "cpu_s": meta.get("process_cpu_seconds"), "system": system}
    return found | {"subgoals": summary.get("subgoals"), "episodes_a_task": summary["settings"]["episodes"]}


def share(found: Mapping[str, Any]) -> str:
    """A rate with its interval."""
    low, high = found["ci95"]
    return f"{100 * found['success_rate']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def write_page(results: Mapping[str, Any]) -> None:
    """Put the table between the marks of the page."""
    rows = results["rows"]
    lines = [
        "| | episodes | all [%] | reach | push | place | new objects, new wordings | training [min] | ms/subgoal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (title, _, _) in ROWS.items():
        if name not in rows:
            continue
        row = rows[name]
        tasks = " | ".join(share(row["tasks"][task]) for task in TASKS)
        new = " / ".join(f"{100 * row['splits'][s]['success_rate']:.0f}" for s in ("pair", "paraphrase"))
        total = row["training_s"]["total"] / 60.0
        ms = "" if not row["subgoals"] else f"{row['subgoals']['ms']:.0f}"
        lines.append(
            f"| {title} | {row['total']['episodes']} | {share(row['total'])} | {tasks} | {new} | {total:.0f} | {ms} |"
        )
    text = (
        "`benchmarks/subgoals.py`, a third of the episodes each task, 95 % Wilson intervals. Training is wall time "
        "with one thread on a shared machine, with all that a system began with, and without reading the instructions "
        "once (3 to 5 minutes).\n\n" + "\n".join(lines)
    )
    page = PAGE.read_text()
    begin, end = "<!-- subgoals: begin -->", "<!-- subgoals: end -->"
    before, _, rest = page.partition(begin)
    PAGE.write_text(before + begin + "\n\n" + text + "\n\n" + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
