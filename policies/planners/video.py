"""UniPi (Du et al. 2023, 2302.00111): a short generated video is followed frame by frame by inverse dynamics.

The first frames are followed, then another video is made from what is seen (receding horizon); the original's
open-loop execution is ``follow`` = all frames."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...errors import ConfigError
from ...vla.generative.generator import Guidance
from ...vla.generative.system import SubgoalSystem
from .base import VideoSubgoal
from .generated import GeneratedPlanner
from .imagine import Futures, Imaginer


class VideoPlanner(GeneratedPlanner):
    """Proposes videos.

    Args:
        system, guidance, candidates, rank, shuffle: See `GeneratedPlanner`; candidates are ranked by their last frame.
        model: Makes what imagines videos in place of the system's own model (`DiffusersVideo`); null for its own.
        follow: Frames to follow before the next video; null for all.
    """

    name = "video"

    def __init__(
        self,
        *,
        system: SubgoalSystem,
        guidance: Guidance | None = None,
        candidates: int = 2,
        rank: bool = True,
        model: Callable[..., Imaginer] | None = None,
        follow: int | None = 4,
        shuffle: str = "none",
    ) -> None:
        super().__init__(
            system=system, guidance=guidance, candidates=candidates, rank=rank, imaginer=model, shuffle=shuffle
        )
        if follow is not None and follow < 1:
            raise ConfigError(f"expected to follow at least 1 frame, got {follow}")
        self.follow = follow

    def subgoal(self, futures: Futures, number: int, text: str) -> VideoSubgoal:
        """The first frames of a future."""
        frames = {name: np.ascontiguousarray(each[number, : self.follow]) for name, each in futures.frames.items()}
        return VideoSubgoal(frames=frames, steps=futures.steps, text=text)
