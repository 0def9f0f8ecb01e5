"""Turns measured figures (``benchmarks/results/``) into ``docs/results.md``, its picture, and the tables of README."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TASKS = ("reach", "push", "place")
SPLITS = ("train", "paraphrase", "pair")


def cell(group: Mapping[str, Any]) -> str:
    """``87/100 = 87 % [79, 92]``."""
    low, high = group["ci95"]
    share = 100 * group["success_rate"]
    return f"{group['success']}/{group['episodes']} = {share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def write_page(results: Mapping[str, Any], root: Path) -> None:
    """Write ``docs/results.md`` and its picture; every figure comes from `results` and the files beside them."""
    demo = results["demo"]
    picture = growth_plot(results, root / "docs" / "success.png")
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
    (root / "docs" / "results.md").write_text(
        f"""# Results of the demo

Made by `make bench-demo` on {results["machine"]}, but for the last sections, which name their own scripts; all
figures are in `benchmarks/results/`. Every cell is
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

Each seed trains the head anew, on the shipped encoder.

{seeds_table(results)}

## Demonstrations and minutes

{picture}

{growth_table(results)}

The minutes are those of recording, training and evaluating, on this machine. The fewer steps of the head use the
demo's demonstrations and encoder.

{shorter_table(results)}

## What pretraining pays

{adaptation(root / "benchmarks" / "results" / "adaptation.json", root / "docs" / "adaptation.png")}

## The shipped model

{nano(root / "benchmarks" / "results" / "nano.json")}

{pretraining(root / "benchmarks" / "results" / "pretraining.json")}

## Environment steps a second

{throughput(root / "benchmarks" / "results" / "rollout_throughput.json")}

## Executors over delay

{executors(root / "benchmarks" / "results" / "delay.json")}

## A real robot's data

{bridge(root / "benchmarks" / "results" / "bridge.json")}
"""
    )


def growth_plot(results: Mapping[str, Any], path: Path) -> str:
    """Draw success over demonstrations and over minutes; returns the Markdown that shows it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    demo = results["demo"]
    by_demos = [(r["demos"] / len(TASKS), r) for r in [*results.get("demonstrations", ()), demo]]
    by_minutes = [(r["seconds"]["total"] / 60, r) for r in [*results.get("minutes", ()), demo]]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, points, name in zip(axes, (by_demos, by_minutes), ("demonstrations a task", "minutes in all")):
        points = sorted(points, key=lambda p: p[0])
        for task, color in zip(TASKS, ("#2a9d8f", "#e76f51", "#4361ee")):
            groups = [r["tasks"][task] for _, r in points]
            rates = [100 * g["success_rate"] for g in groups]
            low = [y - 100 * g["ci95"][0] for y, g in zip(rates, groups)]
            high = [100 * g["ci95"][1] - y for y, g in zip(rates, groups)]
            axis.errorbar([x for x, _ in points], rates, [low, high], label=task, color=color, marker="o", capsize=3)
        axis.set(xlabel=name, ylim=(0, 103))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("success [%], 95 % interval")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return f"![Success over demonstrations and over minutes]({path.name})"


def shorter_table(results: Mapping[str, Any]) -> str:
    """Success over the steps of the head, with the demo's encoder."""
    if "minutes" not in results:
        return "Not measured yet."
    rows = [[str(r["steps"]), *(cell(r["tasks"][t]) for t in TASKS), minutes(r)] for r in results["minutes"]]
    return table(["steps of the head", *TASKS, "minutes in all"], rows)


def throughput(path: Path) -> str:
    """Our vector environment beside Gymnasium's."""
    if not path.exists():
        return "Not measured yet."
    found = json.loads(path.read_text())
    rows = [
        [name, f"{one['threads']:.0f}", f"{one['async']:.0f}", f"{one['ratio']:.2f}"]
        for name, one in found.items()
        if isinstance(one, dict)
    ]
    return (
        f"`benchmarks/rollout_throughput.py`: {found['envs']} pick-and-place environments on {found['cores']} cores "
        "play the expert's episodes, resets included, in one run with Gymnasium's `AsyncVectorEnv`, in turns. "
        "Physics takes most of a step, so on few cores no vector environment can be much faster than another; the goal "
        "of three times was not reached.\n\n"
        + table(["", "`ThreadVectorEnv` [steps/s]", "`AsyncVectorEnv` [steps/s]", "ratio"], rows)
    )


def executors(path: Path) -> str:
    """Success, jumps and jerk of every executor over delay."""
    if not path.exists():
        return "Not measured."
    found = json.loads(path.read_text())
    delays = sorted({delay for row in found["rows"].values() for delay in row}, key=int)
    heads = [f"{1e3 * found['step_s'] * int(delay):.0f} ms" for delay in delays]

    def counts(cell: Mapping[str, Any]) -> str:
        return "/".join(str(task["success"]) for task in cell["tasks"].values())

    success = [[name, *(counts(row[d]) for d in delays)] for name, row in found["rows"].items()]
    smooth = [
        [name, *(f"{row[d]['jump_mm']['p95']:.0f} mm, {row[d]['jerk_rms']:.0f}" for d in delays)]
        for name, row in found["rows"].items()
    ]
    tasks = "/".join(next(iter(next(iter(found["rows"].values())).values()))["tasks"])
    return f"""![Success, jumps between chunks and jerk over delay](delay.png)

`benchmarks/delay.py` ({found["hardware"]}): plain simulation at 10 Hz by absolute poses, chunks of 6 steps that come so
long after their picture, the next asked for when the last has come. Two policies of the same demonstrations: without
rows given for the first four executors, with (`model.head.max_delay=3`) for the fifth, which had two rounds of
corrections under delay for the sixth. Successes of {found["episodes"]} episodes a task, {tasks}; whiskers in the plot
are 95 % Wilson intervals of all tasks together.

{table(["", *heads], success)}

Jump where another chunk takes over (what it says against what the chunk before said of the same moment, or against
where the robot held; 95 % are below), and jerk of the targets (root mean square, m/s³):

{table(["", *heads], smooth)}

Without delay all but the ensemble are about as good; averaging the targets of overlapping chunks moves most
smoothly and pushes worst. Leading a chunk while it is drawn (the two in the middle) is smoother than taking each as
it comes, but its jumps grow with the delay: of 6 steps the frozen ones and those that come too late leave few to
blend in. The identity leads more firmly than the true gradient (probably because that is small where the chunk is
still noise, and this head is drawn in ten calls). Rows given in training keep jumps and jerk at any delay about
where they were without one, not yet the success; corrections under delay bring it from 76 % to 90 % at 300 ms."""


def adaptation(path: Path, picture: Path) -> str:
    """Pretrained against scratch over demonstrations, and the ways to adapt."""
    found = json.loads(path.read_text()) if path.exists() else {}
    parts = []
    if "amount" in found:
        amount = found["amount"]
        parts.append(
            f"`benchmarks/adaptation.py amount`: the same network, {amount['steps']} steps of {amount['batch']} "
            f"windows, {amount['seeds']} training seeds pooled. *Whole* trains encoder and head end "
            "to end, *frozen* the head alone, which takes a minute: the third row group spends some of the time saved."
        )
        rows = [
            [name, count, *(cell(one["tasks"][t]) for t in TASKS), f"{one['seconds'] / 60:.1f}"]
            for name, counts in amount["cells"].items()
            for count, one in counts.items()
        ]
        parts.append(table(["encoder", "demonstrations a task", *TASKS, "minutes of training"], rows))
        parts.append(amount.get("note", ""))
        parts.append(amount_plot(amount, picture))
    if "modes" in found:
        modes = found["modes"]
        parts.append(
            f"`benchmarks/adaptation.py modes`: {modes['demonstrations']} demonstrations a task. Language is the mean "
            "accuracy of answers in held-out wordings after the training; *frozen* shows what it was before. "
            "Pointing is the error in the front view [px]: median, 90th percentile."
        )
        rows = [
            [
                name,
                *(cell(one["tasks"][t]) for t in TASKS),
                f"{100 * one['language']['answers']:.0f} %",
                f"{one['language']['px']:.2f}, {one['language']['px_p90']:.2f}",
                f"{one['seconds'] / 60:.1f}",
            ]
            for name, one in modes["cells"].items()
        ]
        parts.append(table(["mode", *TASKS, "language", "pointing", "minutes of training"], rows))
        parts.append(modes.get("note", ""))
    return "\n\n".join(part for part in parts if part) or "Not measured yet."


def amount_plot(amount: Mapping[str, Any], path: Path) -> str:
    """Draw success over demonstrations, a panel a task; returns the Markdown that shows it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(10, 3.2), sharey=True)
    for axis, task in zip(axes, TASKS):
        for (name, counts), color in zip(amount["cells"].items(), ("#888888", "#2a9d8f", "#4361ee", "#e76f51")):
            groups = [one["tasks"][task] for one in counts.values()]
            rates = [100 * g["success_rate"] for g in groups]
            low = [y - 100 * g["ci95"][0] for y, g in zip(rates, groups)]
            high = [100 * g["ci95"][1] - y for y, g in zip(rates, groups)]
            counted = [int(count) for count in counts]
            axis.errorbar(counted, rates, [low, high], label=name, color=color, marker="o", capsize=3)
        axis.set(xlabel="demonstrations a task", title=task, ylim=(0, 103), xscale="log")
        axis.set_xticks(counted, [str(k) for k in counted])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("success [%], 95 % interval")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return f"![Success over demonstrations, pretrained and from scratch]({path.name})"


def nano(path: Path) -> str:
    """What the shipped model costs."""
    if not path.exists():
        return "Not measured yet."
    found = json.loads(path.read_text())
    rows = [
        ["size on disk", f"{found['megabytes']:.1f} MB, {found['parameters'] / 1e6:.2f} M parameters"],
        ["loading", f"{found['load_s']:.2f} s"],
        ["forward pass, an observation", f"{found['forward_ms_one']:.1f} ms"],
        ["forward and backward pass, an observation", f"{found['train_ms_one']:.1f} ms"],
        ["forward and backward pass, a scene with nine texts", f"{found['train_ms_nine']:.1f} ms"],
        ["peak memory of all this, libraries included", f"{found['peak_mb']:.0f} MB"],
    ]
    return (
        "Its scores are on [its card](../vla/assets/nano/README.md). `benchmarks/nano.py`, two images of 96 pixels an "
        "observation, in batches of 16:\n\n" + table(["", ""], rows)
    )


ASKED = ("color", "shape", "count", "exists", "left", "right", "nearer", "leftmost", "name_at")
"""Kinds of questions that the tables of pretraining show."""


def pretraining(path: Path) -> str:
    """The shipped recipe from several seeds, and what parts of it are worth in short runs."""
    found = json.loads(path.read_text())
    heads = ["minutes", *(kind.replace("_", " ") for kind in ASKED), "px: median, 90th percentile"]
    parts = table(["training", *heads], [[name, *_scored(run, "heldout")] for name, run in found["runs"].items()])
    steps = next(iter(found["runs"].values()))["steps"]
    text = (
        f"Parts of its training, one run each of {steps} steps (`{found['command']}`, seed 0), right answers on "
        "held-out scenes [%] and pointing in the front view [px]. Filling in hidden patches first is off by default: "
        "at equal steps it shows no clear gain, and costs a quarter more time.\n\n" + parts
    )
    if "seeds" not in found:
        return text
    rows = []
    for name, run in found["seeds"].items():
        for key, shown in (("heldout", "new scenes"), ("paraphrase", "new wordings"), ("pair", "pairs never named")):
            rows.append([name, shown, *_scored(run, key)])
    steps = next(iter(found["seeds"].values()))["steps"]
    return (
        f"The same recipe from several seeds, on the same scenes, {steps} steps on one core each "
        "(`OMP_NUM_THREADS=1 brachium pretrain optimization.seed=N`): how far scores spread.\n\n"
        + table(["seed", "scenes", *heads], rows)
        + "\n\n"
        + text
    )


def _scored(run: Mapping[str, Any], key: str) -> list[str]:
    """Minutes, right answers [%], and pixels of a run on one set of scenes."""
    scores = run["scores"]
    shares = [scores.get(f"{key}/accuracy/{kind}") for kind in ASKED]
    pixels = f"{scores[f'{key}/px/front']:.2f}, {scores[f'{key}/px_p90/front']:.2f}"
    return [f"{run['seconds'] / 60:.0f}", *("" if v is None else f"{100 * v:.0f}" for v in shares), pixels]


def bridge(path: Path) -> str:
    """Held-out action error on real teleoperation, beside trivial baselines."""
    if not path.exists():
        return "Not measured yet."
    found = json.loads(path.read_text())
    names = {
        "action_error": "the policy",
        "mean_error": "always the mean action",
        "last_error": "the last action again",
    }
    rows = [[name, f"{found['metrics'][key]:.3f}"] for key, name in names.items()]
    return (
        f"`benchmarks/bridge.py PATH`: {found['episodes']} WidowX episodes of Bridge V2 through `brachium convert` and "
        f"`brachium train`, split by episode ({found['training']} for training), "
        f"{found['parameters'] / 1e6:.1f} M parameters from scratch "
        f"in {found['seconds'] / 60:.1f} minutes. Mean absolute error of the chunk on held-out episodes, as a share of "
        "each dimension's scale:\n\n" + table(["", "error"], rows)
    )


def fill_readme(readme: Path, result: Mapping[str, Any], summary: Mapping[str, Any], machine: str) -> None:
    """Put the demo's figures between README's markers."""

    def block(name: str, body: str, text: str) -> str:
        pattern = rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)"
        if not re.search(pattern, text, re.DOTALL):
            raise ValueError(f"{readme} has no markers <!-- {name}: begin --> and <!-- {name}: end -->")
        return re.sub(pattern, lambda m: f"{m[1]}\n{body}\n\n{m[2]}", text, flags=re.DOTALL)

    columns = ["task", "all", "seen words", "held-out paraphrases", "held-out colour-object pairs"]
    tasks = summary["tasks"]
    rows = [[t, cell(tasks[t]), *(cell(tasks[t]["splits"][s]) for s in SPLITS)] for t in TASKS]
    achieved = (
        f"{table(columns, rows)}\n\nSuccesses / episodes = rate with a 95 % Wilson interval. One run: "
        f"{result['head']}, nano encoder, {result['parameters'] / 1e6:.1f} M parameters, {result['demos']} "
        f"demonstrations, seed {result['seed']}, {machine}."
    )
    seconds = result["seconds"]
    names = {
        "record": "record",
        "train": "train (encode, head)",
        "eval": "evaluate, with videos",
        "total": "total",
    }
    times = table(["stage", "seconds"], [[name, f"{seconds[key]:.0f}"] for key, name in names.items()])
    text = block("times", times, block("achieved", achieved, readme.read_text()))
    readme.write_text(re.sub(r"(took )\d+(\s+minutes \(\[times\])", rf"\g<1>{round(seconds['total'] / 60)}\2", text))


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
