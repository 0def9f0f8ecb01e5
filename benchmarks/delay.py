"""What every executor makes of delay: success, and how smoothly it moves, in plain simulation.

    python benchmarks/delay.py --plain outputs/plain --aware outputs/realtime
    python benchmarks/delay.py --page

Chunks come 0 to 3 steps (of 100 ms) after their picture (``executor.inference_delay``). Two policies of the same
demonstrations and recipe, of which the second was trained with rows given (training-time real-time chunking), then with
rounds of corrections under delay:

    brachium demo experiment=realtime corrections.rounds=0 model.head.max_delay=0 out=outputs/plain
    brachium demo experiment=realtime out=outputs/realtime

Episodes are the same for all. Besides success: the *jump* where another chunk takes over (the distance of its target
from what the chunk before said of the same moment, or from where the robot held when that was over) and the *jerk* of
the targets (root mean square of the third differences). A cell is written when it is done, so that the command typed
again goes on. Writes ``benchmarks/results/delay.json``; ``--page`` draws ``docs/delay.png`` from it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("MUJOCO_GL", "egl")

import numpy as np
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from results_page import executors

from brachium.console import log
from brachium.hardware import hardware
from brachium.policies.evaluate import evaluate
from brachium.policies.executor import ChunkExecutor
from brachium.policies.intervals import rate
from brachium.policies.vla_policy import VLAPolicy
from brachium.spec import Observation

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "results" / "delay.json"
PICTURE = ROOT / "docs" / "delay.png"
DELAYS, STEP_S = (0, 1, 2, 3), 0.1
EXECUTORS = {
    "receding horizon": ("plain", ["executor=receding"]),
    "temporal ensemble": ("plain", ["executor=ensemble"]),
    "real-time chunking, vector-Jacobian product": ("plain", ["executor=rtc"]),
    "real-time chunking, identity": ("plain", ["executor=rtc", "executor.gradient=identity"]),
    "training-time real-time chunking": ("aware", ["executor=rtc"]),
    "the same, with two rounds of corrections": ("corrected", ["executor=rtc"]),
}
"""Name -> (policy, how it is executed)."""


class Watched:
    """An executor whose targets are written down.

    Args:
        inner: The executor; actions are absolute and begin with x, y, z [m].
        jumps: Distances where another chunk took over are appended [m].
        jerks: Third differences of the targets are appended, (n, 3) an episode [m/s^3].
    """

    def __init__(self, inner: ChunkExecutor, jumps: list[float], jerks: list[np.ndarray]) -> None:
        self.inner, self.jumps, self.jerks = inner, jumps, jerks
        self.embodiment = inner.embodiment
        self.how = json.dumps([type(inner).__name__, inner.inference_delay, getattr(inner, "gradient", "")])
        self._paths: dict[int, list[np.ndarray]] = {}
        self._newest: dict[int, float] = {}

    def reset(self, lane: int, seed: int) -> None:
        """An episode begins, and the lane's last one is over."""
        self.close(lane)
        self.inner.reset(lane, seed)
        self._paths[lane] = []
        self._newest.pop(lane, None)

    def forget(self, lane: int) -> None:
        """An episode is over."""
        self.inner.forget(lane)
        self.close(lane)

    def close(self, *lanes: int) -> None:
        """Add up the episodes of lanes, or of all."""
        for lane in lanes or list(self._paths):
            path = self._paths.pop(lane, [])
            if len(path) > 3:
                self.jerks.append(np.diff(np.stack(path), 3, axis=0) / STEP_S**3)

    def act(self, observations: Sequence[Observation], lanes: Sequence[int]) -> np.ndarray:
        """Actions of the executor."""
        actions = self.inner.act(observations, lanes)
        for lane, action in zip(lanes, actions):
            now = len(self._paths[lane])
            live = [chunk for chunk in self.inner.timeline(lane).chunks if chunk.row(now) is not None]
            if live and live[-1].start != self._newest.get(lane):
                before = live[-2].row(now) if len(live) > 1 else None
                if before is None and now:  # the chunk before was over, and the robot held where it was
                    before = self._paths[lane][-1]
                if before is not None:
                    self.jumps.append(float(np.linalg.norm(action[:3] - before[:3])))
                self._newest[lane] = live[-1].start
            self._paths[lane].append(np.array(action[:3], np.float64))
        return actions


def run(checkpoint: Path, words: Sequence[str], delay: int, episodes: int, out: Path) -> dict[str, Any]:
    """One cell: an executor of a policy under a delay."""
    with initialize_config_module("brachium.conf", version_base="1.3"):
        config = compose("eval", [*words, "suite=basics_pose", "checkpoint=none"])
    executor: Callable[..., ChunkExecutor] = instantiate(config.executor)
    jumps: list[float] = []
    jerks: list[np.ndarray] = []

    watching: list[Watched] = []

    def watched(policy: VLAPolicy) -> Any:
        watching.append(Watched(executor(policy, inference_delay=delay), jumps, jerks))
        return watching[-1]

    (out / "episodes.jsonl").unlink(missing_ok=True)  # how smooth it was is not in it: a cell is measured whole
    evaluate(
        checkpoint=str(checkpoint),
        executor=watched,
        vector=instantiate(config.vector),
        suite=instantiate(config.suite),
        out=str(out),
        episodes=episodes,
        videos=0,
        report=False,
    )
    for each in watching:
        each.close()
    tasks = json.loads((out / "summary.json").read_text())["tasks"]
    jerk = np.concatenate(jerks)
    return {
        "tasks": {
            name: {key: tasks[name][key] for key in ("success", "episodes", "success_rate", "ci95")} for name in tasks
        },
        "jump_mm": {
            "median": round(1e3 * float(np.median(jumps)), 2) if jumps else 0.0,
            "p95": round(1e3 * float(np.quantile(jumps, 0.95)), 2) if jumps else 0.0,
        },
        "jerk_rms": round(float(np.sqrt(np.square(jerk).sum(1).mean())), 2),
    }


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Success, jumps and jerk over delay, a line an executor."""
    from matplotlib.figure import Figure

    colors = ("#0072b2", "#e69f00", "#009e73", "#56b4e9", "#cc79a7", "#d55e00")
    figure = Figure((12.0, 4.6), layout="constrained", dpi=110)
    panels = figure.subplots(1, 3)
    for k, (name, row) in enumerate(found["rows"].items()):
        delays = sorted(row, key=int)
        x = [1e3 * STEP_S * int(delay) for delay in delays]
        pooled = [pool(row[delay]) for delay in delays]
        look: dict[str, Any] = {"color": colors[k], "marker": "osD^vP"[k], "lw": 1.8, "ms": 5, "label": name}
        shift = 3.0 * (k - 2.5)  # whiskers beside each other
        where = [value + shift for value in x]
        middle = [100 * group["success_rate"] for group in pooled]
        ends = [[abs(100 * g["ci95"][side] - m) for g, m in zip(pooled, middle)] for side in (0, 1)]
        panels[0].errorbar(where, middle, yerr=ends, elinewidth=0.8, capsize=2, **look)
        panels[1].plot(x, [row[delay]["jump_mm"]["p95"] for delay in delays], **look)
        panels[2].plot(x, [row[delay]["jerk_rms"] for delay in delays], **look)
    titles = (
        "Success, three tasks [%]",
        "Jump between chunks, 95th percentile [mm]",
        "Jerk of the targets, RMS [m/s³]",
    )
    for axes, title in zip(panels, titles):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("delay of a chunk [ms]")
        axes.set_ylim(bottom=0)
        axes.set_xticks([1e3 * STEP_S * delay for delay in DELAYS])
        axes.grid(color="#dde1e6", lw=0.7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.legend(
        *panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    figure.savefig(path)


def pool(cell: Mapping[str, Any]) -> dict[str, Any]:
    """All tasks of a cell together."""
    tasks = cell["tasks"].values()
    return dict(rate(sum(task["success"] for task in tasks), sum(task["episodes"] for task in tasks)))


def write_section(page: Path) -> None:
    """Write the section of the results' page anew, and leave the others as they are."""
    heading, after = "## Executors over delay", "## A real robot's data"
    before, _, rest = page.read_text().partition(heading if heading in page.read_text() else after)
    rest = rest.partition(after)[2] if after in rest else rest
    page.write_text(f"{before}{heading}\n\n{executors(TARGET)}\n\n{after}{rest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", default="outputs/plain", help="folder of the demo without rows given")
    parser.add_argument("--aware", default="outputs/realtime", help="folder of the demo with rows given")
    parser.add_argument("--episodes", type=int, default=100, help="a task")
    parser.add_argument("--out", default="outputs/delay")
    parser.add_argument("--page", action="store_true", help="draw the plot and write its section of docs/results.md")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {"rows": {}}
    if options.page:
        draw(found, PICTURE)
        write_section(ROOT / "docs" / "results.md")
        return
    aware = Path(options.aware)
    policies = {
        "plain": Path(options.plain) / "flow-0" / "checkpoint",
        "aware": aware / "rounds" / "flow-0-0" / "checkpoint",
        "corrected": aware / "flow-0" / "checkpoint",
    }
    found |= {"hardware": hardware("cpu"), "step_s": STEP_S, "episodes": options.episodes}
    for delay in DELAYS:
        for name, (policy, words) in EXECUTORS.items():
            row = found["rows"].setdefault(name, {})
            if str(delay) in row:
                continue
            out = Path(options.out) / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{delay}"
            row[str(delay)] = run(policies[policy], words, delay, options.episodes, out)
            TARGET.write_text(json.dumps(found, indent=1) + "\n")
            log(f"{name}, {delay} steps: {row[str(delay)]}")
    draw(found, PICTURE)
    write_section(ROOT / "docs" / "results.md")


if __name__ == "__main__":
    main()
