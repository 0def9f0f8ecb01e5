"""PDDL as other planners read it, and goals of LIBERO."""

import re

import numpy as np
import pytest

from brachium.envs.longhorizon.domain import tabletop_skills
from brachium.envs.longhorizon.families import sample
from brachium.errors import ConfigError
from brachium.policies.planners.pddl import _tree, bddl_goal, to_pddl
from brachium.policies.planners.search import search
from brachium.symbols import literals

KITCHEN = """
(define (problem LIBERO_Kitchen_Tabletop_Manipulation)
  (:domain robosuite)
  (:language put the black bowl in the bottom drawer and close it) ; a comment (not a bracket
  (:objects akita_black_bowl_1 - akita_black_bowl)
  (:init (On akita_black_bowl_1 kitchen_table_init_region))
  (:goal
    (And (In akita_black_bowl_1 white_cabinet_1_bottom_region) (Close white_cabinet_1_bottom_region)
         (Not (TurnOn flat_stove_1))))
)
"""


def test_goals_of_libero_are_literals():
    assert bddl_goal(KITCHEN) == literals(
        "in(akita_black_bowl_1, white_cabinet_1_bottom_region)",
        "close(white_cabinet_1_bottom_region)",
        "not turnon(flat_stove_1)",
    )
    assert bddl_goal("(On a b)") == literals("on(a, b)")


@pytest.mark.parametrize(
    "text", ["", "(And (On a b)", "(On a b))", "(Or (On a b) (On b a))", "(Not (And (A x) (B y)))", "(On (a) b)", "()"]
)
def test_what_is_no_goal_is_refused(text):
    with pytest.raises(ConfigError):
        bddl_goal(text)


def plan_length(domain, problem, deepest):
    """A small PDDL planner of its own: reads the two texts and searches breadth first."""
    domain, problem = _tree(domain), _tree(problem)

    def section(tree, name):
        return next(part[1:] for part in tree if isinstance(part, list) and part[0] == name)

    def typed(words):
        found, names = [], []
        words = list(words)
        while words:
            word = words.pop(0)
            if word == "-":
                kind = words.pop(0)
                kinds = kind[1:] if isinstance(kind, list) else [kind]
                found += [(n, kinds) for n in names]
                names = []
            else:
                names.append(word)
        return found

    above = dict(typed(section(domain, ":types")))

    def is_a(kind, kinds):
        return "object" in kinds or kind in kinds or (kind in above and is_a(above[kind][0], kinds))

    things = typed(section(problem, ":objects")) + typed(section(domain, ":constants"))
    start = frozenset(tuple(atom) for atom in section(problem, ":init"))
    (goal,) = section(problem, ":goal")

    def holds(tree, facts, at):
        if tree[0] == "and":
            return all(holds(part, facts, at) for part in tree[1:])
        if tree[0] == "or":
            return any(holds(part, facts, at) for part in tree[1:])
        if tree[0] == "not":
            return not holds(tree[1], facts, at)
        words = tuple(at.get(word, word) for word in tree)
        return words[1] == words[2] if words[0] == "=" else words in facts

    def change(tree, facts, at, added, removed):
        if tree[0] == "and":
            for part in tree[1:]:
                change(part, facts, at, added, removed)
        elif tree[0] == "forall":
            for values in assignments(typed(tree[1])):
                change(tree[2], facts, {**at, **values}, added, removed)
        elif tree[0] == "when":
            if holds(tree[1], facts, at):
                change(tree[2], facts, at, added, removed)
        elif tree[0] == "not":
            removed.add(tuple(at.get(word, word) for word in tree[1]))
        else:
            added.add(tuple(at.get(word, word) for word in tree))

    def assignments(params):
        if not params:
            yield {}
            return
        (name, kinds), rest = params[0], params[1:]
        for thing, kind in things:
            if is_a(kind[0], kinds):
                for other in assignments(rest):
                    yield {name: thing, **other}

    actions = [dict(zip(part[2::2], part[3::2])) for part in domain if isinstance(part, list) and part[0] == ":action"]
    grounded = [(a, at) for a in actions for at in assignments(typed(a[":parameters"]))]
    layer, seen = {start}, {start}
    for depth in range(deepest + 1):
        if any(holds(goal, facts, {}) for facts in layer):
            return depth
        following = set()
        for facts in layer:
            for action, at in grounded:
                if holds(action[":precondition"], facts, at):
                    added, removed = set(), set()
                    change(action[":effect"], facts, at, added, removed)
                    following.add((facts - removed) | added)
        layer = following - seen
        seen |= layer
    return None


@pytest.mark.parametrize("family", ["store", "swap", "replace", "drawer", "single"])
def test_a_pddl_planner_finds_plans_of_the_same_length(family):
    library, tried = tabletop_skills(), 0
    rng = np.random.default_rng(5)
    while tried < 2:
        errand = sample(rng, families=(family,))
        best = search(library, errand.scene, errand.goals)
        if len(best.calls) <= 2:
            tried += 1
            assert plan_length(*to_pddl(library, errand.scene, errand.goals), deepest=2) == len(best.calls)
        elif family in ("swap", "store"):
            tried += 1
            assert plan_length(*to_pddl(library, errand.scene, errand.goals), deepest=1) is None


def test_alternatives_are_a_disjunction():
    errand = sample(np.random.default_rng(1), families=("leave",))
    _, problem = to_pddl(tabletop_skills(), errand.scene, errand.goals)
    assert len(re.findall(r"\(and ", problem)) == len(errand.goals)
    assert "(:goal (or " in problem
