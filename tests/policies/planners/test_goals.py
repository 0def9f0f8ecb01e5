"""The language of goals: what it comes to, and what is unclear."""

import pytest

from brachium.envs.longhorizon.domain import facts_of
from brachium.errors import ConfigError
from brachium.policies.planners.goals import (
    AMBIGUOUS,
    CONTRADICTORY,
    IMPOSSIBLE,
    UNKNOWN,
    Unclear,
    goals_of,
)
from brachium.symbols import Scene, Thing, literals

PLACES = {"red cube": "table", "blue cube": "red zone", "green ball": "red bowl", "red ball": "blue cube"}


def scene(places=PLACES, drawer_open=False):
    names = dict.fromkeys([*places, *places.values(), "table", "drawer", "green bowl", "blue bowl"])
    things = tuple(Thing(name=n, kind=n.split()[-1]) for n in names)
    return Scene(things=things, facts=facts_of(places, things, drawer_open))


@pytest.mark.parametrize(
    ("meaning", "goals"),
    [
        ("in(red cube, red bowl)", [["in(red cube, red bowl)"]]),
        ("in ( red cube , red bowl ) ; not open ( drawer )", [["in(red cube, red bowl)", "not open(drawer)"]]),
        ("on(every cube, table)", [["on(red cube, table)", "on(blue cube, table)"]]),
        ("in(every thing, drawer)", [[f"in({n}, drawer)" for n in PLACES]]),
        ("on(red cube, zone)", [["on(red cube, red zone)"]]),
        ("sort(ball)", [["in(green ball, green bowl)", "in(red ball, red bowl)"]]),
        ("swap(red cube, blue cube)", [["on(red cube, red zone)", "on(blue cube, table)"]]),
        (
            "leave(one, cube, red bowl)",
            [
                ["on(red cube, table)", "in(blue cube, red bowl)"],
                ["in(red cube, red bowl)", "on(blue cube, table)"],
            ],
        ),
        ("if open(drawer): in(red cube, drawer) else: in(red cube, red bowl)", [["in(red cube, red bowl)"]]),
        ("if not open(drawer): open(drawer) else : not open(drawer)", [["open(drawer)"]]),
        ("clear(red zone)", [["clear(red zone)"]]),
    ],
)
def test_what_meanings_come_to(meaning, goals):
    assert {frozenset(goal) for goal in goals_of(meaning, scene())} == {frozenset(literals(*goal)) for goal in goals}


def test_undoing_goes_back_to_the_oldest_place_that_is_meant():
    past = (
        ("put the red cube in the red bowl", literals("on(red cube, table)")),
        ("put the green ball in the blue bowl", literals("in(green ball, red bowl)")),
        ("put the red cube in the blue bowl", literals("in(red cube, red bowl)")),
    )
    assert goals_of("undo(one)", scene(), past) == (literals("in(red cube, red bowl)"),)
    three = goals_of("undo(three)", scene(), past)
    assert set(three[0]) == set(literals("on(red cube, table)", "in(green ball, red bowl)"))


@pytest.mark.parametrize(
    ("meaning", "kind", "why"),
    [
        ("in(purple cube, red bowl)", UNKNOWN, "there is no purple cube"),
        ("in(red cube, purple bowl)", UNKNOWN, "there is no purple bowl"),
        ("in(every cylinder, red bowl)", UNKNOWN, "there is no cylinder"),
        ("in(cube, red bowl)", AMBIGUOUS, "which cube"),
        ("in(red cube, blue cube)", IMPOSSIBLE, "nothing can be put in the blue cube"),
        ("on(red cube, red bowl)", IMPOSSIBLE, "nothing can be put on the red bowl"),
        ("on(red cube, red cube)", IMPOSSIBLE, "on itself"),
        ("on(red bowl, table)", IMPOSSIBLE, "the red bowl cannot be moved"),
        ("leave(five, cube, red bowl)", IMPOSSIBLE, "there are only 2 cubes"),
        ("undo(one)", IMPOSSIBLE, "only 0 moves were made"),
        ("swap(red ball, blue cube)", IMPOSSIBLE, "cannot be swapped"),
        ("swap(red cube, drawer)", IMPOSSIBLE, "no place"),
        ("swap(red cube, every cube)", AMBIGUOUS, "which of red cube, blue cube"),
        ("in(red cube, every bowl)", AMBIGUOUS, "which of red bowl"),
        ("in(red cube, red bowl); on(red cube, table)", CONTRADICTORY, "cannot be both in the red bowl and on the"),
        ("open(drawer); not open(drawer)", CONTRADICTORY, "cannot be and not be"),
        ("in(every cube, red bowl); on(red cube, table)", CONTRADICTORY, "red cube cannot be both"),
    ],
)
def test_what_is_unclear_says_why(meaning, kind, why):
    with pytest.raises(Unclear, match=why) as caught:
        goals_of(meaning, scene())
    assert caught.value.kind == kind


def test_two_things_in_the_same_place_are_not_swapped():
    with pytest.raises(Unclear, match="are both on the table: there is nothing to swap"):
        goals_of("swap(red cube, blue cube)", scene({"red cube": "table", "blue cube": "table"}))


def test_what_may_be_meant_is_offered():
    with pytest.raises(Unclear) as caught:
        goals_of("in(ball, red bowl)", scene())
    assert set(caught.value.options) == {"green ball", "red ball"}


def test_sorting_needs_a_bowl_of_each_color():
    with pytest.raises(Unclear, match="there is no purple bowl for the purple cube"):
        goals_of("sort(cube)", scene({"purple cube": "table"}))


@pytest.mark.parametrize(
    "meaning", ["", "put it there", "in(red cube)", "jump(red cube)", "leave(some, cube, red bowl)"]
)
def test_what_is_no_meaning_is_refused(meaning):
    with pytest.raises(ConfigError):
        goals_of(meaning, scene())
