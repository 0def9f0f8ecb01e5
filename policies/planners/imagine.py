"""What imagines futures for planners that propose pictures: a model trained here, or one of another package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ...errors import ConfigError
from ...vla.generative.frames import shrink
from ...vla.generative.generator import Guidance
from ...vla.generative.reading import Reading
from ...vla.generative.system import SubgoalSystem


@dataclass(frozen=True, kw_only=True)
class Futures:
    """Imagined futures of one moment.

    Attributes:
        frames: Camera -> uint8 (count, f, height, width, 3), the nearest frame first.
        steps: Steps of control from one frame to the next.
    """

    frames: Mapping[str, np.ndarray]
    steps: int

    def __len__(self) -> int:
        return len(next(iter(self.frames.values())))


class Imaginer(Protocol):
    """Imagines futures."""

    def imagine(self, images: Mapping[str, np.ndarray], text: str, count: int, seed: Sequence[int]) -> Futures:
        """`count` futures of what is seen now, camera -> uint8 (height, width, 3), if `text` is done; the same seed
        gives the same."""


class NativeImaginer:
    """Futures of a generator that was trained here.

    Args:
        system: With its generator and reader.
        guidance: How they are drawn.
    """

    def __init__(self, system: SubgoalSystem, guidance: Guidance) -> None:
        self.system, self.guidance = system, guidance

    def imagine(self, images: Mapping[str, np.ndarray], text: str, count: int, seed: Sequence[int]) -> Futures:
        """See `Imaginer`."""
        model, cameras = self.system.generator, self.system.cameras
        present, reading = observe(self.system, images, text)
        index = torch.zeros(count, dtype=torch.long)
        draws = torch.Generator().manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
        noise = model.noise(count, draws)
        with torch.autocast("cpu", torch.bfloat16):  # as it was trained, and half the time
            found = model.sample(present[index], reading.rows(index), noise, self.guidance)
        return Futures(frames={name: found[:, :, k].numpy() for k, name in enumerate(cameras)}, steps=model.steps)


def stacked(system: SubgoalSystem, images: Mapping[str, np.ndarray]) -> torch.Tensor:
    """What all cameras see, uint8 (1, n, height, width, 3)."""
    cameras = system.embodiment.camera_names
    missing = [name for name in cameras if name not in images]
    if missing:
        raise ConfigError(f"expected images of {list(cameras)}, got {sorted(images)}; missing {missing}")
    return torch.stack([torch.from_numpy(np.ascontiguousarray(images[name])) for name in cameras])[None]


def observe(system: SubgoalSystem, images: Mapping[str, np.ndarray], text: str) -> tuple[torch.Tensor, Reading]:
    """The present, small: uint8 (1, n, size, size, 3), and what a text says about it."""
    full = stacked(system, images)
    return shrink(full[:, list(system.views)], system.generator.size), system.read(full, [text])


def rank(system: SubgoalSystem, images: Mapping[str, np.ndarray], text: str, futures: Futures) -> np.ndarray:
    """Log-probability (count,) that the last frame of each future is progress [nats]."""
    present, reading = observe(system, images, text)
    last = [torch.from_numpy(np.ascontiguousarray(futures.frames[c][:, -1])) for c in system.cameras]
    later = shrink(torch.stack(last, dim=1), system.generator.size)
    index = torch.zeros(len(later), dtype=torch.long)
    return np.asarray(system.progress.score(present[index], later, reading.rows(index)).numpy())
