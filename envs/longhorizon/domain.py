"""The skills of the table: what can be done with cubes, bowls, zones and the drawer."""

from __future__ import annotations

from ...sim.scene import COLORS, OBJECT_KINDS
from ...symbols import Effect, Facts, Literal, Param, Scene, SkillLibrary, SkillSpec, Thing, literals

TABLE = Thing(name="table", kind="table")
DRAWER = Thing(name="drawer", kind="drawer")
MOVABLE = OBJECT_KINDS
_LEAVES = (
    Effect(literal=Literal("on", ("?x", "?under"), False), when=literals("on(?x, ?under)")),
    Effect(literal=Literal("clear", ("?under",)), when=literals("on(?x, ?under)")),
    Effect(literal=Literal("in", ("?x", "?around"), False), when=literals("in(?x, ?around)")),
    Effect(literal=Literal("inside", ("?x",), False), when=literals("in(?x, ?around)")),
)
"""A thing that is moved leaves what it was on or in."""


def _made(*texts: str) -> tuple[Effect, ...]:
    return tuple(Effect(literal=literal) for literal in literals(*texts))


def tabletop_skills() -> SkillLibrary:
    """Seven skills.

    ``on(x, y)`` is for the table, zones and cubes, ``in(x, y)`` for bowls and the drawer; ``clear(x)``: nothing is on
    it; ``inside(x)``: it is in something; ``hidden(x)``: it is in the closed drawer. Zones and cubes hold one thing.
    """
    movable = Param(name="x", kinds=MOVABLE)
    free = literals("clear(?x)", "not hidden(?x)")
    return SkillLibrary(
        (
            # First, for of two ways that are as short the first is taken: what is in the way is put on the table.
            SkillSpec(
                name="put_down",
                params=(movable,),
                instruction="put the {x} on the table",
                pre=(*free, *literals("not on(?x, table)")),
                effects=(*_LEAVES, *_made("on(?x, table)")),
                success=literals("on(?x, table)"),
                time_limit_s=9.0,
            ),
            SkillSpec(
                name="place_in",
                params=(movable, Param(name="y", kinds=("bowl",))),
                instruction="put the {x} in the {y}",
                pre=(*free, *literals("not in(?x, ?y)")),
                effects=(*_LEAVES, *_made("in(?x, ?y)", "inside(?x)")),
                success=literals("in(?x, ?y)"),
                time_limit_s=9.0,
            ),
            SkillSpec(
                name="place_on",
                params=(movable, Param(name="y", kinds=("zone",))),
                instruction="put the {x} on the {y}",
                pre=(*free, *literals("clear(?y)", "not on(?x, ?y)")),
                effects=(*_LEAVES, *_made("on(?x, ?y)", "not clear(?y)")),
                success=literals("on(?x, ?y)"),
                time_limit_s=9.0,
            ),
            SkillSpec(
                name="stack",
                params=(Param(name="x", kinds=("cube",)), Param(name="y", kinds=("cube",))),
                instruction="stack the {x} on the {y}",
                pre=(*free, *literals("clear(?y)", "not inside(?y)", "not on(?x, ?y)")),
                effects=(*_LEAVES, *_made("on(?x, ?y)", "not clear(?y)")),
                success=literals("on(?x, ?y)"),
                time_limit_s=10.0,
            ),
            SkillSpec(
                name="store",
                params=(movable, Param(name="y", kinds=("drawer",))),
                instruction="put the {x} in the {y}",
                pre=(*free, *literals("open(?y)", "not in(?x, ?y)")),
                effects=(*_LEAVES, *_made("in(?x, ?y)", "inside(?x)")),
                success=literals("in(?x, ?y)"),
                time_limit_s=10.0,
            ),
            SkillSpec(
                name="open",
                params=(Param(name="y", kinds=("drawer",)),),
                instruction="open the {y}",
                pre=literals("not open(?y)"),
                effects=(
                    *_made("open(?y)"),
                    Effect(literal=Literal("hidden", ("?z",), False), when=literals("in(?z, ?y)")),
                ),
                time_limit_s=8.0,
            ),
            SkillSpec(
                name="close",
                params=(Param(name="y", kinds=("drawer",)),),
                instruction="close the {y}",
                pre=literals("open(?y)"),
                effects=(
                    *_made("not open(?y)"),
                    Effect(literal=Literal("hidden", ("?z",)), when=literals("in(?z, ?y)")),
                ),
                time_limit_s=8.0,
            ),
        )
    )


def universe() -> tuple[Thing, ...]:
    """Every thing that can be on a table."""
    kinds = (*OBJECT_KINDS, "bowl", "zone")
    return (*(Thing(name=f"{color} {kind}", kind=kind) for kind in kinds for color in COLORS), DRAWER, TABLE)


def facts_of(places: dict[str, str], things: tuple[Thing, ...], drawer_open: bool) -> Facts:
    """The facts of a table.

    Args:
        places: Movable thing -> the thing that it is on or in.
        things: All that is there.
        drawer_open: Whether the drawer is.
    """
    kinds = {thing.name: thing.kind for thing in things}
    found: set[Literal] = {Literal("clear", (t.name,)) for t in things if t.kind not in ("bowl", "drawer")}
    if drawer_open and "drawer" in kinds:
        found.add(Literal("open", ("drawer",)))
    for name, place in places.items():
        within = kinds[place] in ("bowl", "drawer")
        found.add(Literal("in" if within else "on", (name, place)))
        if within:
            found.add(Literal("inside", (name,)))
            if kinds[place] == "drawer" and not drawer_open:
                found.add(Literal("hidden", (name,)))
        elif place != "table":
            found.discard(Literal("clear", (place,)))
    return frozenset(found)


def place_of(scene: Scene, name: str) -> str:
    """What a thing is on or in."""
    return next(f.args[1] for f in scene.facts if f.pred in ("on", "in") and f.args[0] == name)
