"""What a policy is: something that answers observations of several robots (lanes) with one action each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..spec import ActionChunk, EmbodimentSpec, Observation


class ChunkPolicy(Protocol):
    """Predicts a chunk of actions for each observation.

    Attributes:
        embodiment: Who acts.
        action_horizon: Actions h in a chunk.
        noise_dim: Dimensions n of the noise that a chunk is drawn from.
    """

    embodiment: EmbodimentSpec
    action_horizon: int
    noise_dim: int

    def predict(self, observations: Sequence[Observation], noise: np.ndarray) -> ActionChunk:
        """Chunks (n, h, a) for n observations and noise (n, h, noise_dim); the same of both give the same chunk."""


class Policy(Protocol):
    """Answers observations with single actions. Lanes are independent: what one does never changes another."""

    embodiment: EmbodimentSpec

    def reset(self, lane: int, seed: int) -> None:
        """Forget what lane `lane` did; its draws come from `seed` from now on."""

    def act(self, observations: Sequence[Observation], lanes: Sequence[int]) -> np.ndarray:
        """Actions float32 (n, a) for the observations of some lanes, in the embodiment's units."""
