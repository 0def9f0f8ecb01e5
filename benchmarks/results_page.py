"""Turns the figures of ``demo_controls.py`` into ``docs/results.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TASKS = ("reach", "push", "place")


def cell(group: Mapping[str, Any]) -> str:
    """``87/100 = 87 % [79, 92]``."""
    low, high = group["ci95"]
    share = 100 * group["success_rate"]
    return f"{group['success']}/{group['episodes']} = {share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def write_page(results: Mapping[str, Any], path: Path) -> None:
    """Write the page; every figure comes from `results`."""
    demo = results["demo"]
    seconds = demo["seconds"]
    named = {
        "tokenized": "tokenized head",
        "expert": "scripted expert, true positions",
        "shuffle": "wrong name in the instruction",
        "chance": "(chance that the drawn name is right)",
        "blind": "images black",
    }
    rows = [["**the policy**", *(cell(demo["tasks"][t]) for t in TASKS)]]
    for key, name in named.items():
        if key not in results:
            rows.append([name, *("not measured yet" for _ in TASKS)])
        elif key == "chance":
            rows.append([name, *(f"{100 * results[key][t]:.0f} %" for t in TASKS)])
        else:
            tasks = results[key].get("tasks", results[key])
            rows.append([name, *(cell(tasks[t]) for t in TASKS)])
    path.write_text(
        f"""# Results of the demo

Made by `make bench-demo` on {results["machine"]}; the figures are in `benchmarks/results/demo.json`. Every cell is
successes / episodes = rate with a 95 % Wilson interval, on episodes whose seeds no demonstration used: half with
sentences of the training set, a quarter with held-out paraphrases, a quarter about colour-object pairs that training
never names. The model has {demo["parameters"] / 1e6:.1f} M parameters and saw {demo["demos"]} demonstrations; recording
took {seconds["record"]:.0f} s, training {seconds["train"]:.0f} s, evaluation {seconds["eval"]:.0f} s.

## Policy and controls

{table(["", *TASKS], rows)}

A *wrong name* control tells the policy an object (and goal) drawn at random from those on the table while success
stays what it was: a policy that listens falls to about the chance that the drawn name happens to be right. *Images
black* leaves words and proprioception.

## Training seeds

Each seed trains the encoder and the head anew.

{seeds_table(results)}

## Demonstrations

{growth_table(results)}
"""
    )


def seeds_table(results: Mapping[str, Any]) -> str:
    """Success of every training seed, and the spread."""
    if "seeds" not in results:
        return "Not measured yet."
    rows = [[str(r["seed"]), *(cell(r["tasks"][t]) for t in TASKS), minutes(r)] for r in results["seeds"]]
    rates = {t: [100 * r["tasks"][t]["success_rate"] for r in results["seeds"]] for t in TASKS}
    rows.append(["spread", *(f"{min(rates[t]):.0f} to {max(rates[t]):.0f} %" for t in TASKS), ""])
    return table(["seed", *TASKS, "minutes in all"], rows)


def growth_table(results: Mapping[str, Any]) -> str:
    """Success over the number of demonstrations."""
    if "demonstrations" not in results:
        return "Not measured yet."
    demo, counts = results["demo"], sorted(results["demonstrations"], key=lambda r: r["per_task"])
    rows = [[str(r["per_task"]), *(cell(r["tasks"][t]) for t in TASKS), minutes(r)] for r in counts]
    rows.append([f"{demo['demos'] // len(TASKS)} (demo)", *(cell(demo["tasks"][t]) for t in TASKS), minutes(demo)])
    return table(["demonstrations a task", *TASKS, "minutes in all"], rows)


def minutes(result: Mapping[str, Any]) -> str:
    """Minutes of recording, training and evaluation."""
    return f"{result['seconds']['total'] / 60:.1f}"
