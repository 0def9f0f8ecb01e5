"""What generated subgoals looked like beside what was seen and what came: a picture for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ...spec import Observation

EVERY = 25
"""Episodes whose seed is a multiple of this are kept."""
MOST = 4
"""Subgoals of an episode that are kept."""
SIDE, GAP, LINE, LEAST = 72, 4, 14, 420
"""Side of a shown image, space between them, height of a line of text, least width of the page [screen pixels]."""


@dataclass
class Entry:
    """One subgoal: the present when it was made, its pictures camera -> (f, height, width, 3), and what came."""

    text: str
    seen: Mapping[str, np.ndarray]
    made: Mapping[str, np.ndarray]
    came: Mapping[str, np.ndarray] | None = None


class Album:
    """Keeps subgoals of some episodes. What came is what was seen when the next subgoal was made."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._open: dict[int, list[Entry]] = {}

    def begin(self, lane: int, seed: int) -> None:
        """An episode begins in a lane."""
        self._open.pop(lane, None)
        if seed % EVERY == 0:
            self._open[lane] = []

    def pursue(self, lane: int, observation: Observation, shown: Mapping[str, np.ndarray], text: str) -> None:
        """A subgoal is pursued from now on."""
        if lane not in self._open:
            return
        mine = self._open[lane]
        if mine and mine[-1].came is None:
            mine[-1].came = dict(observation.images)
            self.entries.append(mine[-1])
        if len(mine) < MOST:
            made = {name: images if images.ndim == 4 else images[None] for name, images in shown.items()}
            mine.append(Entry(text=text, seen=dict(observation.images), made=made))

    def write(self, path: Path) -> Path | None:
        """Draw what is kept: a row a subgoal and camera; None where nothing is."""
        if not self.entries:
            return None
        frames = max(len(images) for entry in self.entries for images in entry.made.values())
        cameras = list(self.entries[0].made)
        columns = 2 + frames
        height = LINE + len(cameras) * (SIDE + GAP)
        wide = max(columns * (SIDE + GAP), LEAST)
        page = Image.new("RGB", (wide, LINE + height * len(self.entries)), "white")
        draw = ImageDraw.Draw(page)
        for k, title in enumerate(("seen", "generated", *[""] * (frames - 1), "came")):
            draw.text((k * (SIDE + GAP), 0), title, fill="black")
        for row, entry in enumerate(self.entries):
            top = LINE + row * height
            draw.text((0, top), entry.text, fill="black")
            for c, camera in enumerate(cameras):
                came = [] if entry.came is None else [entry.came[camera]]
                for k, image in enumerate((entry.seen[camera], *entry.made[camera], *came)):
                    place = (k * (SIDE + GAP), top + LINE + c * (SIDE + GAP))
                    page.paste(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST), place)
        page.save(path)
        return path
