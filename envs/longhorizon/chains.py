"""Skills that make sense one after another: at random, on the way to a goal, and as tasks in a row on one table.

Tasks in a row are CALVIN's protocol (2112.03227).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...symbols import Facts, Literal, Scene, SkillCall, SkillLibrary, Thing
from .domain import place_of
from .families import Errand

TOWER, FULL = 3, {"bowl": 1, "drawer": 1}
"""Cubes at most in a tower, and things in a bowl or in the drawer before one more is put there, at random."""
CLEARING = ("put_down", "open")
"""What makes other skills possible."""


def sensible(library: SkillLibrary, things: Sequence[Thing], facts: Facts) -> list[SkillCall]:
    """What can be done and does not pile too much up."""
    now = Scene(things=tuple(things), facts=facts)
    return [c for c in library.calls(things) if c.applicable(facts) and _sensible(now, c)]


def draw_skill(
    rng: np.random.Generator, library: SkillLibrary, things: Sequence[Thing], facts: Facts
) -> SkillCall | None:
    """Something that can be done, one kind of skill as likely as another; None where nothing can."""
    options = sensible(library, things, facts)
    names = sorted({call.spec.name for call in options})
    if not names:
        return None
    name = names[int(rng.integers(len(names)))]
    alike = [call for call in options if call.spec.name == name]
    return alike[int(rng.integers(len(alike)))]


def draw_way(
    rng: np.random.Generator, library: SkillLibrary, errand: Errand, *, most: int = 12
) -> list[tuple[Facts, SkillCall]]:
    """A way to one of an errand's goals: each step and the facts before it.

    Steps are drawn, not searched for: one that reaches a part of the goal and leaves the rest within reach, else one
    that clears the table for such a step, else whatever reaches a part, or clears.

    Args:
        rng: Of the way.
        library: What can be done.
        errand: The work; it must have a goal.
        most: Steps after which the way is cut.
    """
    things, facts, way = errand.scene.things, errand.scene.facts, list[tuple[Facts, SkillCall]]()
    goal = errand.goals[int(rng.integers(len(errand.goals)))]
    calls = library.calls(things)

    def held(facts: Facts) -> int:
        return sum((Literal(wanted.pred, wanted.args) in facts) == wanted.value for wanted in goal)

    def able(facts: Facts) -> list[tuple[SkillCall, Facts]]:
        after = [(call, call.apply(facts)) for call in calls if call.applicable(facts)]
        return [(call, then) for call, then in after if then != facts]

    def gains(facts: Facts) -> list[tuple[SkillCall, Facts]]:
        return [(call, then) for call, then in able(facts) if held(then) > held(facts)]

    def sound(facts: Facts) -> list[SkillCall]:
        return [call for call, then in gains(facts) if held(then) == len(goal) or gains(then)]

    while held(facts) < len(goal) and len(way) < most:
        options = sound(facts)
        if not options:
            clears = [(call, then) for call, then in able(facts) if call.spec.name in CLEARING]
            ranked = ([c for c, then in clears if sound(then)], [c for c, _ in gains(facts)], [c for c, _ in clears])
            options = next((found for found in ranked if found), [])
        if not options:
            break
        call = options[int(rng.integers(len(options)))]
        way.append((facts, call))
        facts = call.apply(facts)
    return way


def _sensible(scene: Scene, call: SkillCall) -> bool:
    if call.spec.name in ("place_in", "store"):
        within = [f for f in scene.facts if f.pred == "in" and f.args[1] == call.args[1]]
        return len(within) < FULL[scene.names[call.args[1]].kind]
    if call.spec.name == "stack":
        height, below = 2, call.args[1]
        while scene.names[place := place_of(scene, below)].kind == "cube":
            below, height = place, height + 1
        return height <= TOWER and scene.names[place].kind == "table"
    return True


def draw_chain(rng: np.random.Generator, library: SkillLibrary, scene: Scene, length: int) -> list[SkillCall]:
    """Tasks in a row, each possible after those before it; fewer where nothing more can be done."""
    facts, calls = scene.facts, list[SkillCall]()
    while len(calls) < length:
        call = draw_skill(rng, library, scene.things, facts)
        if call is None:
            break
        facts = call.apply(facts)
        calls.append(call)
    return calls


def task_of(errand: Errand, call: SkillCall) -> Errand:
    """One task of a chain as a piece of work, asked for in the skill's words."""
    meaning = "; ".join(str(literal) for literal in call.success)
    goals = (tuple(call.success),)
    return replace(errand, family="chain", instruction=call.instruction, meaning=meaning, goals=goals, past=())
