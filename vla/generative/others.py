"""A few frames of held-out episodes that travel with a checkpoint, for the honesty check that shuffles subgoals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

COUNT = 24
"""Frames that are kept."""
FILE = "others.safetensors"


@dataclass(frozen=True, kw_only=True)
class Others:
    """What other episodes saw and were told.

    Attributes:
        frames: Camera -> uint8 (count, height, width, 3).
        texts: Their instructions.
    """

    frames: Mapping[str, np.ndarray]
    texts: tuple[str, ...]

    def pick(self, seed: int, text: str) -> int:
        """One of them, told by `seed`, whose instruction is not `text`."""
        strangers = [k for k, other in enumerate(self.texts) if other != text] or list(range(len(self.texts)))
        return strangers[int(np.random.default_rng([seed, 0x0DD]).integers(len(strangers)))]

    def images(self, number: int) -> dict[str, np.ndarray]:
        """What one of them saw, camera -> uint8 (height, width, 3)."""
        return {name: images[number] for name, images in self.frames.items()}

    def save(self, folder: Path) -> None:
        """Write them into a checkpoint folder."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(images)) for name, images in self.frames.items()}
        save_file(tensors, folder / FILE, {"texts": json.dumps(list(self.texts))})

    @classmethod
    def load(cls, folder: Path) -> Others | None:
        """Read them from a checkpoint folder; None where it has none."""
        path = folder / FILE
        if not path.exists():
            return None
        with safe_open(path, "np") as file:
            names = list(file.keys())
            return cls(
                frames={name: file.get_tensor(name) for name in names},
                texts=tuple(json.loads(file.metadata()["texts"])),
            )
