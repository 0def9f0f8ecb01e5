"""Videos of evaluated episodes, made by replaying their actions at a size that people can look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..console import progress
from ..identity import digest
from .rollout import replay

FPS = 20.0
"""Most pictures a second; of faster environments some are left out."""
HOLD = 6
"""Frames that the last picture stays."""


def record_videos(
    folder: Path, rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, Callable[..., Any]], count: int
) -> list[dict[str, Any]]:
    """Write up to `count` MP4 files a task into ``folder/videos`` and their list into ``videos.json``.

    Failures come first; of two or more videos of a task one shows a success where there is one. A video that is there
    already of the same episode is kept.
    """
    chosen: list[Mapping[str, Any]] = []
    for name in tasks:
        mine = [r for r in rows if r["task"] == name]
        failed, done = [r for r in mine if not r["success"]], [r for r in mine if r["success"]]
        wins = min(len(done), max(count - len(failed), int(count > 1)))
        chosen += failed[: count - wins] + done[:wins]
    target, note = folder / "videos", folder / "videos.json"
    target.mkdir(parents=True, exist_ok=True)
    there = _listed(note)
    listing = [_entry(row, tasks[row["task"]]) for row in chosen]
    for old in set(target.glob("*.mp4")) - {folder / entry["file"] for entry in listing if entry in there}:
        old.unlink()
    missing = [k for k, entry in enumerate(listing) if not (folder / entry["file"]).exists()]
    with progress("recording videos", total=len(missing), unit="videos") as bar:
        for k in missing:
            row = chosen[k]
            actions = np.asarray(row["actions"], np.float32)
            frames, fps = replay(tasks[row["task"]], row["seed"], row["options"], actions, FPS)
            write_video(folder / listing[k]["file"], frames, fps=fps)
            bar.update(1)
    note.write_text(json.dumps(listing, indent=1) + "\n")
    return listing


def _entry(row: Mapping[str, Any], make: Callable[..., Any]) -> dict[str, Any]:
    """What is told of an episode's video, and what it was made of."""
    ending = "success" if row["success"] else "failure"
    return {
        **{k: row[k] for k in ("task", "split", "seed", "instruction", "success", "steps")},
        "failure": row.get("failure", ""),
        "file": f"videos/{row['task']}-{row['split']}-{row['seed']}-{ending}.mp4",
        "of": digest(make, row["options"], row["actions"]),
    }


def _listed(note: Path) -> list[Any]:
    """The videos that were made before."""
    try:
        found = json.loads(note.read_text())
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def write_video(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    """Encode uint8 (height, width, 3) frames as H.264; the last one stays a while."""
    import imageio.v2 as imageio

    temporary = path.with_name(f".{path.name}")
    with imageio.get_writer(temporary, format="FFMPEG", fps=fps, codec="libx264", quality=6, macro_block_size=2) as out:
        for frame in [*frames, *([frames[-1]] * HOLD)]:
            out.append_data(frame)  # type: ignore[attr-defined]
    temporary.replace(path)
