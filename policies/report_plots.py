"""Plots of a report, as inline SVG that takes its font from the page and its colours from CSS variables.

Matplotlib draws with the colours of the light page; they are then replaced by variables, so that the page's dark mode
reaches into the plots.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .report_data import Run, series
from .report_words import SPLIT_NAMES, label, percent

INK, MUTED, GRID = "#1b1f24", "#5c6570", "#dde1e6"
SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Okabe and Ito's colours, which the colour-blind can tell apart."""
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", **{c: f"--c{i}" for i, c in enumerate(SERIES)}}
_FONT = 9.5
PANEL = (4.0, 2.6)
"""Size of a small plot [inch]."""


def split_color(run: Run, split: str) -> str:
    """A kind of instruction has the same colour in every plot."""
    return SERIES[list(run.splits).index(split) % len(SERIES)]


def success_plot(run: Run) -> str:
    """Horizontal bars, task by task and kind by kind, with whiskers for the intervals."""
    bars: list[tuple[float, str, Mapping[str, Any]]] = []
    ticks, y = [], 0.0
    for task in run.tasks.values():
        start = y
        for split, group in task.get("splits", {}).items():
            bars.append((y, split, group))
            y += 1.0
        ticks.append((start + y - 1.0) / 2)
        y += 0.7
    if not bars:
        return ""
    figure, axes = new_figure((4.8, 0.75 + 0.25 * y))
    for at, split, group in bars:
        low, high = (100 * v for v in group["ci95"])
        rate = 100 * group["success_rate"]
        axes.barh(at, rate, 0.8, color=split_color(run, split))
        axes.plot([low, high], [at, at], color=INK, lw=1.1)
        axes.plot([low, high], [at, at], color=INK, lw=0, marker="|", ms=6)
        axes.text(104, at, f"{group['success']}/{group['episodes']}", va="center", color=MUTED)
    axes.set_yticks(ticks, [label(name) for name in run.tasks], color=INK)
    axes.set_xlim(0, 100)
    axes.set_ylim(y - 0.5, -0.7)
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    axes.grid(axis="x", color=GRID, lw=0.8)
    return page_svg(figure, "success", "Success rate by task and kind of instruction, with 95 % intervals")


def steps_plot(run: Run, task: str) -> str:
    """Histogram of the steps that successful episodes of one task took, stacked by kind of instruction."""
    mine = [r for r in run.rows if r["task"] == task and r["success"]]
    if not mine:
        return ""
    longest = max(run.limits.get(task, 0), max(int(r["steps"]) for r in mine))
    width = max(1, -(-longest // 16))
    edges = [i * width + 0.5 for i in range(-(-longest // width) + 1)]
    names = [s for s in run.splits if any(r["split"] == s for r in mine)]
    figure, axes = new_figure((PANEL[0], 2.1))
    data = [[int(r["steps"]) for r in mine if r["split"] == s] for s in names]
    axes.hist(data, bins=edges, stacked=True, color=[split_color(run, s) for s in names], rwidth=0.9)
    if task in run.limits:
        axes.axvline(run.limits[task] + 0.5, color=MUTED, lw=1, ls=(0, (4, 3)))
    axes.set_xlim(0.5, longest + 1.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("steps to success")
    axes.set_ylabel("episodes")
    axes.grid(axis="y", color=GRID, lw=0.8)
    return page_svg(figure, f"steps-{task}", f"Steps to success in {label(task)}")


PARTS = {"generator": "Generated subgoals", "policy": "Policy towards subgoals", "progress": "Progress filter"}
"""Part of a system that generates subgoals -> title."""


def training_plots(run: Run) -> list[tuple[str, str, str]]:
    """(title, SVG, caption) of each training curve whose numbers were logged."""
    ground, act = run.logs.get("ground", ()), run.logs.get("act", ())
    pixel = sorted({k for e in ground for k in e if k.startswith("eval/") and re.search(r"_px(_p90)?$", k)})
    short = {k: k.removeprefix("eval/").replace("_px_p90", ", 9 of 10 within") for k in pixel}
    named = {k: text.replace("_px", ", median") for k, text in short.items()}
    plots = [
        ("Grounding: loss", _lines("ground-loss", ground, {"loss": "training"}, floor=True), "Lower is better."),
        (
            "Grounding: pixel error",
            _lines("ground-px", ground, named, unit="pixels", floor=True),
            "Distance between the named thing and where the model points, on scenes kept from training.",
        ),
        (
            "Acting: loss",
            _lines("act-loss", act, {"loss": "training batch", "eval/loss": "held-out episodes"}, floor=True),
            "Lower is better; a growing gap between the two is overfitting.",
        ),
        ("Acting: learning rate", _lines("act-lr", act, {"lr": ""}, floor=True), _rate_caption(act)),
        ("Acting: error on held-out episodes", _error_plot(act), _error_caption(act)),
    ]
    curve = run.extra.get("curve", ())
    told = f"{CURVE} The last is the result." if curve else CURVE
    plots.append(("Success over training", _success_curve(curve or _rolled_out(act)), told))
    for part, what in PARTS.items():
        curve = _lines(f"{part}-loss", run.logs.get(part, ()), {"loss": "training batch"}, floor=True)
        plots.append((f"{what}: loss", curve, "Lower is better."))
    return [plot for plot in plots if plot[1]]


CURVE = "Averaged weights at some moments of training, in closed loop; bars: 95 % Wilson intervals."


def _rolled_out(act: Sequence[Any]) -> list[dict[str, Any]]:
    """Points of the curve that training itself has logged (``rollout_every``)."""
    return [
        {
            "seconds": entry["eval/trained_s"],
            "success_rate": entry["eval/success_rate"],
            "ci95": (entry["eval/success_low"], entry["eval/success_high"]),
        }
        for entry in act
        if "eval/trained_s" in entry
    ]


def _success_curve(points: Sequence[Mapping[str, Any]]) -> str:
    """Success rate against the time of training."""
    if len(points) < 2:
        return ""
    figure, axes = new_figure(PANEL)
    minutes = [point["seconds"] / 60 for point in points]
    rates = [100 * point["success_rate"] for point in points]
    low = [rate - 100 * point["ci95"][0] for rate, point in zip(rates, points)]
    high = [100 * point["ci95"][1] - rate for rate, point in zip(rates, points)]
    axes.errorbar(minutes, rates, [low, high], color=SERIES[0], lw=1.7, marker="o", ms=4, elinewidth=1.1)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.set_xlabel("training [min]")
    axes.set_ylabel("success [%]")
    axes.grid(axis="y", color=GRID, lw=0.8)
    return page_svg(figure, "success-curve", "success over training")


def _rate_caption(act: Sequence[Any]) -> str:
    _, rates = series(act, "lr")
    return f"Highest {max(rates):.2g}, at the end {rates[-1]:.2g}." if rates else ""


def _lines(name: str, entries: Sequence[Any], keys: Mapping[str, str], unit: str = "", floor: bool = False) -> str:
    found = {key: series(entries, key) for key in keys}
    found = {key: points for key, points in found.items() if points[0]}
    if not found:
        return ""
    if all(len(steps) == 1 for steps, _ in found.values()):
        return _levels(name, {keys[k]: values[0] for k, (_, values) in found.items()}, unit)
    figure, axes = new_figure(PANEL)
    for i, (key, (steps, values)) in enumerate(found.items()):
        sparse = len(steps) < 25
        style = "--" if key.endswith("_p90") else "-"
        color = SERIES[list(keys).index(key) // 2 if unit else i]
        axes.plot(steps, values, style, color=color, lw=1.7, marker="o" if sparse else "", ms=3, label=keys[key])
    if floor:
        axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("training step")
    axes.set_ylabel(unit)
    axes.grid(axis="y", color=GRID, lw=0.8)
    if len(found) > 1:
        _legend(axes)
    return page_svg(figure, name, name.replace("-", " "))


def _levels(name: str, values: Mapping[str, float], unit: str) -> str:
    """Bars for what was measured once: a curve of one point is none."""
    figure, axes = new_figure((PANEL[0], 0.7 + 0.3 * len(values)))
    for i, value in enumerate(values.values()):
        axes.barh(i, value, 0.7, color=SERIES[0])
        axes.annotate(f"{value:.3g}", (value, i), (4, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * max(values.values()) or 1)
    axes.set_xlabel(unit)
    axes.grid(axis="x", color=GRID, lw=0.8)
    return page_svg(figure, name, name.replace("-", " "))


def _error_plot(act: Sequence[Any]) -> str:
    """The action error over training between two baselines, which do not depend on the model."""
    steps, values = series(act, "eval/action_error")
    if not steps:
        return ""
    figure, axes = new_figure(PANEL)
    top = max(values)
    baselines = (("mean", "always the mean action", SERIES[1]), ("last", "the last action again", SERIES[3]))
    for key, text, color in baselines:
        _, levels = series(act, f"eval/{key}_error")
        if levels:
            axes.axhline(levels[-1], color=color, lw=1.5, ls=(0, (5, 3)), label=text)
            top = max(top, levels[-1])
    axes.plot(steps, values, color=SERIES[0], lw=1.7, marker="o", ms=5 if len(steps) < 4 else 3, label="this policy")
    axes.set_xlim(0, 1.06 * steps[-1] or 1)
    axes.set_ylim(0, 1.1 * top or 1)
    axes.set_xlabel("training step")
    axes.set_ylabel("share of action range")
    axes.grid(axis="y", color=GRID, lw=0.8)
    _legend(axes)
    return page_svg(figure, "act-error", "Action error on held-out episodes")


def _error_caption(act: Sequence[Any]) -> str:
    _, values = series(act, "eval/action_error")
    if not values:
        return ""
    beaten = []
    for key, text in (("mean", "the mean action"), ("last", "the last action")):
        _, levels = series(act, f"eval/{key}_error")
        if levels and levels[-1] > 0:
            share = 1 - values[-1] / levels[-1]
            beaten.append(f"{percent(abs(share))} {'below' if share >= 0 else 'ABOVE'} {text}")
    return f"At the end: {', '.join(beaten)}." if beaten else ""


def new_figure(size: tuple[float, float]) -> Any:
    """A figure and its axes in the reports' looks; `size` in inches."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    figure.patch.set_alpha(0)
    return figure, new_axes(figure.add_subplot())


def new_axes(axes: Any) -> Any:
    """Axes in the reports' looks."""
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(length=0, labelsize=_FONT, labelcolor=MUTED, pad=4)
    axes.xaxis.label.set(color=MUTED, size=_FONT)
    axes.yaxis.label.set(color=MUTED, size=_FONT)
    axes.set_axisbelow(True)
    return axes


def _legend(axes: Any) -> None:
    """Above the axes, where it hides no curve."""
    entries = len(axes.get_legend_handles_labels()[0])
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=min(entries, 2), frameon=False, fontsize=_FONT - 0.5,
        labelcolor=MUTED, handlelength=1.6, columnspacing=1.2, borderaxespad=0.1,
    )  # fmt: skip


def page_svg(figure: Any, name: str, title: str) -> str:
    """SVG for the middle of a page: no prologue, no addresses, ids of its own, colours as variables."""
    from html import escape

    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_fontsize(min(text.get_fontsize(), _FONT))
        text.set_parse_math(False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns|xmlns:xlink|version)="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    prefix = re.sub(r"\W", "-", name)
    rename = {old: f"{prefix}-{i}" for i, old in enumerate(sorted(used))}
    text = re.sub(r'\sid="([^"]*)"', lambda m: f' id="{rename[m[1]]}"' if m[1] in rename else "", text)
    text = re.sub(r'((?:url\(|href=")#)([^)"]+)', lambda m: m[1] + rename[m[2]], text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    text = re.sub(r"\n+\s*", " ", text)
    for color, variable in _VARIABLES.items():
        text = re.sub(color, f"var({variable})", text, flags=re.IGNORECASE)
    text = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg role="img" viewBox="\1">', text, count=1)
    return text.replace(">", f"><title>{escape(title)}</title>", 1).strip()


def legend_items(run: Run) -> list[tuple[str, str]]:
    """(CSS variable, name) of each kind of instruction, for a legend in the page."""
    return [(_VARIABLES[split_color(run, s)], SPLIT_NAMES.get(s, s)) for s in run.splits]
