"""Best-first search over skills: shortest plans for goals, and whether there is one at all."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...symbols import Effect, Facts, Literal, Scene, SkillCall, SkillLibrary

Goals = tuple[tuple[Literal, ...], ...]
"""Alternatives: any one of them, in all its literals, is wanted."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search came to.

    Attributes:
        calls: The plan; None where none was found.
        optimal: Whether no shorter plan exists; where there is none, whether that is sure.
        expanded: States that were looked at.
    """

    calls: tuple[SkillCall, ...] | None
    optimal: bool
    expanded: int


def satisfied(facts: Facts, goals: Goals) -> bool:
    """Whether one of the alternatives holds."""
    return any(not _unmet(facts, goal) for goal in goals)


def search(library: SkillLibrary, scene: Scene, goals: Goals, *, expansions: int = 3000) -> Search:
    """The shortest plan that makes one of the goals true (A*; Hart, Nilsson and Raphael 1968).

    The distance to go is estimated by the goal's literals that do not hold, divided by how many of them one skill can
    make true; that never overestimates, so that the first plan found is a shortest one. Only skills are tried that can
    bring the goal nearer, or make possible one that can. Where `expansions` states do not suffice, the same estimate is
    followed greedily.

    Args:
        library: What can be done.
        scene: Where it begins.
        goals: What is wanted.
        expansions: States to look at before optimality is given up.
    """
    useful = relevant(library, scene, goals)
    if useful is None:
        return Search(calls=None, optimal=True, expanded=0)
    first = _best_first(scene.facts, useful, goals, weight=1.0, expansions=expansions)
    if first.calls is not None or first.optimal:
        return first
    second = _best_first(scene.facts, useful, goals, weight=5.0, expansions=expansions)
    return Search(calls=second.calls, optimal=False, expanded=first.expanded + second.expanded)


def _best_first(start: Facts, calls: Sequence[SkillCall], goals: Goals, *, weight: float, expansions: int) -> Search:
    strides = [_stride(calls, goal) for goal in goals]

    def estimate(facts: Facts) -> float:
        return min(len(_unmet(facts, goal)) / stride for goal, stride in zip(goals, strides))

    counter = itertools.count()
    queue = [(weight * math.ceil(estimate(start)), next(counter), start)]
    came: dict[Facts, tuple[Facts, SkillCall] | None] = {start: None}
    cost = {start: 0}
    closed: set[Facts] = set()
    while queue:
        _, _, facts = heapq.heappop(queue)
        if facts in closed:
            continue
        if satisfied(facts, goals):
            return Search(calls=_path(came, facts), optimal=weight <= 1.0, expanded=len(closed))
        if len(closed) >= expansions:
            return Search(calls=None, optimal=False, expanded=len(closed))
        closed.add(facts)
        for call in calls:
            if call.applicable(facts):
                after = call.apply(facts)
                if after not in cost or cost[facts] + 1 < cost[after]:
                    cost[after] = cost[facts] + 1
                    came[after] = (facts, call)
                    ahead = weight * math.ceil(estimate(after))
                    heapq.heappush(queue, (cost[after] + ahead, next(counter), after))
    return Search(calls=None, optimal=True, expanded=len(closed))


def _path(came: dict[Facts, tuple[Facts, SkillCall] | None], facts: Facts) -> tuple[SkillCall, ...]:
    calls = []
    while (step := came[facts]) is not None:
        facts, call = step
        calls.append(call)
    return tuple(reversed(calls))


def relevant(library: SkillLibrary, scene: Scene, goals: Goals) -> list[SkillCall] | None:
    """Calls that a shortest plan may hold; None where some goal literal can never be made true in any alternative.

    A call is relevant if it makes true what is wanted: a literal of a goal, or a precondition of a relevant call that
    does not hold yet or that a relevant call may undo.
    """
    calls = library.calls(scene.things)
    wanted = {literal for goal in goals for literal in goal}
    possible = set(scene.facts)
    chosen: dict[SkillCall, set[Literal]] = {}
    while True:
        size = (len(chosen), len(wanted), len(possible))
        changes = [_changes(call, frozenset(possible)) for call in calls]
        for call, changed in zip(calls, changes):
            if call in chosen or not wanted.isdisjoint(changed):
                chosen[call] = changed
        for changed in chosen.values():
            possible |= {literal for literal in changed if literal.value}
        undone = {-literal for changed in chosen.values() for literal in changed}
        for call in chosen:
            wanted |= {p for p in call.pre if not scene.holds(p) or p in undone}
        within_reach = set().union(*changes) if changes else set()
        for literal in [w for w in wanted if not scene.holds(w) and w not in within_reach]:
            for call in calls:  # only under conditions that do not hold yet: they are wanted with it
                for effect in call.effects:
                    wanted |= {p for p in _conditions(effect, literal) if not scene.holds(p)}
        if size == (len(chosen), len(wanted), len(possible)):
            break
    reachable = {literal for changed in chosen.values() for literal in changed}
    if not any(all(scene.holds(p) or p in reachable for p in goal) for goal in goals):
        return None
    return list(chosen)


def _conditions(effect: Effect, literal: Literal) -> list[Literal]:
    """What must hold for an effect to make a literal true, as far as its variables are bound by it."""
    if not effect.when or not _could_be(effect.literal, literal):
        return []
    values = {a: b for a, b in zip(effect.literal.args, literal.args) if a.startswith("?")}
    bound = [w.bind(values) for w in effect.when]
    return [w for w in bound if not any(a.startswith("?") for a in w.args)]


def _changes(call: SkillCall, possible: Facts) -> set[Literal]:
    """What a call may make true or false in some state whose facts are among `possible`."""
    found: set[Literal] = set()
    for effect in call.effects:
        positive = Effect(literal=effect.literal, when=tuple(w for w in effect.when if w.value))
        found |= set(positive.bindings(possible))
    return found


def _stride(calls: Sequence[SkillCall], goal: Sequence[Literal]) -> int:
    """The most literals of a goal that one call makes true by what it always does."""
    most = 1
    for call in calls:
        made = {effect.literal for effect in call.effects if not effect.when}
        conditional = [effect.literal for effect in call.effects if effect.when]
        count = 0
        for literal in goal:
            if literal in made or any(_could_be(pattern, literal) for pattern in conditional):
                count += 1
        most = max(most, count)
    return most


def _could_be(pattern: Literal, literal: Literal) -> bool:
    if (pattern.pred, pattern.value, len(pattern.args)) != (literal.pred, literal.value, len(literal.args)):
        return False
    return all(a.startswith("?") or a == b for a, b in zip(pattern.args, literal.args))


def _unmet(facts: Facts, goal: Sequence[Literal]) -> list[Literal]:
    return [p for p in goal if (Literal(p.pred, p.args) in facts) != p.value]


class OfLength:
    """Says whether a piece of work takes so many skills at least and at most, by the shortest plan.

    Args:
        least, most: Skills.
    """

    def __init__(self, *, least: int = 1, most: int = 99) -> None:
        self.least, self.most = least, most

    def __call__(self, library: SkillLibrary, work: Any) -> bool:
        """Whether `work`, with a ``scene`` and ``goals``, does."""
        found = search(library, work.scene, work.goals).calls
        return found is not None and self.least <= len(found) <= self.most

    def __repr__(self) -> str:
        return f"OfLength({self.least}, {self.most})"
