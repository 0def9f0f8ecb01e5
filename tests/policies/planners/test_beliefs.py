"""What is believed between looks, against the facts that the world itself makes of the same places."""

import numpy as np
import pytest

from brachium.envs.longhorizon.domain import facts_of, tabletop_skills, universe
from brachium.envs.longhorizon.families import sample
from brachium.errors import ConfigError
from brachium.policies.planners.asking import Kinds, holders, question
from brachium.policies.planners.beliefs import Beliefs
from brachium.symbols import Literal, Thing

KINDS = Kinds(things=universe())
DRAWER, TABLE = Thing(name="drawer", kind="drawer"), Thing(name="table", kind="table")
RED, BOWL = Thing(name="red cube", kind="cube"), Thing(name="blue bowl", kind="bowl")


def test_facts_are_those_of_the_world_for_every_kind_of_work():
    for seed in range(60):
        scene = sample(np.random.default_rng(seed)).scene
        places = {f.args[0]: (f.args[1], 1.0) for f in scene.facts if f.pred in ("on", "in")}
        is_open = Literal("open", ("drawer",)) in scene.facts
        beliefs = Beliefs(kinds=KINDS, things=scene.things)
        assert beliefs.look(places, float(is_open), source="test", stamp=0.0).facts == scene.facts


def test_what_is_in_the_closed_drawer_stays_there_whatever_it_looks_like():
    beliefs = Beliefs(kinds=KINDS, things=(RED, BOWL, DRAWER, TABLE))
    beliefs.look({"red cube": ("drawer", 0.9)}, 0.9, source="test", stamp=0.0)
    closed = beliefs.look({"red cube": ("blue bowl", 0.6)}, 0.1, source="test", stamp=1.0)
    assert {Literal("in", ("red cube", "drawer")), Literal("hidden", ("red cube",))} <= closed.facts
    assert closed.confidence[Literal("open", ("drawer",))] == pytest.approx(0.9)
    again = beliefs.look({"red cube": ("table", 0.6)}, 0.2, source="test", stamp=2.0)
    assert Literal("in", ("red cube", "drawer")) in again.facts
    opened = beliefs.look({"red cube": ("table", 0.6)}, 0.8, source="test", stamp=3.0)  # now it is seen again
    assert Literal("on", ("red cube", "table")) in opened.facts
    closed = beliefs.look({"red cube": ("table", 0.6)}, 0.1, source="test", stamp=4.0)
    assert Literal("on", ("red cube", "table")) in closed.facts


def test_what_is_in_the_hand_is_on_nothing():
    scene = Beliefs(kinds=KINDS, things=(RED, TABLE)).look({"red cube": ("gripper", 1.0)}, 0.0, source="t", stamp=0.0)
    assert scene.facts == {Literal("clear", ("red cube",)), Literal("clear", ("table",))} & scene.facts
    assert not [f for f in scene.facts if f.pred in ("on", "in", "open")]


def test_every_skills_success_can_be_asked_about():
    library, things = tabletop_skills(), universe()
    for call in library.calls([t for t in things if t.color in ("red", "blue", "")]):
        for literal in call.success:
            text, answers, right = question(literal, things, KINDS)
            assert literal.args[0] in text
            assert answers[right] == (literal.args[1] if len(literal.args) == 2 else "yes")


def test_bad_questions():
    with pytest.raises(ConfigError, match="no question tells"):
        question(Literal("clear", ("red cube",)), (RED, TABLE), KINDS)
    with pytest.raises(ConfigError, match="no question tells"):
        question(Literal("on", ("red cube", "green zone")), (RED, TABLE), KINDS)
    assert holders(RED, (RED, BOWL, TABLE), KINDS) == ("table", "gripper", "blue bowl")


def test_facts_of_is_used_as_the_oracle_with_two_things_in_one_place():
    places = {"red cube": "blue bowl", "green cube": "blue bowl"}
    things = (RED, Thing(name="green cube", kind="cube"), BOWL, TABLE)
    seen = Beliefs(kinds=KINDS, things=things).look(
        {name: (place, 0.8) for name, place in places.items()}, 0.0, source="t", stamp=0.0
    )
    assert seen.facts == facts_of(places, things, False)
