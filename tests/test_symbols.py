"""Literals, effects and skills."""

import pytest

from brachium.errors import ConfigError
from brachium.symbols import Effect, Literal, Param, Scene, SkillLibrary, SkillSpec, Thing, literals


@pytest.mark.parametrize(
    "text", ["on(red cube, table)", "not open(drawer)", "free()", "near(red cube, blue bowl, green ball)"]
)
def test_literals_are_read_as_they_are_written(text):
    assert str(Literal.parse(text)) == text
    opposite = -Literal.parse(text)
    assert opposite != Literal.parse(text)
    assert -opposite == Literal.parse(text)


@pytest.mark.parametrize("text", ["", "on", "on(a", "on a, b", "on(a)(b)", "on(a) and in(b)", "not", "not not on(a)"])
def test_what_is_no_literal_is_refused(text):
    with pytest.raises(ConfigError, match="expected a literal"):
        Literal.parse(text)


def carry():
    return SkillSpec(
        name="carry",
        params=(Param(name="x", kinds=("cube",)), Param(name="y", kinds=("cube", "table"))),
        instruction="carry the {x} to the {y}",
        pre=literals("clear(?x)", "not heavy(?x)"),
        effects=(
            Effect(literal=Literal("on", ("?x", "?z"), False), when=literals("on(?x, ?z)")),
            Effect(literal=Literal("clear", ("?z",)), when=literals("on(?x, ?z)", "not wet(?z)")),
            Effect(literal=Literal("on", ("?x", "?y"))),
        ),
    )


def test_effects_hold_for_every_value_for_which_their_condition_does():
    call = SkillLibrary([carry()]).call("carry", "a", "b")
    assert call.instruction == "carry the a to the b"
    assert call.key == "carry(a, b)"
    before = frozenset(literals("on(a, c)", "on(a, d)", "wet(d)", "on(e, c)"))
    assert call.apply(before) == frozenset(literals("on(a, b)", "clear(c)", "wet(d)", "on(e, c)"))
    assert call.apply(frozenset()) == frozenset(literals("on(a, b)"))


def test_what_is_made_true_wins_over_what_is_made_false():
    call = SkillLibrary([carry()]).call("carry", "a", "b")
    assert Literal("on", ("a", "b")) in call.apply(frozenset(literals("on(a, b)")))


def test_preconditions_are_those_of_the_things():
    call = SkillLibrary([carry()]).call("carry", "a", "b")
    assert call.applicable(frozenset(literals("clear(a)")))
    assert not call.applicable(frozenset(literals("clear(b)")))
    assert not call.applicable(frozenset(literals("clear(a)", "heavy(a)")))


def test_a_library_grounds_skills_by_kinds_with_different_things():
    things = (Thing(name="a", kind="cube"), Thing(name="b", kind="cube"), Thing(name="t", kind="table"))
    calls = SkillLibrary([carry()]).calls(things)
    assert {call.key for call in calls} == {"carry(a, b)", "carry(b, a)", "carry(a, t)", "carry(b, t)"}


def test_mistakes_are_told():
    library = SkillLibrary([carry()])
    with pytest.raises(ConfigError, match="Did you mean 'carry'"):
        library.call("cary", "a", "b")
    with pytest.raises(ConfigError, match="expected 2 things"):
        library.parse("carry(a)")
    with pytest.raises(ConfigError, match="two skills are called"):
        SkillLibrary([carry(), carry()])
    with pytest.raises(ConfigError, match="unconditional effect"):
        SkillSpec(name="look", instruction="look")


def test_a_scene_is_closed():
    scene = Scene(things=(), facts=frozenset(literals("open(drawer)")))
    assert scene.holds(Literal.parse("open(drawer)"))
    assert scene.holds(Literal.parse("not open(box)"))
    assert scene.unmet(literals("open(drawer)", "open(box)", "not open(drawer)")) == list(
        literals("open(box)", "not open(drawer)")
    )
