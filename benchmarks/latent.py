"""A slow and a fast system: success over the slow one's period and latency, with and without delay in training.

    python benchmarks/latent.py --store outputs/demo/store      # trains both pairs first; goes on where it was stopped
    python benchmarks/latent.py --page                          # the page from the figures that are there

Rows: both pairs over period and latency, and the trained one with its latent zeroed and shuffled. Then the instruction
is changed in the middle of reaching: how often the other thing is reached, and after how many steps the tool turns.
Writes ``benchmarks/results/latent.json`` and the tables of ``docs/planning.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from brachium.console import log, progress
from brachium.policies.intervals import rate

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "results" / "latent.json"
PAGE = ROOT / "docs" / "planning.md"
GRID = ((1, 0), (5, 0), (10, 0), (20, 0), (5, 5), (10, 10))
"""Period and latency [steps of 100 ms]."""
SEED = 3_000_000
TURN = 8
"""Step at which the instruction is changed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="outputs/demo/store", help="demonstrations of suite=basics")
    parser.add_argument("--pairs", nargs=2, metavar=("WITH", "WITHOUT"), help="trained pairs, instead of training")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--changes", type=int, default=100)
    parser.add_argument("--out", default="outputs/latent")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {"rows": {}}
    if not options.page:
        out = Path(options.out)
        pairs = dict(zip(("with", "without"), options.pairs or [train(options.store, out, d) for d in (10, 0)]))
        for name, pair in pairs.items():
            found.setdefault("training", {})[name] = json.loads((Path(pair) / "slowfast.json").read_text())["notes"]
        rows = [(name, period, latency, "none") for period, latency in GRID for name in pairs]
        rows += [("with", 5, 0, ablation) for ablation in ("zero", "shuffle")]
        for name, period, latency, ablation in rows:
            key = f"{name}-{period}-{latency}-{ablation}"
            if key in found["rows"]:
                continue
            words = [f"checkpoint={pairs[name]}", "planner=latent", f"planner.period={period}"]
            words += [
                f"planner.latency={latency}",
                f"planner.ablation={ablation}",
                "suite=basics",
                "splits={train:1.0}",
            ]
            words += [f"episodes={options.episodes}", f"seed={SEED}", f"out={out / key}", "videos=0", "report=false"]
            run(["eval", *words])
            tasks = json.loads((out / key / "summary.json").read_text())["tasks"]
            found["rows"][key] = {task: [row["success"], row["episodes"]] for task, row in tasks.items()}
            log(f"{key}: {found['rows'][key]}")
            save(found)
        found["changes"] = {str(p): change(pairs["with"], p, options.changes) for p in (5, 10)}
        save(found)
    write_page(found)


def save(found: dict[str, Any]) -> None:
    found["machine"] = f"{os.cpu_count()} cores"
    TARGET.write_text(json.dumps(found, indent=1) + "\n")


def run(words: list[str]) -> None:
    log("$ brachium " + " ".join(words))
    subprocess.run([sys.executable, "-m", "brachium", *words], check=True, stdout=subprocess.DEVNULL)


def train(store: str, out: Path, delay: int) -> str:
    """A pair trained with latents up to so many steps old."""
    folder = out / f"delay-{delay}"
    if not (folder / "pair").exists():
        run(["train-latent", f"store={store}", f"max_delay={delay}", f"out={folder}"])
    return str(folder / "pair")


def change(pair: str, period: int, count: int) -> dict[str, Any]:
    """Tell another thing in the middle of reaching; where the tool goes, and after how many steps."""
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    from brachium.envs.tabletop import TabletopEnv
    from brachium.policies.executor import RecedingHorizon
    from brachium.policies.planners.executing import observed
    from brachium.policies.planners.latent import LatentPlanner, SlowFastRunner

    with initialize_config_module("brachium.conf", version_base="1.3"):
        env: TabletopEnv = instantiate(compose("record", ["env=tabletop/reach"]).env)()
    executor = partial(RecedingHorizon, execute_horizon=1)
    runner = SlowFastRunner.from_checkpoint(pair, executor, partial(LatentPlanner, period=period))
    reached, turned, missed = 0, [], 0
    with progress(f"changed instruction, period {period}", total=count, unit="episodes") as bar:
        for k in range(count):
            seen, _ = env.reset(seed=SEED + 10_000 + k)
            assert env.episode is not None
            rng = np.random.default_rng(k)
            first = env.episode.roles["object"]
            others = [i.name for i in env.sim.scene.items if i.name != first]
            other = max(others, key=lambda n: np.linalg.norm(env.sim.position(n) - env.sim.position(first)))
            runner.reset(0, SEED + k)
            turn = None
            for step in range(TURN + 45):
                if step == TURN:
                    roles = {"object": other, "goal": other}
                    text = env.task.phrasings.sample(rng, "train", roles)
                    env.episode = replace(env.episode, roles=roles, instruction=text)
                    seen["instruction"] = text
                before = env.sim.tool_position
                seen, _, _, _, info = env.step(runner.act([observed(seen, env.spec_embodiment, step / 10.0)], [0])[0])
                moved = env.sim.tool_position - before
                if step >= TURN and turn is None:
                    towards = [moved @ (env.sim.position(n) - before) for n in (other, first)]
                    way = [np.linalg.norm(env.sim.position(n) - before) for n in (other, first)]
                    if towards[0] / way[0] > max(0.0, towards[1] / way[1]):
                        turn = step - TURN + 1
                if step >= TURN and info["success"]:
                    break
            reached += bool(info["success"])
            missed += turn is None
            turned.append(turn if turn is not None else 45)
            bar.update(1, reached=reached)
    return {
        "reached": [reached, count],
        "turned_within_period": [int(np.sum(np.array(turned) <= period)), count],
        "median_steps": float(np.median(turned)),
        "never": missed,
    }


def share(right: int, count: int) -> str:
    found = rate(right, count)
    low, high = found["ci95"]
    return f"{100 * right / count:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def write_page(found: dict[str, Any]) -> None:
    """Put the tables between the marks of the page."""
    rows = found["rows"]
    tasks = list(next(iter(rows.values())))
    lines = [
        "| latent every [steps] | on its way [steps] | trained with delay: " + "/".join(tasks) + " [%] | all | "
        "without: " + "/".join(tasks) + " [%] | all |",
        "|---|---|---|---|---|---|",
    ]

    def cells(key: str) -> str:
        row = rows[key]
        each = "/".join(f"{100 * right / count:.0f}" for right, count in row.values())
        return f"{each} | {share(sum(r for r, _ in row.values()), sum(c for _, c in row.values()))}"

    lines += [
        f"| {p} | {lat} | {cells(f'with-{p}-{lat}-none')} | {cells(f'without-{p}-{lat}-none')} |" for p, lat in GRID
    ]
    lines += [f"| 5 | 0, latent {'zeroed' if a == 'zero' else 'of another episode'} | {cells(f'with-5-0-{a}')} | | |"
              for a in ("zero", "shuffle")]  # fmt: skip
    count = next(iter(next(iter(rows.values())).values()))[1]
    changed = [
        f"every {p} steps {share(*c['reached'])} % reach the other thing, {share(*c['turned_within_period'])} % turn "
        f"within a period, half of them after {c['median_steps']:.0f} steps"
        for p, c in found.get("changes", {}).items()
    ]
    seconds = found["training"]["with"]["cpu_seconds"]
    text = (
        f"`benchmarks/latent.py`, {count} episodes a task, training wordings; a pair trains in {seconds / 60:.0f} min "
        "of one CPU core; 95 % Wilson intervals.\n\n" + "\n".join(lines) + "\n\n"
        f"Told another thing after {TURN} steps of reaching: " + "; ".join(changed) + "."
    )
    page = PAGE.read_text()
    begin, end = "<!-- latent: begin -->", "<!-- latent: end -->"
    before, _, rest = page.partition(begin)
    PAGE.write_text(before + begin + "\n\n" + text + "\n\n" + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
