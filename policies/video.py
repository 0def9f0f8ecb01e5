"""Videos of evaluated episodes, made by replaying their actions at a size that people can look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..console import progress
from .rollout import replay

FPS = 20.0
"""Most pictures a second; of faster environments some are left out."""
HOLD = 6
"""Frames that the last picture stays."""


def record_videos(
    folder: Path, rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, Callable[..., Any]], count: int
) -> list[dict[str, Any]]:
    """Write up to `count` MP4 files a task into ``folder/videos`` and their list into ``videos.json``.

    Failures come first, but one success of each task is always shown where there is one.
    """
    chosen: list[Mapping[str, Any]] = []
    for name in tasks:
        mine = [r for r in rows if r["task"] == name]
        failed, done = [r for r in mine if not r["success"]], [r for r in mine if r["success"]]
        wins = max(1, count - len(failed)) if done else 0
        chosen += failed[: count - min(wins, count)] + done[:wins]
    target = folder / "videos"
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.mp4"):
        old.unlink()
    listing = []
    with progress("recording videos", total=len(chosen), unit="videos") as bar:
        for row in chosen:
            actions = np.asarray(row["actions"], np.float32)
            frames, fps = replay(tasks[row["task"]], row["seed"], row["options"], actions, FPS)
            ending = "success" if row["success"] else "failure"
            path = target / f"{row['task']}-{row['split']}-{row['seed']}-{ending}.mp4"
            write_video(path, frames, fps=fps)
            listing.append({k: row[k] for k in ("task", "split", "seed", "instruction", "success", "steps")})
            listing[-1]["failure"] = row.get("failure", "")
            listing[-1]["file"] = f"videos/{path.name}"
            bar.update(1)
    (folder / "videos.json").write_text(json.dumps(listing, indent=1) + "\n")
    return listing


def write_video(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    """Encode uint8 (height, width, 3) frames as H.264; the last one stays a while."""
    import imageio.v2 as imageio

    temporary = path.with_name(f".{path.name}")
    with imageio.get_writer(temporary, format="FFMPEG", fps=fps, codec="libx264", quality=6, macro_block_size=2) as out:
        for frame in [*frames, *([frames[-1]] * HOLD)]:
            out.append_data(frame)  # type: ignore[attr-defined]
    temporary.replace(path)
