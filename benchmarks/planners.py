"""High-level planners on the same episodes: success when the system itself stopped, and what went wrong.

    python benchmarks/planners.py                 # all rows, 200 episodes each; goes on where it was stopped
    python benchmarks/planners.py --only default

Every row meets the same work, the same luck and the same errors of the detectors, so that differences are tested in
pairs (exact McNemar test). Writes ``benchmarks/results/planners.json`` and the tables of ``docs/planning.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from brachium.console import log

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "results" / "planners.json"
PAGE = ROOT / "docs" / "planning.md"
SEED = 3_000_000
"""Of the first episode: others than those that were looked at while the planners were made."""
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "free": (
        "the model writes freely, its word is the end",
        (
            *("planner=subtask", "planner.constrained=false", "planner.prompt.scene=false"),
            *("planner.prompt.feedback=false", "termination=planner"),
        ),
    ),
    "scoring": (
        "the model scores all skills, its word is the end",
        ("planner=saycan", "~affordance", "termination=planner"),
    ),
    "saycan": ("SayCan", ("planner=saycan", "termination=planner")),
    "saycan-two-key": ("SayCan, two keys", ("planner=saycan",)),
    "saycan-fallback": ("SayCan, two keys, search as fallback", ("planner=saycan", "planner@fallback=default")),
    "monologue": ("Inner Monologue (SayCan told scene and success)", ("planner=monologue", "termination=planner")),
    "monologue-two-key": ("Inner Monologue, two keys", ("planner=monologue",)),
    "subtask-two-key": ("the model writes skills, told scene and success, two keys", ("planner=subtask",)),
    "default": ("**default**: parser, search, two keys", ("planner=default",)),
    "default-one-key": ("parser and search, the planner's word is the end", ("planner=default", "termination=planner")),
    "default-disturbed": ("default, somebody interferes", ("planner=default", "env.disturbance=1.0")),
    "default-long": (
        "default, work of five to eight skills",
        ("planner=default", "env.families=[sort_many,gather_many,gather_stored,leave_many]", "env.max_steps=60"),
    ),
    "true-goals": ("search with the true goals, two keys", ("planner=default", "~goals")),
}
"""Name -> (what it is, words)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--chains", type=int, default=100, help="of five tasks")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--out", default="outputs/planners")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {"rows": {}}
    for name in options.only:
        folder = Path(options.out) / name
        words = [
            *ROWS[name][1],
            f"episodes={options.episodes}",
            f"seed={SEED}",
            f"out={folder}",
            f"chains={options.chains}",
        ]
        log("$ brachium eval " + " ".join(words))
        subprocess.run([sys.executable, "-m", "brachium", "eval", *words], check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((folder / "summary.json").read_text())
        rows = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
        mine = {row["seed"]: int(row["success"]) for row in rows if row["key"] == summary["key"]}
        outcomes = [mine[SEED + k] for k in range(options.episodes)]
        results["rows"][name] = {**summary, "words": list(ROWS[name][1]), "outcomes": outcomes}
        results["machine"] = f"{os.cpu_count()} cores"
        TARGET.write_text(json.dumps(results) + "\n")
    write_page(results)


def mcnemar(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Two-sided p of the exact McNemar test on paired outcomes."""
    better = sum(a > b for a, b in zip(ours, theirs))
    worse = sum(a < b for a, b in zip(ours, theirs))
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def share(found: Mapping[str, Any]) -> str:
    """A rate with its interval."""
    low, high = found["ci95"]
    return f"{100 * found['success_rate']:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def write_page(results: Mapping[str, Any]) -> None:
    """Put the tables between the marks of the page."""
    rows = results["rows"]
    base = rows.get("default", {}).get("outcomes")
    lines = [
        "| planner | success [%] | seen wordings | held-out wordings | held at some time [%] | ended too early [%] | "
        "went on after it held [%] | goal literals [%] | invalid/episode | refused/episode | "
        "skills/optimum of its successes | recovered [%] | tasks of five in a row | ms/proposal | p |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (title, _) in ROWS.items():
        if name not in rows:
            continue
        row, total = rows[name], rows[name]["total"]
        p = ""
        if base is not None and name not in ("default", "default-long") and len(row["outcomes"]) == len(base):
            p = f"{mcnemar(row['outcomes'], base):.2g}"
        steps = total["skills_to_optimum"]
        recovered = share(total["recovered"]) if total["recovered"] else ""
        chain = f"{row['chains']['mean']:.2f}" if "chains" in row else ""
        lines.append(
            f"| {title} | {share(total['success'])} | {share(row['splits']['train']['success'])} "
            f"| {share(row['splits']['paraphrase']['success'])} | {share(total['ever'])} | {share(total['premature'])} "
            f"| {share(total['overrun'])} | {100 * total['goal_share']:.0f} | {total['invalid_per_episode']:.2f} "
            f"| {total['refused_per_episode']:.2f} | {'' if steps is None else f'{steps:.2f}'} "
            f"| {recovered} | {chain} | {total['ms_per_proposal']:.1f} | {p} |"
        )
    count = next(iter(rows.values()))["total"]["episodes"]
    text = (
        f"`benchmarks/planners.py`, {count} episodes a row, the same for all but those of longer work, one skill in "
        "five fails, one look in twenty is wrong; 95 % Wilson intervals; p of the exact McNemar test against the "
        "default, in pairs. Tasks in a row: of five, 100 chains a row, CALVIN's protocol.\n\n" + "\n".join(lines)
    )
    page = PAGE.read_text()
    begin, end = "<!-- planners: begin -->", "<!-- planners: end -->"
    before, _, rest = page.partition(begin)
    PAGE.write_text(before + begin + "\n\n" + text + "\n\n" + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
