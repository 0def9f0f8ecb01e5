"""Planners put together: each part is given those of the others that its constructor names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ...symbols import Thing
from ..base import Policy
from .asking import Kinds
from .base import GoalChecker, PlanContext, SuccessDetector
from .calls import CallPolicy, wait
from .detectors import Erring, HandAway, LiteralGoal, LiteralSuccess, SceneOf
from .evidence import Evidence
from .executing import Lifted, ScriptedSkills, holding
from .gate import Gate
from .goals import goals_of
from .lm.base import LanguageModel
from .runner import HierarchicalRunner
from .search import Goals

Factory = Callable[..., Any]
AWAY, FREE = 0.11, 0.14
"""Heights of the tool in a world with physics: from which on a skill may be over, and to which the hand comes up before
the next one [m]."""


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
    policy: Policy | None = None,
    eyes: Factory | None = None,
    detector: Factory | None = None,
) -> tuple[HierarchicalRunner, dict[str, Any]]:
    """A runner in a world of long-horizon work, and the parts that it is made of.

    Args:
        world: Symbolic, kinematic or physical.
        planner, goals, lm, affordance, fallback, gate, options: Of the runner; `options` are its other arguments.
        look_error: Share of looks that the test of the end takes to be wrong; where the truth is looked at, looks are
            made wrong as often.
        policy: Carries out skills; in a physical world scripted experts do where None.
        eyes: Reads scenes; the truth is told where None.
        detector: Sees whether a skill is done; the literals of the scene say so where None.
    """
    physical = hasattr(world, "expert_action")
    parts: dict[str, Any] = {"library": world.library, "lm": lm, "kinds": Kinds(things=universe_of(world))}
    parts["goals"] = wired(goals, parts) if goals is not None else TrueGoals(world)
    parts["affordance"] = wired(affordance, parts) if affordance is not None else None
    scenes = SceneOf(lambda lane: world.scene) if eyes is None else wired(eyes, parts)
    done: SuccessDetector = LiteralSuccess() if detector is None else wired(detector, parts)
    goal: GoalChecker = LiteralGoal(goals=parts["goals"])
    if look_error > 0.0 and not physical:
        done = Erring(inner=LiteralSuccess(), false_positive=look_error, false_negative=look_error, salt=1)
        inner = LiteralGoal(goals=parts["goals"])
        goal = Erring(inner=inner, false_positive=look_error, false_negative=look_error, salt=2)
    if physical:
        axis = world.spec_embodiment.state.names.index("z")
        done = HandAway(inner=done, height=AWAY, axis=axis)
    rate_of_error = max(look_error, 0.01)
    if policy is None:
        embodiment = world.spec_embodiment
        policy = (
            ScriptedSkills(world) if physical else CallPolicy(instructions=world.instructions, embodiment=embodiment)
        )
    if physical:
        policy = Lifted(policy, height=FREE)
    runner = HierarchicalRunner(
        planner=wired(planner, parts),
        policy=policy,
        hold=holding(world.spec_embodiment) if physical else wait,
        scenes=scenes,
        detector=done,
        goal=goal,
        gate=wired(gate, parts) if gate is not None else Gate(),
        fallback=wired(fallback, parts) if fallback is not None else None,
        evidence=Evidence(false_positive=rate_of_error, false_negative=rate_of_error),
        **options,
    )
    made = {"planner": runner.planner, "goals": parts["goals"], "affordance": parts["affordance"]}
    made |= {"eyes": None if eyes is None else scenes, "detector": None if detector is None else done}
    return runner, made | {"fallback": runner.fallback, "gate": runner.gate, "lm": lm}


def universe_of(world: Any) -> tuple[Thing, ...]:
    """Everything that could be on a world's table."""
    return tuple(getattr(world, "universe", ()))


class TrueGoals:
    """What an instruction comes to, as whoever drew it knows."""

    def __init__(self, world: Any) -> None:
        self.world = world

    def __call__(self, context: PlanContext) -> Goals:
        """Alternatives of literals."""
        assert context.begun is not None
        return goals_of(self.world.errand.meaning, context.begun, context.past)
