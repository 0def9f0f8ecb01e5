"""The language of goals: what an instruction means, made into literals about the scene at hand.

A meaning is one or several clauses separated by ``;``::

    in(red cube, blue bowl)     on(every cube, table)     open(drawer)     not open(drawer)
    sort(cube)                  every cube in the bowl of its colour
    swap(red cube, blue ball)   each where the other is
    leave(two, cube, red bowl)  all cubes but two, whichever, in the bowl and these on the table
    undo(two)                   as it was before the last two moves
    if open(drawer): CLAUSES else: CLAUSES

Names are those of things (``red cube``), ``every KIND``, or a bare kind where there is one such thing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ConfigError
from ...symbols import Literal, Scene
from .search import Goals

NUMBERS = ("zero", "one", "two", "three", "four", "five")
HOLDERS = {"in": ("bowl", "drawer"), "on": ("zone", "table", "cube")}
"""What things can be put in and on."""
FIXED = ("bowl", "zone", "drawer", "table")
UNKNOWN, AMBIGUOUS, IMPOSSIBLE, CONTRADICTORY = "unknown_object", "ambiguous", "impossible", "contradictory"
UNKNOWN_WORDS, NOT_UNDERSTOOD = "unknown_words", "not_understood"
MOST_ALTERNATIVES = 64

Past = Sequence[tuple[str, tuple[Literal, ...]]]
"""What was done before: (instruction, literals that were true before and no longer are), the latest last."""


@dataclass(eq=False)
class Unclear(Exception):
    """An instruction that cannot be followed in this scene.

    Attributes:
        kind: `UNKNOWN`, `AMBIGUOUS`, `IMPOSSIBLE`, `CONTRADICTORY`, `UNKNOWN_WORDS` or `NOT_UNDERSTOOD`.
        why: In a sentence.
        options: What may be meant, where it is ambiguous.
    """

    kind: str
    why: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.why


def goals_of(meaning: str, scene: Scene, past: Past = ()) -> Goals:
    """Alternatives of literals that a meaning comes to.

    Raises:
        Unclear: It names what is not there, or what cannot be.
        ConfigError: It is no meaning.
    """
    found = re.fullmatch(r"\s*if (?P<test>.+?)\s*: (?P<then>.+?) else\s*: (?P<other>.+)", meaning)
    if found is not None:
        test = _literals(found["test"], scene)
        return goals_of(found["then"] if not scene.unmet(test) else found["other"], scene, past)
    parts: list[Goals] = [_clause(clause.strip(), scene, past) for clause in meaning.split(";")]
    goals = tuple(tuple(dict.fromkeys(itertools.chain(*chosen))) for chosen in itertools.product(*parts))
    sound = [goal for goal in goals if not _conflict(goal)]
    if not sound:
        raise Unclear(CONTRADICTORY, _conflict(goals[0]))
    return tuple(sound)


def _clause(clause: str, scene: Scene, past: Past) -> Goals:
    literal = Literal.parse(clause)
    special = {"sort": _sort, "swap": _swap, "leave": _leave}
    if literal.pred in special:
        return special[literal.pred](literal, scene)
    if literal.pred == "undo":
        return (_undo(literal, past),)
    return (tuple(_literals(clause, scene)),)


def _literals(clause: str, scene: Scene) -> list[Literal]:
    literal = Literal.parse(clause)
    if literal.pred in HOLDERS:
        _arity(literal, 2)
        place = _one(literal.args[1], scene)
        kind = scene.names[place].kind
        if kind not in HOLDERS[literal.pred]:
            raise Unclear(IMPOSSIBLE, f"nothing can be put {literal.pred} the {place}")
        names = _names(literal.args[0], scene)
        for name in names:
            if scene.names[name].kind in FIXED:
                raise Unclear(IMPOSSIBLE, f"the {name} cannot be moved")
            if name == place:
                raise Unclear(IMPOSSIBLE, f"the {name} cannot be put {literal.pred} itself")
        return [Literal(literal.pred, (name, place), literal.value) for name in names]
    if literal.pred in ("open", "clear"):
        _arity(literal, 1)
        return [Literal(literal.pred, (name,), literal.value) for name in _names(literal.args[0], scene)]
    raise ConfigError(f"expected a clause of the language of goals, got {clause!r}")


def _sort(literal: Literal, scene: Scene) -> Goals:
    _arity(literal, 1)
    found = []
    for name in _names(f"every {literal.args[0]}", scene):
        bowl = f"{scene.names[name].color} bowl"
        if bowl not in scene.names:
            raise Unclear(UNKNOWN, f"there is no {bowl} for the {name}")
        found.append(Literal("in", (name, bowl)))
    return (tuple(found),)


def _swap(literal: Literal, scene: Scene) -> Goals:
    _arity(literal, 2)
    a, b = _one(literal.args[0], scene), _one(literal.args[1], scene)
    found = []
    for name, other in ((a, b), (b, a)):
        place = _place(other, scene)
        if place is None:
            raise Unclear(IMPOSSIBLE, f"the {other} has no place that another thing could take")
        if name in place.args:
            raise Unclear(IMPOSSIBLE, f"the {other} is on the {name}: they cannot be swapped")
        found.append(Literal(place.pred, (name, *place.args[1:])))
    if not scene.unmet(found):
        raise Unclear(IMPOSSIBLE, f"the {a} and the {b} are both {_said(found[0])}: there is nothing to swap")
    return (tuple(found),)


def _leave(literal: Literal, scene: Scene) -> Goals:
    _arity(literal, 3)
    number, kind, where = literal.args
    if number not in NUMBERS:
        raise ConfigError(f"expected a number up to {NUMBERS[-1]}, got {number!r}")
    names, place = _names(f"every {kind}", scene), _one(where, scene)
    count, holder = NUMBERS.index(number), scene.names[place].kind
    pred = next((p for p, kinds in HOLDERS.items() if holder in kinds), None)
    if count > len(names):
        raise Unclear(IMPOSSIBLE, f"there are only {len(names)} {kind}s, {number} cannot be left")
    if pred is None:
        raise Unclear(IMPOSSIBLE, f"nothing can be put on the {place}")
    chosen = itertools.islice(itertools.combinations(names, count), MOST_ALTERNATIVES)
    return tuple(
        tuple(Literal("on", (n, "table")) if n in stays else Literal(pred, (n, place)) for n in names)
        for stays in chosen
    )


def _undo(literal: Literal, past: Past) -> tuple[Literal, ...]:
    _arity(literal, 1)
    if literal.args[0] not in NUMBERS:
        raise ConfigError(f"expected a number up to {NUMBERS[-1]}, got {literal.args[0]!r}")
    count = NUMBERS.index(literal.args[0])
    if count > len(past):
        raise Unclear(IMPOSSIBLE, f"only {len(past)} moves were made, {literal.args[0]} cannot be undone")
    oldest: dict[tuple[str, str], Literal] = {}
    for _, undone in past[len(past) - count :]:
        for one in undone:
            oldest.setdefault(("place" if one.pred in HOLDERS else one.pred, one.args[0]), one)
    return tuple(oldest.values())


def _names(text: str, scene: Scene) -> list[str]:
    """Things that a name means."""
    if text in scene.names:
        return [text]
    every, _, kind = text.partition(" ")
    if every == "every":
        found = [t.name for t in scene.things if t.kind == kind or (kind == "thing" and t.kind not in FIXED)]
        if not found:
            raise Unclear(UNKNOWN, f"there is no {kind}")
        return found
    alike = [t.name for t in scene.things if t.kind == text]
    if len(alike) == 1:
        return alike
    if alike:
        raise Unclear(AMBIGUOUS, f"which {text}?", tuple(alike))
    raise Unclear(UNKNOWN, f"there is no {text}")


def _one(text: str, scene: Scene) -> str:
    """The one thing that a name means."""
    found = _names(text, scene)
    if len(found) > 1:
        raise Unclear(AMBIGUOUS, f"which of {', '.join(found)}?", tuple(found))
    return found[0]


def _place(name: str, scene: Scene) -> Literal | None:
    return next((f for f in scene.facts if f.pred in HOLDERS and f.args[0] == name), None)


def _conflict(goal: Sequence[Literal]) -> str:
    """Why not all of a goal can hold; empty where nothing speaks against it."""
    placed: dict[str, Literal] = {}
    for literal in goal:
        if -literal in goal:
            return f"{literal} cannot be and not be"
        if literal.pred in HOLDERS and literal.value:
            other = placed.setdefault(literal.args[0], literal)
            if other != literal:
                return f"the {literal.args[0]} cannot be both {_said(other)} and {_said(literal)}"
    return ""


def _said(literal: Literal) -> str:
    return f"{literal.pred} the {literal.args[1]}"


def _arity(literal: Literal, count: int) -> None:
    if len(literal.args) != count:
        raise ConfigError(f"expected {count} names in {literal.pred}(...), got {list(literal.args)}")
