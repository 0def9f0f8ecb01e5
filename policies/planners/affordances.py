"""How likely skills are to succeed now."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import ConfigError
from ...symbols import SkillCall
from .base import PlanContext


class SymbolicAffordance:
    """One where all preconditions hold, `epsilon` where not.

    Args:
        epsilon: What is left to skills whose preconditions do not hold.
    """

    def __init__(self, *, epsilon: float = 0.0) -> None:
        if not 0.0 <= epsilon <= 1.0:
            raise ConfigError(f"expected epsilon from 0 to 1, got {epsilon}")
        self.epsilon = epsilon

    def probabilities(self, context: PlanContext, calls: Sequence[SkillCall]) -> np.ndarray:
        """Probabilities (n,)."""
        if context.scene is None:
            raise ConfigError("affordances by preconditions need to know the scene")
        facts = context.scene.facts
        return np.array([1.0 if call.applicable(facts) else self.epsilon for call in calls])


class PresentAffordance:
    """One where all things are there: what SayCan's open-source tabletop uses instead of a value function."""

    def probabilities(self, context: PlanContext, calls: Sequence[SkillCall]) -> np.ndarray:
        """Probabilities (n,)."""
        if context.scene is None:
            raise ConfigError("affordances by presence need to know the scene")
        names = context.scene.names
        return np.array([float(all(name in names for name in call.args)) for call in calls])
