"""Planners that think in literals: search over skills, and fixed lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...errors import ConfigError
from ...symbols import SkillCall, SkillLibrary
from .base import Ask, Candidate, Done, Infeasible, LanguageSubgoal, PlanContext, Proposal, Subgoal, unclear
from .goals import IMPOSSIBLE, Unclear
from .search import Goals, search

GoalSource = Callable[[PlanContext], Goals]
"""Says what an instruction comes to, at the time it was given; raises `Unclear` where it cannot be followed."""


class SymbolicPlanner:
    """Searches a shortest plan from the scene as it is now to the goal, and proposes its first skill.

    Nothing of an earlier plan is kept: whatever befalls the work, the plan begins at what is there.

    Args:
        library: What can be done.
        goals: What is wanted.
        expansions: States that a search looks at before it gives up being optimal.
    """

    name = "symbolic"

    def __init__(self, *, library: SkillLibrary, goals: GoalSource, expansions: int = 3000) -> None:
        self.library, self.goals, self.expansions = library, goals, expansions

    def plan(self, context: PlanContext) -> tuple[SkillCall, ...] | Ask | Infeasible:
        """The whole plan; empty where the goal is reached."""
        if context.scene is None:
            raise ConfigError(
                "the symbolic planner needs to know the scene: give the runner something that estimates it"
            )
        try:
            goals = self.goals(context)
        except Unclear as error:
            return unclear(error)
        found = search(self.library, context.scene, goals, expansions=self.expansions)
        if found.calls is None:
            sure = "no skills of this robot lead there"
            return Infeasible(kind=IMPOSSIBLE, reason=sure if found.optimal else "no plan was found in time")
        return found.calls

    def propose(self, context: PlanContext) -> Proposal:
        """The plan's first skill; `Done` where nothing is left to do."""
        plan = self.plan(context)
        if isinstance(plan, (Ask, Infeasible)):
            return _single(plan)
        raw = "; ".join(call.instruction for call in plan)
        if not plan:
            return _single(Done(reason="every literal of the goal holds"))
        return _single(LanguageSubgoal(text=plan[0].instruction, call=plan[0]), raw)


class ScriptPlanner:
    """A fixed list of skills, each once it was reached; a skill that failed is tried again.

    Args:
        library: What can be done.
        script: Calls such as ``place_in(red cube, blue bowl)``.
    """

    name = "script"

    def __init__(self, *, library: SkillLibrary, script: Sequence[str]) -> None:
        self.calls = tuple(library.parse(text) for text in script)

    def propose(self, context: PlanContext) -> Proposal:
        """The first skill of the list that was not reached yet."""
        reached = sum(record.outcome == "success" for record in context.records)
        if reached >= len(self.calls):
            return _single(Done(reason="the list is at its end"))
        call = self.calls[reached]
        return _single(LanguageSubgoal(text=call.instruction, call=call))


def _single(subgoal: Subgoal, raw: str = "") -> Proposal:
    return Proposal(candidates=(Candidate(subgoal=subgoal),), raw=raw)
