"""Videos of a deployment's runs: what the policy was shown, from the log of the runs."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..console import log
from ..datasets.episode import EpisodeData
from ..datasets.store import EpisodeStore
from ..errors import BrachiumError
from ..policies.report import poster
from ..policies.video import write_video

MOST = 6
"""Videos in a report."""
HEIGHT = 192
"""Least height of a picture [px]; smaller ones are enlarged by a whole factor."""


def record_videos(folder: Path, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Write MP4 files of up to `MOST` runs into ``folder/videos``, those first that did not succeed.

    Returns:
        A row a video: ``number`` of the run, ``data`` and ``poster`` in base64; none where no log was kept.
    """
    if not (folder / "store").exists():
        return []
    order = sorted(range(len(runs)), key=lambda k: (runs[k]["success"] is True, k))
    rows = []
    try:
        store = EpisodeStore.open(folder / "store")
        latest = {info.meta.get("seed"): info.index for info in store.episodes if "deploy" in info.tags}
        for number in sorted(order[:MOST]):
            index = latest.get(runs[number]["seed"])
            if index is not None:
                path = folder / "videos" / f"run-{number + 1}.mp4"
                path.parent.mkdir(exist_ok=True)
                write_video(path, *_frames(store.episode(index)))
                data = base64.b64encode(path.read_bytes()).decode()
                rows.append({"number": number + 1, "data": data, "poster": poster(path)})
    except (BrachiumError, OSError) as error:  # the report is worth more than its videos
        log(f"no videos of the runs: {error}")
    return rows


def _frames(episode: EpisodeData) -> tuple[list[np.ndarray], float]:
    """All cameras side by side at each step, and the rate at which they were seen [Hz]."""
    columns = []
    for name in episode.images:
        pictures = episode.images[name]
        if pictures.dtype == np.uint8 and pictures.shape[-1] == 3:
            factor = -(-HEIGHT // pictures.shape[1])
            columns.append(pictures.repeat(factor, axis=1).repeat(factor, axis=2))
    high = max(column.shape[1] for column in columns)
    padded = [np.pad(c, ((0, 0), (0, high - c.shape[1]), (0, 0), (0, 0))) for c in columns]
    spent = float(episode.timestamp[-1] - episode.timestamp[0])
    rate = (len(episode) - 1) / spent if spent > 0.0 else 10.0
    return list(np.concatenate(padded, axis=2)), float(np.clip(rate, 1.0, 60.0))
