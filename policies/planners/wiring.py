"""Planners put together: each part is given those of the others that its constructor names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .base import GoalChecker, PlanContext, SuccessDetector
from .calls import CallPolicy, wait
from .detectors import Erring, LiteralGoal, LiteralSuccess, SceneOf
from .evidence import Evidence
from .gate import Gate
from .goals import goals_of
from .lm.base import LanguageModel
from .runner import HierarchicalRunner
from .search import Goals

Factory = Callable[..., Any]


def wired(factory: Factory, parts: Mapping[str, Any]) -> Any:
    """Make a part, given those of `parts` that its constructor names."""
    wanted = set(inspect.signature(factory).parameters) - set(getattr(factory, "keywords", ()))  # what YAML binds stays
    return factory(**{name: part for name, part in parts.items() if name in wanted and part is not None})


def assemble(
    world: Any,
    *,
    planner: Factory,
    goals: Factory | None,
    lm: LanguageModel | None,
    affordance: Factory | None,
    fallback: Factory | None,
    gate: Factory | None,
    options: Mapping[str, Any],
    look_error: float,
) -> tuple[HierarchicalRunner, dict[str, Any]]:
    """A runner in a symbolic world, and the parts that it is made of."""
    parts: dict[str, Any] = {"library": world.library, "lm": lm}
    parts["goals"] = wired(goals, parts) if goals is not None else TrueGoals(world)
    parts["affordance"] = wired(affordance, parts) if affordance is not None else None
    success: SuccessDetector = LiteralSuccess()
    goal: GoalChecker = LiteralGoal(goals=parts["goals"])
    if look_error > 0.0:
        success = Erring(inner=LiteralSuccess(), false_positive=look_error, false_negative=look_error, salt=1)
        inner = LiteralGoal(goals=parts["goals"])
        goal = Erring(inner=inner, false_positive=look_error, false_negative=look_error, salt=2)
    rate_of_error = max(look_error, 0.01)
    runner = HierarchicalRunner(
        planner=wired(planner, parts),
        policy=CallPolicy(instructions=world.instructions, embodiment=world.spec_embodiment),
        hold=wait,
        scenes=SceneOf(lambda lane: world.scene),
        detector=success,
        goal=goal,
        gate=wired(gate, parts) if gate is not None else Gate(),
        fallback=wired(fallback, parts) if fallback is not None else None,
        evidence=Evidence(false_positive=rate_of_error, false_negative=rate_of_error),
        **options,
    )
    made = {"planner": runner.planner, "goals": parts["goals"], "affordance": parts["affordance"]}
    return runner, made | {"fallback": runner.fallback, "gate": runner.gate, "lm": lm}


class TrueGoals:
    """What an instruction comes to, as whoever drew it knows."""

    def __init__(self, world: Any) -> None:
        self.world = world

    def __call__(self, context: PlanContext) -> Goals:
        """Alternatives of literals."""
        assert context.begun is not None
        return goals_of(self.world.errand.meaning, context.begun, context.past)
