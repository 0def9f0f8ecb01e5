"""A contact sheet: the start, middle and end of a few episodes, to see what was recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .layout import disk_errors
from .store import EpisodeStore

TILE = 128
GAP, LINE = 4, 20
_MOMENTS = ("start", "middle", "end")


def contact_sheet(store: EpisodeStore, path: Path, episodes: tuple[int, ...]) -> None:
    """Write a PNG with a row an episode and, for each camera, its first, middle and last frame.

    Raises:
        DiskSpaceError: No space for the picture.
    """
    cameras = store.embodiment.camera_names
    row_height = TILE + LINE + GAP
    size = (GAP + (TILE + GAP) * len(_MOMENTS) * max(1, len(cameras)), LINE + GAP + row_height * len(episodes))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for c, camera in enumerate(cameras):
        for m, moment in enumerate(_MOMENTS):
            draw.text((_left(c, m), 3), f"{camera}: {moment}", "black", font)
    for row, index in enumerate(episodes):
        top = LINE + GAP + row * row_height
        first, last = int(store.offsets[index]), int(store.offsets[index + 1]) - 1
        for c, camera in enumerate(cameras):
            frames = store.read_images(camera, [first, (first + last) // 2, last])
            for m, frame in enumerate(frames):
                tile, (dx, dy) = _fit(frame)
                sheet.paste(tile, (_left(c, m) + dx, top + dy))
        info = store.episodes[index]
        outcome = {True: "success", False: "failure", None: "unlabelled"}[info.success]
        text = f"episode {index}: {info.instruction!r}, {info.length} steps, {outcome}"
        draw.text((GAP, top + TILE + 2), text, "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        sheet.save(path)


def _left(camera: int, moment: int) -> int:
    return GAP + (camera * len(_MOMENTS) + moment) * (TILE + GAP)


def _fit(frame: np.ndarray) -> tuple[Image.Image, tuple[int, int]]:
    """Scale `frame` (H, W, 3) into a tile, keeping its proportions; return it and its offset in the tile."""
    height, width = frame.shape[:2]
    scale = TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    tile = Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR)
    return tile, ((TILE - size[0]) // 2, (TILE - size[1]) // 2)
