"""The sentences of a report. Every one is made from counts; none says more than the episodes can."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .intervals import wilson
from .report_data import Run

SPLIT_NAMES = {"train": "seen words", "paraphrase": "held-out paraphrases", "pair": "held-out colour-object pairs"}
_SPLIT_PHRASES = {
    "paraphrase": "With other words for the same task, never used in training,",
    "pair": "For things whose colour and shape were never named together in training,",
}
_CONTROLS = {
    "shuffle": (
        "This is a control, not a result: every instruction named things of the scene drawn at random, while success "
        "was judged by the task that was really set. A policy that listens should rarely succeed here (only when the "
        "random name happens to be the right one). A rate close to that of the normal evaluation would mean that it "
        "ignores what it is told."
    ),
    "blind": (
        "This is a control, not a result: every image was black. A policy that looks should rarely succeed here. "
        "A rate close to that of the normal evaluation would mean that it acts without seeing."
    ),
}
WIDE = 0.2
"""Width of an interval above which the report warns that episodes are few."""


def percent(share: float) -> str:
    """A share in whole percent; only exactly none is 0 %, and only exactly all is 100 %."""
    text = f"{100 * share:.0f}"
    if text == "100" and share < 1:
        return ">\u00a099\u00a0%"
    if text == "0" and share > 0:
        return "<\u00a01\u00a0%"
    return f"{text}\u00a0%"


def interval(group: Mapping[str, Any]) -> str:
    """``42–73 %``, with a space that no line breaks at."""
    low, high = group["ci95"]
    return f"{100 * low:.0f}–{100 * high:.0f}\u00a0%"


def label(name: str) -> str:
    """A task's name for people."""
    return name.replace("_", " ")


def count(number: int, noun: str) -> str:
    """``1 episode``, ``12 episodes``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}".replace(",", " ")


def listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[float, float]:
    """95 % interval of the difference of two success rates (Newcombe 1998, method 10)."""
    k1, n1, k2, n2 = first["success"], first["episodes"], second["success"], second["episodes"]
    p1, p2 = k1 / n1, k2 / n2
    (low1, high1), (low2, high2) = wilson(k1, n1), wilson(k2, n2)
    below = math.sqrt((p1 - low1) ** 2 + (high2 - p2) ** 2)
    above = math.sqrt((high1 - p1) ** 2 + (p2 - low2) ** 2)
    return p1 - p2 - below, p1 - p2 + above


def summary_paragraphs(run: Run) -> list[str]:
    """The report in plain language: what happened, with which words, how it fails, how sure one may be."""
    total = run.summary["total"]
    if not total["episodes"]:
        return ["No episode has been evaluated, so there is nothing to say about success."]
    first = [] if run.control == "none" else [_control(run)]
    first += [_overall(run), *_tasks(run)]
    second = _kinds(run) if run.control != "shuffle" else []
    third = [*_failures(run), *_speed(run)]
    parts = (first, second, third, _caution(run))
    return [" ".join(part).replace(" %", "\u00a0%") for part in parts if part]


def _control(run: Run) -> str:
    return _CONTROLS.get(run.control, f"This is a control ({run.control}), not a result.")


def _overall(run: Run) -> str:
    total = run.summary["total"]
    k, n, (low, high) = total["success"], total["episodes"], total["ci95"]
    task = f" of {label(next(iter(run.tasks)))}" if len(run.tasks) == 1 else ""
    did = "did what it was told" if run.control == "none" else "did the task that was set"
    if n == 1:
        return f"The policy {did if k else did.replace('did', 'did not do', 1)} in the only episode{task}."
    if k == 0:
        likely = f"its true success rate is most likely below {100 * high:.0f} %"
        return f"The policy {did.replace('did', 'did not do', 1)} in any of {count(n, 'episode')}{task}: {likely}."
    if k == n:
        return (
            f"The policy {did} in all {count(n, 'episode')}{task}: "
            f"its true success rate is most likely above {100 * low:.0f} %."
        )
    likely = f"its true success rate most likely lies between {100 * low:.0f} and {100 * high:.0f} % (95 % interval)"
    return f"The policy {did} in {k} of {count(n, 'episode')}{task} ({percent(k / n)}): {likely}."


def _tasks(run: Run) -> list[str]:
    if len(run.tasks) < 2:
        return []
    parts = [f"{label(name)} {t['success']} of {t['episodes']}" for name, t in run.tasks.items()]
    return [f"By task: {listed(parts)}."]


def _kinds(run: Run) -> list[str]:
    """Each kind of instruction, against the words of training where all tasks have both."""
    seen = run.splits.get("train")
    sentences = []
    if seen and seen["episodes"] and len(run.splits) > 1:
        sentences.append(f"With the words of training it succeeded in {_share(seen)}.")
    for name, group in run.splits.items():
        if name == "train" or not group["episodes"]:
            continue
        start = _SPLIT_PHRASES.get(name, f"With instructions of the kind “{name}”")
        paired = all({name, "train"} <= task.get("splits", {}).keys() for task in run.tasks.values())
        compared = _compared(group, seen) if seen and seen["episodes"] and paired else ""
        sentences.append(f"{start} it succeeded in {_share(group)}{compared}.")
    return sentences


def _share(group: Mapping[str, Any]) -> str:
    return f"{group['success']} of {group['episodes']} ({percent(group['success_rate'])})"


def _compared(group: Mapping[str, Any], seen: Mapping[str, Any]) -> str:
    low, high = difference(group, seen)
    if high < 0:
        return ", which is worse by more than chance explains"
    if low > 0:
        return ", which is better by more than chance explains"
    return "" if group["success_rate"] == seen["success_rate"] else ", a difference that chance can explain"


def _failures(run: Run) -> list[str]:
    total = run.summary["total"]
    failed = total["episodes"] - total["success"]
    if not failed:
        return ["No episode failed."]
    sentences = []
    by_task = {name: t["episodes"] - t["success"] for name, t in run.tasks.items()}
    worst = max(by_task, key=lambda name: by_task[name], default="")
    if len(by_task) > 1 and list(by_task.values()).count(by_task[worst]) == 1:
        sentences.append(f"It fails most often in {label(worst)} ({by_task[worst]} of {count(failed, 'failure')}).")
    ends = run.endings()
    if ends.total() != failed or ends["unknown"] == failed:
        return [*sentences, "The log does not say how failed episodes ended."]
    kinds = sorted(ends, key=lambda k: -ends[k])
    if len(kinds) == 1:
        whole = "The only failed episode" if failed == 1 else f"All {failed} failed episodes"
        return [*sentences, f"{whole} {_ending(kinds[0])}."]
    parts = [f"{ends[kind]} {_ending(kind)}" for kind in kinds]
    return [*sentences, f"Of {failed} failed episodes, {listed(parts)}."]


_ENDINGS = {
    "out of time": "ran out of time",
    "wrong object": "went for a wrong object",
    "wrong goal": "took it to a wrong goal",
    "off the table": "lost the object off the table",
    "early": "ended early, counted as failed by the task",
    "unknown": "ended in a way that the log does not say",
}


def _ending(reason: str) -> str:
    """What failed episodes did, in words; reasons of other environments are quoted."""
    return _ENDINGS.get(reason, f"ended with “{reason}”")


def _speed(run: Run) -> list[str]:
    steps = [int(r["steps"]) for r in run.rows if r["success"]]
    if len(steps) < 2:
        return []
    return [f"A successful episode took {median(steps):.0f} steps (median; {min(steps)} to {max(steps)})."]


def _caution(run: Run) -> list[str]:
    """A warning where intervals of single tasks are wide."""
    groups = list(run.tasks.values()) or [run.summary["total"]]
    widths = [high - low for low, high in (g["ci95"] for g in groups)]
    if not widths or max(widths) <= WIDE:
        return []
    fewest = min(g["episodes"] for g in groups)
    per = " a task" if len(groups) > 1 else ""
    each = "a task's" if len(groups) > 1 else "the"
    return [
        f"With {count(fewest, 'episode')}{per}, {each} interval is up to {100 * max(widths):.0f} points wide; "
        "smaller differences say nothing. More episodes make it narrower."
    ]
