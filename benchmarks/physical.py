"""Long-horizon work with physics: a trained policy with learned eyes, and what each oracle in its place would change.

    python benchmarks/physical.py --policy outputs/skills/policy/checkpoint --reader outputs/skills/reader/reader
    python benchmarks/physical.py --only judged saycan --judge outputs/skills/judge/judge

Work of three skills, the same episodes for all rows. Rows are the rungs of a ladder: one part after another is replaced
by an oracle, so that every failed episode of the first row has one first cause, the rung at which it succeeds. Whether
a skill is done is told by the scene as it is seen, so the true scene is a true detector too. Then other eyes, SayCan
with the learned affordances, and chains of five tasks (CALVIN's protocol). A row is written when it is done.
Writes ``benchmarks/results/physical.json`` and the tables of ``docs/planning.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from brachium.console import log, progress

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "results" / "physical.json"
PAGE = ROOT / "docs" / "planning.md"
SEED = 4_000_000
LENGTH = ("env.only.least=3", "env.only.most=3")
LOOKS = ("look_every=4", "confirm=2")
LADDER = ("learned", "scene", "skills", "planner")
CAUSES = {"scene": "perception", "skills": "skill execution", "planner": "goal reading"}
TITLES = {
    "learned": "**policy, scene, success and goals all learned**",
    "scene": "+ true scene, and so true success",
    "skills": "+ scripted skills",
    "planner": "+ true goals",
    "vlm": "all learned, the scene by questions to the pretrained model",
    "judged": "all learned, success by the judge of executed skills",
    "saycan": "SayCan with learned affordances, search as fallback, all else learned",
    "disturbed": "all learned, somebody interferes",
    "long": "all learned, work of 4 skills and more",
}
"""Row -> what it is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="outputs/skills/policy/checkpoint")
    parser.add_argument("--reader", default="outputs/skills/reader/reader")
    parser.add_argument("--vlm", default="outputs/skills/vlm/model", help="for the row vlm")
    parser.add_argument("--judge", default="outputs/skills/judge/judge", help="for the rows judged and saycan")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=[*LADDER, "disturbed", "long"], choices=list(TITLES))
    parser.add_argument("--out", default="outputs/physical")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {"rows": {}}
    if not options.page:
        for name in options.only:
            words = words_of(name, options)
            folder = Path(options.out) / name
            words += [f"episodes={options.episodes}", f"seed={SEED}", f"out={folder}"]
            log("$ brachium eval " + " ".join(words))
            subprocess.run([sys.executable, "-m", "brachium", "eval", *words], check=True, stdout=subprocess.DEVNULL)
            found["rows"][name] = read(folder)
            save(found)
        if (Path(options.judge) / "judge.json").exists():
            found["judge"] = json.loads((Path(options.judge) / "judge.json").read_text())["notes"]["scores"]
        for name, policy in (("policy", options.policy), ("scripted", None)):
            if options.chains and found.get("chains", {}).get(name, {}).get("chains") != options.chains:
                found.setdefault("chains", {})[name] = chains(policy, options.chains)
                save(found)
    if "learned" in found["rows"]:
        write_page(found)


def words_of(name: str, options: argparse.Namespace) -> list[str]:
    """What is typed for a row."""
    policy = [f"checkpoint={options.policy}", "executor.execute_horizon=1", *LOOKS]
    eyes = ["eyes=reader", f"eyes.reader={options.reader}"]
    common = ["planner=default", "env=longhorizon/physical", *LENGTH]
    rows = {
        "learned": [*common, *policy, *eyes],
        "judged": [*common, *policy, *eyes, "detector=learned", f"detector.judge={options.judge}"],
        "vlm": [*common, *policy, "eyes=vlm", f"eyes.model={options.vlm}"],
        "scene": [*common, *policy],
        "skills": [*common, *LOOKS, "env.images=false"],
        "planner": [*common, *LOOKS, "env.images=false", "~goals", "~lm"],
        "saycan": [
            *("planner=saycan", "planner@fallback=default", "env=longhorizon/physical", *LENGTH),
            *(*policy, *eyes, "affordance=learned", f"affordance.judge={options.judge}"),
        ],
        "disturbed": [*common, *policy, *eyes, "env.disturbance=1.0"],
        "long": [
            *("planner=default", "env=longhorizon/physical", "env.only.least=4", "env.max_steps=1000"),
            *(*policy, *eyes),
        ],
    }
    return list(rows[name])


def save(found: dict[str, Any]) -> None:
    found["machine"] = f"{os.cpu_count()} cores"
    TARGET.write_text(json.dumps(found, indent=1) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """A row's summary with the outcome of every episode."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    mine = [row for row in lines if row["key"] == summary["key"]]
    outcomes = {str(row["seed"]): bool(row["success"]) for row in mine}
    skills: Counter[str] = Counter()
    for row in mine:
        skills.update(e["outcome"] for e in row["events"] if e["event"] == "end")
    return {
        "total": summary["total"],
        "families": {f: [s["success"]["success"], s["episodes"]] for f, s in summary["families"].items()},
        "splits": {f: [s["success"]["success"], s["episodes"]] for f, s in summary["splits"].items()},
        "outcomes": outcomes,
        "skills": dict(skills),
        "seconds": round(sum(row["seconds"] for row in mine), 1),
    }


def chains(policy: str | None, count: int) -> dict[str, Any]:
    """Chains of five tasks."""
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    from brachium.policies.executor import RecedingHorizon
    from brachium.policies.planners.chains import CHAINED, run_chain, summarise_chains
    from brachium.policies.planners.evaluate import load_policy
    from brachium.policies.planners.executing import ScriptedSkills

    with initialize_config_module("brachium.conf", version_base="1.3"):
        composed = compose("eval_planner", ["env=longhorizon/physical", "env.max_steps=2000"])
        world = instantiate(composed.env)(images=policy is not None)
    acts = load_policy(policy, partial(RecedingHorizon, execute_horizon=2), world.spec_embodiment)
    rows = []
    with progress("chains", total=count, unit="chains") as bar:
        for k in range(count):
            rows.append(run_chain(world, acts or ScriptedSkills(world), SEED + CHAINED + k))
            bar.update(1, mean=f"{sum(row['done'] for row in rows) / len(rows):.2f}")
    return {**summarise_chains(rows), "done": [row["done"] for row in rows]}


def causes(rows: dict[str, Any]) -> dict[str, int]:
    """First cause of every episode that fails with everything learned: the first oracle with which it succeeds.

    Of the episodes that all rungs have.
    """
    found: Counter[str] = Counter()
    for seed, good in rows["learned"]["outcomes"].items():
        if good or any(seed not in rows[name]["outcomes"] for name in LADDER):
            continue
        rung = next((name for name in LADDER[1:] if rows[name]["outcomes"].get(seed)), None)
        found[CAUSES.get(rung or "", "time, or the table")] += 1
    return dict(found)


def share(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{100 * found['success_rate']:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def write_page(found: dict[str, Any]) -> None:
    """Put the tables between the marks of the page."""
    rows = found["rows"]
    lines = [
        "| | episodes | success [%] | seen wordings | held-out | ended too early [%] | ever [%] | goal literals [%] "
        "| skills/optimum | p against the first |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = rows["learned"]["outcomes"]
    for name, title in TITLES.items():
        if name not in rows:
            continue
        row, total = rows[name], rows[name]["total"]
        pairs = [(row["outcomes"][s], base[s]) for s in base if s in row["outcomes"]]
        better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        p = binomtest(better, better + worse).pvalue if better + worse else 1.0
        splits = " | ".join(f"{100 * a / b:.0f}" for a, b in (row["splits"][s] for s in ("train", "paraphrase")))
        steps = total["skills_to_optimum"]
        lines.append(
            f"| {title} | {total['episodes']} | {share(total['success'])} | {splits} "
            f"| {share(total['premature'])} | {share(total['ever'])} "
            f"| {100 * total['goal_share']:.0f} | {'' if steps is None else f'{steps:.2f}'} "
            f"| {'' if name in ('learned', 'long') else f'{p:.2g}'} |"
        )
    text = [
        "`benchmarks/physical.py`, as many of the same episodes in each row but that of longer work; 95 % Wilson "
        "intervals; p of the exact McNemar test, in pairs.",
        "\n".join(lines),
    ]
    if all(name in rows for name in LADDER):
        text.append(
            "First cause of the failures of the first row, by the rung at which they succeed: "
            + ", ".join(f"{cause} {count}" for cause, count in sorted(causes(rows).items(), key=lambda c: -c[1]))
            + "."
        )
    if "disturbed" in rows and rows["disturbed"]["total"].get("recovered"):
        text.append(f"Where somebody did interfere, {share(rows['disturbed']['total']['recovered'])} % succeed.")
    if "judge" in found:
        told = [f"{name.split('/')[1]} AUROC {s['auroc']:.3f}, ECE {s['ece']:.3f}" for name, s in found["judge"].items()
                if name.startswith("all/")]  # fmt: skip
        text.append("The judge on held-out executions: " + "; ".join(told) + ".")
    if "chains" in found:
        text.append(chain_table(found["chains"]))
    page = PAGE.read_text()
    begin, end = "<!-- physical: begin -->", "<!-- physical: end -->"
    before, _, rest = page.partition(begin)
    PAGE.write_text(before + begin + "\n\n" + "\n\n".join(text) + "\n\n" + end + rest.partition(end)[2])


def chain_table(found: dict[str, Any]) -> str:
    """How many of five tasks in a row are done."""
    count = next(iter(found.values()))["chains"]
    lines = [f"| {count} chains of five tasks, share [%] | 1 | 2 | 3 | 4 | 5 | mean |", "|---|---|---|---|---|---|---|"]
    for name, row in found.items():
        cells = " | ".join(f"{100 * row[f'at_least_{k}']['success_rate']:.0f}" for k in range(1, 6))
        lines.append(f"| {'trained policy' if name == 'policy' else 'scripted skills'} | {cells} | {row['mean']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
