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
    rows = [["**the policy**", *(cell(demo["tasks"][t]) for t in TASKS)]]
    rows.append(["tokenized head", *(cell(results["tokenized"]["tasks"][t]) for t in TASKS)])
    rows.append(["scripted expert, true positions", *(cell(results["expert"][t]) for t in TASKS)])
    rows.append(["wrong name in the instruction", *(cell(results["shuffle"]["tasks"][t]) for t in TASKS)])
    chance = [f"{100 * results['chance'][t]:.0f} %" for t in TASKS]
    rows.append(["(chance that the drawn name is right)", *chance])
    rows.append(["images black", *(cell(results["blind"]["tasks"][t]) for t in TASKS)])
    seeds = [[str(r["seed"]), *(cell(r["tasks"][t]) for t in TASKS), minutes(r)] for r in results["seeds"]]
    rates = {t: [100 * r["tasks"][t]["success_rate"] for r in results["seeds"]] for t in TASKS}
    seeds.append(["spread", *(f"{min(rates[t]):.0f} to {max(rates[t]):.0f} %" for t in TASKS), ""])
    counts = sorted(results["demonstrations"], key=lambda r: r["per_task"])
    growth = [[str(r["per_task"]), *(cell(r["tasks"][t]) for t in TASKS), minutes(r)] for r in counts]
    growth.append([f"{demo['demos'] // len(TASKS)} (demo)", *(cell(demo["tasks"][t]) for t in TASKS), minutes(demo)])
    path.write_text(
        f"""# Results of the demo

Made by `make bench-demo` on {results["machine"]}; the figures are in `benchmarks/results/demo.json`. Every cell is
successes / episodes = rate with a 95 % Wilson interval, on episodes whose seeds no demonstration used: half with
sentences of the training set, a quarter with held-out paraphrases, a quarter about colour-object pairs that training
never names. The model has {demo["parameters"] / 1e6:.1f} M parameters; recording took {seconds["record"]:.0f} s,
training {seconds["train"]:.0f} s, evaluation {seconds["eval"]:.0f} s.

## Policy and controls

{table(["", *TASKS], rows)}

A *wrong name* control tells the policy an object (and goal) drawn at random from those on the table while success
stays what it was: a policy that listens falls to about the chance that the drawn name happens to be right. *Images
black* leaves words and proprioception.

## Training seeds

Each seed trains the encoder and the head anew, on the same demonstrations.

{table(["seed", *TASKS, "minutes in all"], seeds)}

## Demonstrations

The same encoder; the head is trained on fewer demonstrations a task.

{table(["demonstrations a task", *TASKS, "minutes in all"], growth)}
"""
    )


def minutes(result: Mapping[str, Any]) -> str:
    """Minutes of recording, training and evaluation."""
    return f"{result['seconds']['total'] / 60:.1f}"
