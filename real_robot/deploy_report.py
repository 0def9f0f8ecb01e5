"""The report of a deployment: one HTML file with videos, histograms of time, interventions and runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import NotFoundError
from ..policies.page import write_html
from ..policies.report_plots import PANEL, SERIES, new_figure, page_svg
from .deploy_video import record_videos
from .preflight import Check

PLOTS = (
    ("period", "time between two commands", "Time between two commands [ms]"),
    ("inference", "time of an answer", "From request to answer of the policy [ms]"),
    ("age", "age of an action", "Age of what the executed action had seen [ms]"),
    ("work", "work of a tick", "Work of one tick of the loop [ms]"),
)


def write_report(folder: Path, checks: Sequence[Check] = ()) -> Path:
    """Write ``folder/report.html`` from ``folder/summary.json``.

    Raises:
        NotFoundError: There is no deployment in `folder`.
    """
    path = folder / "summary.json"
    if not path.exists():
        raise NotFoundError(f"no deployment in {folder}: expected {path}")
    summary = json.loads(path.read_text())
    content = _content(summary, checks) | {"videos": record_videos(folder, summary["runs"])}
    return write_html(folder / "report.html", __package__, "deploy.html.jinja", content)


def _content(summary: Mapping[str, Any], checks: Sequence[Check]) -> dict[str, Any]:
    from markupsafe import Markup

    runs = summary["runs"]
    samples = {key: np.concatenate([run["samples"][key] for run in runs]) for key, _, _ in PLOTS}
    plots = [
        (Markup(_histogram(f"deploy-{key}", samples[key], label)), _caption(samples[key], what))
        for key, what, label in PLOTS
        if len(samples[key])
    ]
    return {
        "title": f"Deployment of {summary['identity'].get('name') or summary['policy']}",
        "subtitle": f"{summary['embodiment']}, {summary['executor']}, {summary['control_hz']:g} Hz, mode "
        f"{summary['mode']}, {summary['delay_ms']:g} ms of added delay, {summary['written']}",
        "tiles": _tiles(summary, samples),
        "plots": plots,
        "interventions": _grouped(runs),
        "runs": runs,
        "checks": checks,
    }


def _tiles(summary: Mapping[str, Any], samples: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    runs, total = summary["runs"], summary["total"]
    tiles = []
    if total:
        low, high = total["ci95"]
        tiles.append(
            (f"{total['success']}/{total['episodes']}", f"success, 95 % from {100 * low:.0f} to {100 * high:.0f} %")
        )
    if len(samples["period"]):
        error = np.abs(samples["period"] - 1e3 / summary["control_hz"])
        tiles.append((f"{np.percentile(error, 99):.2f} ms", "period error, 99th percentile"))
    if len(samples["inference"]):
        tiles.append((f"{np.median(samples['inference']):.0f} ms", "answer of the policy, median"))
    tiles.append((str(sum(run["starved_ticks"] for run in runs)), "ticks without a plan"))
    tiles.append((str(sum(times for _, times, _, _ in _grouped(runs))), "interventions"))
    return tiles


def _grouped(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int, str]]:
    """(kind, times, ticks, an example), the most frequent first; endings are no interventions."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        for entry in run["interventions"]:
            if entry["kind"] not in ("done", "time"):
                found.setdefault(entry["kind"], []).append(entry)
    rows = [(kind, len(each), sum(e["ticks"] for e in each), str(each[0]["detail"])) for kind, each in found.items()]
    return sorted(rows, key=lambda row: -row[1])


def _histogram(name: str, values: np.ndarray, label: str) -> str:
    """Counts on a logarithmic axis: what matters are the few that are late."""
    figure, axes = new_figure(PANEL)
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high if high > low else low + 1.0, 41)
    axes.hist(values, bins=edges, color=SERIES[0], log=True)
    axes.set_xlabel("ms")
    axes.locator_params(axis="x", nbins=4)
    axes.set_ylabel("times")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    return page_svg(figure, name, label)


def _caption(values: np.ndarray, what: str) -> str:
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return f"The {what}: median {p50:.2f}, p95 {p95:.2f}, p99 {p99:.2f}, at most {values.max():.2f} ms."
