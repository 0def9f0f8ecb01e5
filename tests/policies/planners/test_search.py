"""Search over skills against breadth-first search, and goals that no skill reaches."""

from collections import deque

import numpy as np
import pytest

from brachium.envs.longhorizon.domain import facts_of, tabletop_skills
from brachium.envs.longhorizon.families import EVERY, sample
from brachium.policies.planners.search import satisfied, search
from brachium.symbols import Scene, Thing, literals

LIBRARY = tabletop_skills()


def breadth_first(scene, goals, deepest=4):
    """Length of a shortest plan by trying everything; None where there is none up to `deepest`."""
    calls, queue, seen = LIBRARY.calls(scene.things), deque([(scene.facts, 0)]), {scene.facts}
    while queue:
        facts, depth = queue.popleft()
        if satisfied(facts, goals):
            return depth
        if depth < deepest:
            for call in calls:
                if call.applicable(facts) and (after := call.apply(facts)) not in seen:
                    seen.add(after)
                    queue.append((after, depth + 1))
    return None


def table(places, drawer_open=False, extra=()):
    names = dict.fromkeys([*places, *places.values(), "table", *extra])
    things = tuple(Thing(name=n, kind=n.split()[-1]) for n in names)
    return Scene(things=things, facts=facts_of(places, things, drawer_open))


def test_plans_are_as_short_as_those_of_breadth_first_search():
    rng, tried = np.random.default_rng(0), 0
    kinds = ["cube", "cube", "ball"]
    while tried < 40:
        colors = rng.permutation(["red", "green", "blue"])
        names = [f"{c} {k}" for c, k in zip(colors, kinds)]
        spots = ["table", "red bowl", "blue zone", "drawer"]

        def draw(names=names, spots=spots):
            places, used = {}, set()
            for name in names:
                options = [s for s in spots if s != "blue zone" or s not in used]
                if name.endswith("cube"):
                    options += [n for n in names if n.endswith("cube") and places.get(n) == "table" and n not in used]
                place = options[int(rng.integers(len(options)))]
                places[name] = place
                used.add(place)
            return places

        scene = table(draw(), bool(rng.random() < 0.5), spots)
        wanted = table(draw(), bool(rng.random() < 0.5), spots).facts
        goal = tuple(f for f in wanted if f.pred in ("on", "in"))
        goal += literals("open(drawer)" if rng.random() < 0.5 else "not open(drawer)")
        best = breadth_first(scene, (goal,))
        if best is None:
            continue
        tried += 1
        found = search(LIBRARY, scene, (goal,))
        assert found.optimal
        assert len(found.calls) == best
        facts = scene.facts
        for call in found.calls:
            assert call.applicable(facts)
            facts = call.apply(facts)
        assert satisfied(facts, (goal,))


@pytest.mark.parametrize("family", EVERY)
def test_every_drawn_work_can_be_done(family):
    rng = np.random.default_rng(11)
    for _ in range(10):
        errand = sample(rng, families=(family,))
        found, facts = search(LIBRARY, errand.scene, errand.goals), errand.scene.facts
        for call in found.calls:
            assert call.applicable(facts)
            facts = call.apply(facts)
        assert satisfied(facts, errand.goals)


def test_the_nearest_of_several_alternatives_is_taken():
    scene = table({"red cube": "table", "blue cube": "red bowl"}, extra=["green zone"])
    far = literals("on(red cube, green zone)", "on(blue cube, table)")
    near = literals("in(red cube, red bowl)")
    assert [c.key for c in search(LIBRARY, scene, (far, near)).calls] == ["place_in(red cube, red bowl)"]


def test_effects_that_depend_on_what_does_not_hold_yet_are_found():
    scene = table({"red cube": "table", "blue cube": "table"}, extra=["drawer"])
    found = search(LIBRARY, scene, (literals("hidden(red cube)"),))
    assert [c.spec.name for c in found.calls] == ["open", "store", "close"]
    assert found.optimal


def test_nothing_is_to_be_done_where_the_goal_holds():
    scene = table({"red cube": "red bowl"})
    found = search(LIBRARY, scene, (literals("in(red cube, red bowl)"),))
    assert found.calls == ()
    assert found.optimal


def test_what_no_skill_can_make_true_is_told_without_a_search():
    scene = table({"red cube": "table"}, extra=["red bowl"])
    found = search(LIBRARY, scene, (literals("on(red bowl, table)"),))
    assert found.calls is None
    assert found.optimal
    assert found.expanded == 0


def test_goals_that_exclude_each_other_are_told_after_a_full_search():
    scene = table({"red cube": "table", "blue cube": "table"})
    goal = literals("on(red cube, blue cube)", "on(blue cube, red cube)")
    found = search(LIBRARY, scene, (goal,))
    assert found.calls is None
    assert found.optimal, "all states were looked at"


def test_with_too_few_expansions_the_plan_is_good_but_not_proven_shortest():
    rng = np.random.default_rng(2)
    errand = sample(rng, families=("gather",))
    found = search(LIBRARY, errand.scene, errand.goals, expansions=1)
    assert not found.optimal
    errand = sample(rng, families=("swap",))
    best, hasty = (search(LIBRARY, errand.scene, errand.goals, expansions=n) for n in (3000, 8))
    assert best.optimal
    if hasty.calls is not None and not hasty.optimal:
        assert len(hasty.calls) >= len(best.calls)
