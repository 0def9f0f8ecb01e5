"""What a policy is: something that answers observations of several robots (lanes) with one action each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..spec import ActionChunk, EmbodimentSpec, Guidance, Observation


class ChunkPolicy(Protocol):
    """Predicts a chunk of actions for each observation.

    Attributes:
        embodiment: Who acts.
        action_horizon: Actions h in a chunk.
        noise_dim: Dimensions n of the noise that a chunk is drawn from.
        takes_guidance: Whether chunks can be led to agree with a plan (real-time chunking).
    """

    embodiment: EmbodimentSpec
    action_horizon: int
    noise_dim: int
    takes_guidance: bool

    def predict(
        self,
        observations: Sequence[Observation],
        noise: np.ndarray,
        guidance: Sequence[Guidance | None] | None = None,
    ) -> ActionChunk:
        """Chunks (n, h, a) for n observations and noise (n, h, noise_dim); the same of both give the same chunk.

        Where `guidance` has a plan (h, a), the chunk agrees with it; ConfigError from a policy that cannot.
        """


class Policy(Protocol):
    """Answers observations with single actions. Lanes are independent: what one does never changes another."""

    embodiment: EmbodimentSpec

    def reset(self, lane: int, seed: int) -> None:
        """Forget what lane `lane` did; its draws come from `seed` from now on."""

    def act(self, observations: Sequence[Observation], lanes: Sequence[int]) -> np.ndarray:
        """Actions float32 (n, a) for the observations of some lanes, in the embodiment's units."""
