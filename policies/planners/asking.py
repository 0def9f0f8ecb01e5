"""What can be in or on what, and literals as questions with their possible answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ConfigError
from ...symbols import Literal, Thing

TABLE, DRAWER = "table", "drawer"
GRIPPER = "gripper"
"""What a model calls the place of a thing between the fingers."""


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """What a world's things are, and what can be in or on what.

    Attributes:
        things: All that could be there.
        movable: Kinds that can be moved.
        inside: Kinds that things are in; on all others they are on.
        stackable: Kinds that can be on one another.
    """

    things: tuple[Thing, ...]
    movable: tuple[str, ...] = ("cube", "cylinder", "ball")
    inside: tuple[str, ...] = ("bowl", DRAWER)
    stackable: tuple[str, ...] = ("cube",)


def question(literal: Literal, things: Sequence[Thing], kinds: Kinds) -> tuple[str, tuple[str, ...], int]:
    """A literal as a question, its possible answers, and which of them says that it holds.

    Raises:
        ConfigError: No question tells.
    """
    if literal.pred == "open":
        return f"is the {literal.args[0]} open?", ("yes", "no"), 0
    if literal.pred in ("in", "on"):
        name, place = literal.args
        thing = next((t for t in things if t.name == name), None)
        answers = () if thing is None else holders(thing, things, kinds)
        if place in answers:
            return f"what is the {name} in or on?", answers, answers.index(place)
    raise ConfigError(
        f"no question tells whether {literal} holds: expected open(x), in(x, y) or on(x, y) of known things"
    )


def holders(thing: Thing, things: Sequence[Thing], kinds: Kinds) -> tuple[str, ...]:
    """What a thing can be in or on, as the model calls it."""
    stacks = thing.kind in kinds.stackable
    fixed = [t.name for t in things if t.kind not in (*kinds.movable, TABLE)]
    others = [t.name for t in things if stacks and t.kind in kinds.stackable and t != thing]
    return (TABLE, GRIPPER, *fixed, *others)
