"""Writes the results of ``brachium benchmark`` into ``docs/benchmarks.md``, between its two marks.

python benchmarks/suites_page.py [OUTPUTS/RUN/result.json ...]

A result that is given is copied to ``benchmarks/results/suites`` first.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results_page import table

from brachium.benchmark import ranking
from brachium.console import human_time

ROOT = Path(__file__).resolve().parent.parent
SUITES = ROOT / "benchmarks" / "results" / "suites"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: benchmarks/suites_page.py writes them -->", "<!-- end of results -->"
ORDER = ("meta_world_mt10", "meta_world_mt50", "fetch_pick_and_place", "aloha_transfer_cube")


def cell(group: Mapping[str, Any]) -> str:
    """Successes of episodes, with the rate and its interval."""
    low, high = (100 * edge for edge in group["ci95"])
    rate = 100 * group["success_rate"]
    return f"{group['success']}/{group['episodes']} = {rate:.0f} % [{low:.0f}, {high:.0f}]"


def section(result: Mapping[str, Any]) -> str:
    """One suite: what was measured, beside what others published."""
    rows = []
    for row in ranking(result):
        name = f"**{row['name']}**" if row["ours"] else row["name"]
        interval = f" [{row['ci95'][0]:.0f}, {row['ci95'][1]:.0f}]" if row["ci95"] else ""
        rows.append([name, f"{row['success']:.1f} %{interval}", row["source"], row["note"]])
    curve = ", ".join(f"{100 * p['success_rate']:.0f} % after {human_time(p['seconds'])}" for p in result["curve"])
    seeds = ", ".join(f"{value:.0f}" for value in result["seeds"])
    tasks = table(["task", "success"], [[name, cell(group)] for name, group in result["tasks"].items()])
    spent = ", ".join(f"{name} {human_time(value)}" for name, value in result["seconds"].items())
    lines = [
        f"### {result['title']}",
        result["rules"],
        table(["policy", "success", "source", "what is not alike"], rows),
        "" if result["published"] else "We know of no published figure of policies that see under this protocol.",
        f"Evaluation seeds: {seeds} %. Over training: {curve}. Time: {spent}, on {result['hardware']}.",
        f"`{shlex.join(['brachium', *result['command']])}`" if result.get("command") else "",
    ]
    return "\n\n".join(filter(None, [*lines, tasks if len(result["tasks"]) > 1 else ""]))


def throughput() -> str:
    """Environment steps a second."""
    path = ROOT / "benchmarks" / "results" / "suite_throughput.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    names = {
        "processes": "`ProcessVectorEnv`",
        "threads": "`ThreadVectorEnv`",
        "async": "Gymnasium's AsyncVectorEnv",
        "lerobot": "LeRobot's wrapper in one (480 px)",
    }
    kinds = [name for name in names if name in next(iter(found["tasks"].values()))]
    rows = [[task, *(f"{rates[name]:.0f}" for name in kinds)] for task, rates in found["tasks"].items()]
    rows.append(
        ["ratio to AsyncVectorEnv", *(f"{found[f'{n}_over_async']:.2f}" if n != "async" else "1" for n in kinds)]
    )
    return "\n\n".join(
        [
            "### Steps a second",
            f"`benchmarks/suite_throughput.py`: Meta-World, {found['envs']} environments, one camera of "
            f"{found['side']} px, {found['cores']} cores, no GPU, medians of interleaved rounds. "
            "Theirs is a process an environment and draws as the suite does, with shadows, multisampling and "
            "every face of its meshes; ours is a process a core and draws without. What each gives was "
            "not taken apart.",
            table(["task", *(names[name] for name in kinds)], rows),
        ]
    )


def main() -> None:
    SUITES.mkdir(parents=True, exist_ok=True)
    for given in map(Path, sys.argv[1:]):
        result = json.loads(given.read_text())
        name = re.sub("[^a-z0-9]+", "_", result["title"].lower())
        (SUITES / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    found = {path.stem: json.loads(path.read_text()) for path in sorted(SUITES.glob("*.json"))}
    names = sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    parts = [BEGIN, *(section(found[name]) for name in names), throughput(), END]
    text = PAGE.read_text()
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    PAGE.write_text(before + "\n\n".join(part for part in parts if part) + after)


if __name__ == "__main__":
    main()
