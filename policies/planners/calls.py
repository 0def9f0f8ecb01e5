"""The policy of a world without motion: an instruction is the number of a skill."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...spec import EmbodimentSpec, Observation

WAIT = -1.0


class CallPolicy:
    """Answers an instruction with its number, and what is none with `WAIT`.

    Args:
        instructions: Of the skill calls, in the environment's order.
        embodiment: Whose action is that number.
    """

    def __init__(self, *, instructions: Sequence[str], embodiment: EmbodimentSpec) -> None:
        self.embodiment = embodiment
        self._numbers = {text: float(number) for number, text in enumerate(instructions)}

    def reset(self, lane: int, seed: int) -> None:
        """There is nothing to forget."""

    def act(self, observations: Sequence[Observation], lanes: Sequence[int]) -> np.ndarray:
        """Numbers (n, 1)."""
        return np.array([[self._numbers.get(str(o.instruction), WAIT)] for o in observations], np.float32)


def wait(observation: Observation) -> np.ndarray:
    """The action that does nothing (1,)."""
    return np.array([WAIT], np.float32)
