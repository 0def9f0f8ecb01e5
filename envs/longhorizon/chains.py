"""Skills that make sense one after another, and tasks in a row on one table (CALVIN's protocol, 2112.03227)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...symbols import Facts, Scene, SkillCall, SkillLibrary, Thing
from .domain import place_of
from .families import Errand

TOWER, FULL = 3, {"bowl": 1, "drawer": 1}
"""Cubes at most in a tower, and things in a bowl or in the drawer before one more is put there."""


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
