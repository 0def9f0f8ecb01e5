"""SuSIE (Black et al. 2023, 2310.10639): a generated image of the near future is the subgoal of a policy that knows no
language. Candidates are ranked by whether they show progress (GHIL-Glue, Hatch et al. 2024, 2410.20018)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...errors import ConfigError
from ...vla.generative.generator import Guidance
from ...vla.generative.system import SubgoalSystem
from .base import ImageSubgoal
from .generated import GeneratedPlanner
from .imagine import Futures, Imaginer


class VisualPlanner(GeneratedPlanner):
    """Proposes images.

    Args:
        system, guidance, candidates, rank, shuffle: See `GeneratedPlanner`.
        editor: Makes what edits images in place of the system's own editor (`DiffusersEditor`); null for its own.
        horizon: Steps that a subgoal is pursued; null for as many as it lies ahead.
    """

    name = "visual"

    def __init__(
        self,
        *,
        system: SubgoalSystem,
        guidance: Guidance | None = None,
        candidates: int = 2,
        rank: bool = True,
        editor: Callable[..., Imaginer] | None = None,
        horizon: int | None = None,
        shuffle: str = "none",
    ) -> None:
        super().__init__(
            system=system, guidance=guidance, candidates=candidates, rank=rank, imaginer=editor, shuffle=shuffle
        )
        if horizon is not None and horizon < 1:
            raise ConfigError(f"expected a horizon of at least 1 step, got {horizon}")
        self.horizon = horizon

    def subgoal(self, futures: Futures, number: int, text: str) -> ImageSubgoal:
        """The last frame of a future."""
        images = {name: np.ascontiguousarray(frames[number, -1]) for name, frames in futures.frames.items()}
        ahead = futures.steps * len(next(iter(futures.frames.values()))[number])
        return ImageSubgoal(images=images, horizon=self.horizon or ahead, text=text)
