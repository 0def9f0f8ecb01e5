"""Detectors of success and of the end: by the literals of the scene, and made to err on purpose."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...errors import ConfigError
from ...spec import Observation
from ...symbols import Scene
from .base import LanguageSubgoal, PlanContext, Subgoal, SuccessDetector, Verdict
from .goals import Unclear
from .search import satisfied
from .symbolic import GoalSource


class SceneOf:
    """The scene as somebody tells it, for example a simulator's truth.

    Args:
        tell: Lane -> scene.
    """

    def __init__(self, tell: Callable[[int], Scene]) -> None:
        self.tell = tell

    def reset(self, lane: int) -> None:
        """There is nothing to forget."""

    def estimate(self, observation: Observation, lane: int) -> Scene:
        """The scene now."""
        return self.tell(lane)


class LiteralSuccess:
    """A skill is reached when the literals that tell so hold in the scene."""

    def check(self, context: PlanContext, subgoal: Subgoal, lane: int) -> Verdict:
        """Whether they hold."""
        if not isinstance(subgoal, LanguageSubgoal) or subgoal.call is None:
            raise ConfigError("only skills of the library have literals that tell their success")
        if context.scene is None:
            raise ConfigError("a check by literals needs to know the scene")
        unmet = context.scene.unmet(subgoal.call.success)
        return Verdict(ok=not unmet, source="literals", detail=", ".join(map(str, unmet)))


class HandAway:
    """A skill is over when another detector says so and the hand is away from the table: cameras see it again, and the
    next skill begins with a free way.

    Args:
        inner: `SuccessDetector`.
        height: Of the tool at least [m].
        axis: Which element of the state is the tool's height.
    """

    def __init__(self, *, inner: SuccessDetector, height: float, axis: int) -> None:
        self.inner, self.height, self.axis = inner, height, axis

    def check(self, context: PlanContext, subgoal: Subgoal, lane: int) -> Verdict:
        """What the other says, once the hand is up."""
        if float(context.observation.state[self.axis]) < self.height:
            return Verdict(ok=False, p=0.0, source="hand", detail="the hand is at work")
        return self.inner.check(context, subgoal, lane)


class LiteralGoal:
    """The work is finished when one alternative of its goal holds in the scene.

    Args:
        goals: What is wanted; where the instruction cannot be followed, it is never finished.
    """

    def __init__(self, *, goals: GoalSource) -> None:
        self.goals = goals

    def check(self, context: PlanContext, lane: int) -> Verdict:
        """Whether it holds."""
        if context.scene is None:
            raise ConfigError("a check by literals needs to know the scene")
        try:
            goals = self.goals(context)
        except Unclear as error:
            return Verdict(ok=False, source="literals", detail=str(error))
        return Verdict(ok=satisfied(context.scene.facts, goals), source="literals")


class Erring:
    """Makes a detector err at known rates: each look is drawn anew, by lane, seed and step.

    Args:
        inner: `SuccessDetector` or `GoalChecker`.
        false_positive: Share of looks that say yes where it is not so.
        false_negative: Share of looks that say no where it is so.
        salt: Tells the draws of several detectors apart.
    """

    def __init__(
        self, *, inner: LiteralSuccess | LiteralGoal, false_positive: float, false_negative: float, salt: int
    ) -> None:
        self.inner, self.false_positive, self.false_negative = inner, false_positive, false_negative
        self.salt = salt

    def check(self, context: PlanContext, *rest: object) -> Verdict:
        """What the detector says, or the contrary."""
        true = self.inner.check(context, *rest)  # type: ignore[arg-type]
        rng = np.random.default_rng([context.seed, context.step, self.salt])
        wrong = rng.random() < (self.false_negative if true.ok else self.false_positive)
        return Verdict(ok=true.ok != wrong, source=f"{true.source}, erring", detail=true.detail)
