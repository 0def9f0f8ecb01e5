"""Affordances and success as a trained judge of executed skills sees them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import ConfigError
from ...symbols import SkillCall
from ...vla.judge import OUTPUTS, Judge
from .base import LanguageSubgoal, PlanContext, Subgoal, Verdict
from .seeing import views


class LearnedAffordance:
    """How likely a skill is to succeed from what is seen: SayCan's value function.

    Args:
        judge: `Judge`, or its folder.
    """

    def __init__(self, *, judge: Judge | str) -> None:
        self.judge = Judge.load(judge) if isinstance(judge, str) else judge

    def probabilities(self, context: PlanContext, calls: Sequence[SkillCall]) -> np.ndarray:
        """Probabilities (n,)."""
        return _judged(self.judge, context, [call.instruction for call in calls])[:, OUTPUTS.index("can")]


class LearnedSuccess:
    """Whether a skill is done, by what is seen.

    Args:
        judge: `Judge`, or its folder.
        threshold: Least probability.
    """

    def __init__(self, *, judge: Judge | str, threshold: float = 0.5) -> None:
        self.judge, self.threshold = Judge.load(judge) if isinstance(judge, str) else judge, threshold

    def check(self, context: PlanContext, subgoal: Subgoal, lane: int) -> Verdict:
        """From the picture of this moment alone."""
        if not isinstance(subgoal, LanguageSubgoal):
            raise ConfigError("the judge knows skills in words only")
        p = float(_judged(self.judge, context, [subgoal.text])[0, OUTPUTS.index("done")])
        return Verdict(ok=p > self.threshold, p=p, source="learned")


def _judged(judge: Judge, context: PlanContext, texts: Sequence[str]) -> np.ndarray:
    images = views(context.observation, judge.model.cameras)
    return judge(images, np.asarray(context.observation.state, np.float32), texts)
