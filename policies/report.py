"""The report of an evaluation: one HTML file that holds all it shows, for people."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..console import human_time
from .page import write_html
from .report_data import Run, by_thing, failing, grouped, read_run, wording
from .report_plots import legend_items, steps_plot, success_plot, training_plots
from .report_words import SPLIT_NAMES, interval, label, percent, summary_paragraphs

VIDEO_BYTES = 8_000_000
"""Bytes of video that the file holds at most; further ones stay in their folder."""
MOST = 8
"""Rows of a table of what fails."""
_STAGE_ORDER = ("record", "ground", "train", "correct", "eval", "total")


def write_report(folder: Path, checkpoint: Path | None, *, extra: Mapping[str, Any] | None = None) -> Path:
    """Write ``folder/report.html`` from an evaluation's files, and the training logs beside `checkpoint`.

    Args:
        folder: Holds ``summary.json``, and ``episodes.jsonl``, ``videos.json`` and ``videos/`` if they were made.
        checkpoint: What was evaluated; None where only the evaluation is to be shown.
        extra: Further facts: ``title``, ``seconds`` (stage -> [s]), ``demos`` (number of demonstrations), ``command``;
            of a suite of others ``ranking`` (rows beside published figures), ``rules``, ``seeds``, ``curve`` and
            ``hardware``.

    Returns:
        Path of the report.

    Raises:
        NotFoundError: `folder` holds no evaluation.
    """
    folder = Path(folder)
    run = read_run(folder, Path(checkpoint) if checkpoint else None, extra)
    filters: dict[str, Callable[..., Any]] = {"percent": percent, "interval": interval, "label": label}
    return write_html(
        folder / "report.html", __package__, "report.html.jinja", _content(run, folder, checkpoint), filters
    )


def _content(run: Run, folder: Path, checkpoint: Path | None) -> dict[str, Any]:
    """Everything that the template shows."""
    from markupsafe import Markup

    name = Path(str(run.summary.get("checkpoint") or checkpoint or "policy"))
    plain = name.parent.name if name.name == "checkpoint" and name.parent.name else name.name
    videos, left_out = _videos(run)
    told = run.control != "shuffle"  # the instruction names what was asked
    return {
        "title": run.extra.get("title") or plain,
        "subtitle": _subtitle(run),
        "control": run.control,
        "paragraphs": summary_paragraphs(run),
        "total": run.summary["total"],
        "splits": [(SPLIT_NAMES.get(s, s), group) for s, group in run.splits.items()],
        "tasks": run.tasks,
        "split_names": SPLIT_NAMES,
        "legend": legend_items(run),
        "success_plot": Markup(success_plot(run)),
        "videos": videos,
        "videos_left_out": left_out,
        "videos_folder": folder / "videos",
        "ranking": list(run.extra.get("ranking", ())),
        "rules": str(run.extra.get("rules", "")),
        "seed_rates": ", ".join(f"{value:.1f}" for value in run.extra.get("seeds", ())),
        "subgoals": _picture(folder / "subgoals.png"),
        "curves": [(title, Markup(svg), caption) for title, svg, caption in training_plots(run)],
        "steps": [(task, Markup(steps_plot(run, task)), _steps_caption(run, task)) for task in run.tasks],
        "wordings": failing(grouped(run.rows, lambda r: (r["task"], wording(str(r["instruction"])))), MOST),
        "instructions": failing(grouped(run.rows, lambda r: (r["task"], str(r["instruction"]))), MOST),
        "things": by_thing(run.rows) if told else {"parsed": 0},
        "rows": len(run.rows),
        "facts": facts(run),
        "command": _command(run),
    }


def _picture(path: Path) -> str:
    """A picture as base64; empty where there is none."""
    return base64.b64encode(path.read_bytes()).decode() if path.exists() else ""


def _subtitle(run: Run) -> str:
    head, size = run.summary.get("head"), run.summary.get("parameters")
    parts = [str(head)] if head else []
    if isinstance(size, (int, float)) and size:
        parts.append(f"{size / 1e6:.1f} M parameters")
    parts.append(f"{run.summary['total']['episodes']} episodes, closed loop")
    return ", ".join([*parts, f"{datetime.now():%Y-%m-%d}"])


def _videos(run: Run) -> tuple[list[tuple[str, list[dict[str, Any]]]], int]:
    """(task, videos) pairs as data, failures first, and how many did not fit: of each task the first, then the next."""
    used = left_out = 0
    groups: dict[str, list[dict[str, Any]]] = {video["task"]: [] for video in run.videos}
    turn = {id(v): sum(w["task"] == v["task"] for w in run.videos[:k]) for k, v in enumerate(run.videos)}
    for video in sorted(run.videos, key=lambda v: turn[id(v)]):
        data = video["path"].read_bytes()
        if used + len(data) > VIDEO_BYTES:
            left_out += 1
            continue
        used += len(data)
        shown = {k: video[k] for k in ("instruction", "seed", "steps", "success")}
        shown["split"] = SPLIT_NAMES.get(video["split"], video["split"])
        shown["failure"] = video.get("failure") or "failure"
        shown["data"] = base64.b64encode(data).decode()
        shown["poster"] = poster(video["path"])
        groups[video["task"]].append(shown)
    return [(task, videos) for task, videos in groups.items() if videos], left_out


def poster(path: Path) -> str:
    """The first frame of a video as base64 JPEG, or an empty string where it cannot be decoded."""
    import io

    import imageio.v2 as imageio
    from PIL import Image

    try:
        reader: Any = imageio.get_reader(path, format="FFMPEG")  # type: ignore[arg-type]
        with reader:
            frame = reader.get_data(0)
    except Exception:  # imageio raises whatever its plugin does; the video is shown without a poster
        return ""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _steps_caption(run: Run, task: str) -> str:
    group = run.tasks[task]
    failed = group["episodes"] - group["success"]
    limit = f"; cut off after {run.limits[task]} steps" if task in run.limits else ""
    ends = [f"{number} {reason}" for reason, number in run.endings(task).most_common()]
    why = f": {', '.join(ends)}" if failed and len(run.rows) else ""
    return f"{group['success']} of {group['episodes']} succeeded, {failed} failed (not drawn){why}{limit}."


def facts(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, (name, value) pairs) of all that is known about how the numbers came about."""
    summary, settings, meta = run.summary, run.summary.get("settings", {}), run.meta
    seeds = sorted(int(r["seed"]) for r in run.rows)
    policy = [
        ("Checkpoint", summary.get("checkpoint")),
        ("Action head", summary.get("head") or meta.get("head")),
        ("Parameters", summary.get("parameters") or meta.get("parameters")),
        ("Training seed", summary.get("train_seed", meta.get("seed"))),
        ("Executor", summary.get("executor")),
    ]
    evaluation = [
        ("Control", run.control),
        ("Episodes", summary["total"]["episodes"]),
        ("Kinds of instruction", ", ".join(f"{SPLIT_NAMES.get(s, s)} {g['episodes']}" for s, g in run.splits.items())),
        ("Seeds", f"{seeds[0]} to {seeds[-1]}" if seeds else None),
        ("Environments at once", settings.get("num_envs")),
        ("Device", settings.get("device")),
        *_speed(summary),
    ]
    store = meta.get("store") if isinstance(meta.get("store"), Mapping) else {}
    assert isinstance(store, Mapping)
    training = [
        ("Demonstrations", run.extra.get("demos")),
        ("Hardware", run.extra.get("hardware")),
        ("Demonstrations trained on", store.get("episodes")),
        ("Store", store.get("path")),
        ("Store fingerprint", store.get("fingerprint")),
        *_stages(run),
    ]
    versions = meta.get("versions") if isinstance(meta.get("versions"), Mapping) else {}
    assert isinstance(versions, Mapping)
    groups: list[tuple[str, Sequence[tuple[str, Any]]]] = [
        ("Policy", policy),
        ("Evaluation", evaluation),
        ("Training", training),
        ("Versions the checkpoint was saved with", list(versions.items())),
    ]
    shown = [(title, [(k, _shown(v)) for k, v in pairs if v not in (None, "")]) for title, pairs in groups]
    return [(title, pairs) for title, pairs in shown if pairs]


def _speed(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Wall time and speed; an evaluation that was resumed took its time for the new episodes only."""
    seconds, steps, episodes = summary.get("seconds"), summary.get("env_steps"), summary["total"]["episodes"]
    new = summary.get("this_run") or {"episodes": episodes, "env_steps": steps}
    if not isinstance(seconds, (int, float)) or not steps:
        return [("Environment steps", steps)]
    resumed = f" (for the last {new['episodes']} episodes; resumed)" if new["episodes"] != episodes else ""
    found = [("Environment steps", steps), ("Wall time", human_time(seconds) + resumed)]
    if new["env_steps"] and seconds:
        found.append(("Environment steps/s", f"{new['env_steps'] / seconds:.1f}"))
    return found


def _stages(run: Run) -> list[tuple[str, Any]]:
    """Seconds a stage: those of the caller, else those of the checkpoint."""
    names = {"ground": "grounding", "eval": "evaluation", "train": "training", "record": "recording"}
    names |= {"correct": "corrections"}
    given = run.extra.get("seconds")
    seconds = given if isinstance(given, Mapping) else run.meta.get("seconds")
    if not isinstance(seconds, Mapping):
        return []
    order = sorted(seconds, key=lambda k: (_STAGE_ORDER.index(k) if k in _STAGE_ORDER else 1, k))
    if not isinstance(given, Mapping):
        names = {**names, "total": "training, in all"}
    return [
        (f"Time: {names.get(stage, stage)}", human_time(float(seconds[stage])))
        for stage in order
        if isinstance(seconds[stage], (int, float)) and seconds[stage]
    ]


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 100_000:
        return f"{value:,}".replace(",", "\u202f")
    return str(value)


def _command(run: Run) -> str:
    """What to type to get these numbers again: as it was typed, else put together from what is known."""
    given, typed = run.extra.get("command"), run.summary.get("command")
    if given:
        return str(given)
    if typed:
        return shlex.join(["brachium", *map(str, typed)])
    seeds = [int(r["seed"]) for r in run.rows]
    settings = run.summary.get("settings", {})
    counts = [t["episodes"] for t in run.tasks.values()]
    words = ["brachium", "eval", f"checkpoint={run.summary.get('checkpoint')}"]
    if counts:
        words.append(f"episodes={settings.get('episodes', max(counts))}")
    if seeds:
        words.append(f"seed={settings.get('seed', min(seeds))}")
    if run.control != "none":
        words.append(f"control={run.control}")
    return shlex.join(words) + "   # with the same tasks and executor"
