"""The gate between planners and robots: what is proposed is checked, cheapest first, and refused with a reason."""

from __future__ import annotations

from ...errors import ConfigError
from ...symbols import Scene
from .base import Affordance, LanguageSubgoal, PlanContext, StepRecord, Subgoal, Violation


class Gate:
    """Checks subgoals of language against the scene.

    Args:
        affordance: What says how likely a skill is to succeed; none is asked when None.
        threshold: Least probability.
        repeats: A skill may be tried this often while the scene stays as it is.
        open_vocabulary: Let through texts that are no skill of the library.
    """

    def __init__(
        self,
        *,
        affordance: Affordance | None = None,
        threshold: float = 0.1,
        repeats: int = 6,
        open_vocabulary: bool = False,
    ) -> None:
        if repeats < 1:
            raise ConfigError(f"expected repeats of at least 1, got {repeats}")
        self.affordance, self.threshold, self.repeats = affordance, threshold, repeats
        self.open_vocabulary = open_vocabulary

    def check(self, context: PlanContext, subgoal: Subgoal) -> tuple[Violation, ...]:
        """Why not; empty where nothing speaks against it."""
        if not isinstance(subgoal, LanguageSubgoal):
            return ()
        if subgoal.call is None:
            if self.open_vocabulary:
                return ()
            return (Violation(kind="unknown_skill", text=f"{subgoal.text!r} is no skill of this robot"),)
        found: list[Violation] = []
        if context.scene is not None:
            found = _against_scene(subgoal, context.scene)
        if not found and self.affordance is not None:
            p = float(self.affordance.probabilities(context, [subgoal.call])[0])
            if p < self.threshold:
                found.append(Violation(kind="affordance", text=f"{subgoal.text} would hardly succeed now ({p:.2f})"))
        if not found and self._tried(context, subgoal) >= self.repeats:
            text = f"{subgoal.text} was tried {self.repeats} times and nothing changed"
            found.append(Violation(kind="loop", text=text))
        return tuple(found)

    @staticmethod
    def _tried(context: PlanContext, subgoal: LanguageSubgoal) -> int:
        """How often it was tried in a row from a scene like the present one."""
        count = 0
        for record in reversed(context.records):
            same = isinstance(record.subgoal, LanguageSubgoal) and record.subgoal.call == subgoal.call
            if not same or context.scene is None or not _same_scene(record, context.scene):
                break
            count += 1
        return count


def _same_scene(record: StepRecord, scene: Scene) -> bool:
    return record.before is not None and record.before.facts == scene.facts


def _against_scene(subgoal: LanguageSubgoal, scene: Scene) -> list[Violation]:
    assert subgoal.call is not None
    missing = [name for name in subgoal.call.args if name not in scene.names]
    if missing:
        return [Violation(kind="unknown_object", text=f"there is no {name}") for name in missing]
    for param, name in zip(subgoal.call.spec.params, subgoal.call.args):
        if scene.names[name].kind not in param.kinds:
            return [Violation(kind="unknown_object", text=f"the {name} is no {' or '.join(param.kinds)}")]
    return [
        Violation(kind="precondition", text=f"{subgoal.text} needs {literal}")
        for literal in scene.unmet(subgoal.call.pre)
    ]
