"""What planners speak of: things, literals about them, and skills that change which literals hold.

The standard library only: a planner on a small computer needs no more. Worlds are closed: what is not among a scene's
facts is false.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from .errors import ConfigError, did_you_mean


class Literal(NamedTuple):
    """A statement about things, for example ``on(red cube, table)``; `value` False negates it.

    Arguments that begin with ``?`` are variables.
    """

    pred: str
    args: tuple[str, ...] = ()
    value: bool = True

    def __str__(self) -> str:
        return f"{'' if self.value else 'not '}{self.pred}({', '.join(self.args)})"

    def __neg__(self) -> Literal:
        return Literal(self.pred, self.args, not self.value)

    @classmethod
    def parse(cls, text: str) -> Literal:
        """Of ``pred(a, b)`` or ``not pred(a)``.

        Raises:
            ConfigError: It is no literal.
        """
        found = re.fullmatch(r"\s*(not\s+)?(\w+)\s*\(([^()]*)\)\s*", text)
        if found is None:
            raise ConfigError(f"expected a literal such as on(red cube, table) or not open(drawer), got {text!r}")
        negated, pred, args = found.groups()
        return cls(pred, tuple(a.strip() for a in args.split(",") if a.strip()), negated is None)

    def bind(self, values: Mapping[str, str]) -> Literal:
        """With variables replaced by what they stand for."""
        return Literal(self.pred, tuple(values.get(a, a) for a in self.args), self.value)


Facts = frozenset[Literal]
"""Literals that hold; none is negated."""


def literals(*texts: str) -> tuple[Literal, ...]:
    """Several literals."""
    return tuple(Literal.parse(text) for text in texts)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """Something with a name that is unique in its scene, for example ``red cube``, and a kind, for example ``cube``."""

    name: str
    kind: str

    @property
    def color(self) -> str:
        """The word before the kind; empty for ``drawer`` and ``table``."""
        return self.name.removesuffix(self.kind).strip()


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is there and what holds of it.

    Attributes:
        things: What is there.
        facts: What holds.
        confidence: Of facts that are not certain, 0..1; also of some that are taken not to hold.
        source: Who says so: ``sim``, ``vision``, ``vlm`` or ``human``.
        stamp: When it was seen [s].
    """

    things: tuple[Thing, ...]
    facts: Facts
    confidence: Mapping[Literal, float] = field(default_factory=dict)
    source: str = "sim"
    stamp: float = 0.0

    @cached_property
    def names(self) -> dict[str, Thing]:
        """Name -> thing."""
        return {thing.name: thing for thing in self.things}

    def holds(self, literal: Literal) -> bool:
        """Whether a ground literal is true."""
        return (Literal(literal.pred, literal.args) in self.facts) == literal.value

    def unmet(self, wanted: Iterable[Literal]) -> list[Literal]:
        """Those that are not true."""
        return [literal for literal in wanted if not self.holds(literal)]


@dataclass(frozen=True, kw_only=True)
class Param:
    """A parameter of a skill: its name, and the kinds of things that may fill it."""

    name: str
    kinds: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A literal that a skill makes true, for all values of its free variables for which `when` holds beforehand."""

    literal: Literal
    when: tuple[Literal, ...] = ()

    def bindings(self, facts: Facts) -> Iterator[Literal]:
        """The literal for every value of its free variables, with what holds before."""
        if not self.when:
            yield self.literal
            return
        for values in _matches(self.when, facts, {}):
            yield self.literal.bind(values)


@dataclass(frozen=True, kw_only=True)
class SkillSpec:
    """Something a robot can do with things.

    Attributes:
        name: Of the skill.
        params: What it is done with; different things each.
        instruction: What a policy is told, with ``{param}`` in it.
        pre: What must hold, over variables ``?param``.
        effects: What is changed; what is made false is made false before anything is made true.
        success: What tells that it was done; the unconditional effects where empty.
        time_limit_s: After this long it has failed [s].
    """

    name: str
    params: tuple[Param, ...] = ()
    instruction: str
    pre: tuple[Literal, ...] = ()
    effects: tuple[Effect, ...] = ()
    success: tuple[Literal, ...] = ()
    time_limit_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.success:
            plain = tuple(e.literal for e in self.effects if not e.when)
            object.__setattr__(self, "success", plain)
        if not self.success:
            raise ConfigError(f"skill {self.name!r}: expected an unconditional effect, or what tells its success")


class SkillCall:
    """A skill with the things it is done with, in the order of the skill's parameters."""

    def __init__(self, spec: SkillSpec, args: Sequence[str]) -> None:
        self.spec, self.args = spec, tuple(args)
        if len(self.args) != len(spec.params):
            raise ConfigError(f"{spec.name}: expected {len(spec.params)} things, got {list(self.args)}")
        names = [param.name for param in spec.params]
        values = {f"?{name}": arg for name, arg in zip(names, self.args)}
        self.instruction = spec.instruction.format(**dict(zip(names, self.args)))
        self.key = f"{spec.name}({', '.join(self.args)})"
        self.pre = tuple(literal.bind(values) for literal in spec.pre)
        self.success = tuple(literal.bind(values) for literal in spec.success)
        self.effects = tuple(
            Effect(literal=e.literal.bind(values), when=tuple(w.bind(values) for w in e.when)) for e in spec.effects
        )

    def __repr__(self) -> str:
        return self.key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SkillCall) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def applicable(self, facts: Facts) -> bool:
        """Whether all preconditions hold."""
        return all((Literal(p.pred, p.args) in facts) == p.value for p in self.pre)

    def apply(self, facts: Facts) -> Facts:
        """The facts afterwards, where it succeeds."""
        added: set[Literal] = set()
        removed: set[Literal] = set()
        for effect in self.effects:
            for literal in effect.bindings(facts):
                (added if literal.value else removed).add(Literal(literal.pred, literal.args))
        return (facts - removed) | added


def _matches(wanted: Sequence[Literal], facts: Facts, values: dict[str, str]) -> Iterator[dict[str, str]]:
    """Values of the variables for which all of `wanted` holds; a negated one must have no free variables left."""
    if not wanted:
        yield values
        return
    first = wanted[0].bind(values)
    if not first.value:
        if Literal(first.pred, first.args) not in facts:
            yield from _matches(wanted[1:], facts, values)
        return
    for fact in facts:
        if fact.pred == first.pred and len(fact.args) == len(first.args):
            found = dict(values)
            if all(_unify(a, b, found) for a, b in zip(first.args, fact.args)):
                yield from _matches(wanted[1:], facts, found)


def _unify(pattern: str, value: str, found: dict[str, str]) -> bool:
    if not pattern.startswith("?"):
        return pattern == value
    return found.setdefault(pattern, value) == value


class SkillLibrary:
    """The skills of a robot, and what they come to with given things.

    Raises:
        ConfigError: Two skills have the same name.
    """

    def __init__(self, skills: Iterable[SkillSpec]) -> None:
        self.skills: dict[str, SkillSpec] = {}
        for skill in skills:
            if skill.name in self.skills:
                raise ConfigError(f"two skills are called {skill.name!r}")
            self.skills[skill.name] = skill

    def call(self, name: str, *args: str) -> SkillCall:
        """A skill with things.

        Raises:
            ConfigError: No such skill, or another number of things.
        """
        if name not in self.skills:
            raise ConfigError(f"no skill {name!r}. {did_you_mean(name, self.skills)}")
        return SkillCall(self.skills[name], args)

    def parse(self, text: str) -> SkillCall:
        """Of ``skill(thing, thing)``."""
        literal = Literal.parse(text)
        return self.call(literal.pred, *literal.args)

    def calls(self, things: Sequence[Thing]) -> tuple[SkillCall, ...]:
        """All skills with all things whose kinds fit, whether or not their preconditions hold."""
        found = []
        for spec in self.skills.values():
            choices = [[t.name for t in things if t.kind in param.kinds] for param in spec.params]
            found += [SkillCall(spec, args) for args in itertools.product(*choices) if len(set(args)) == len(args)]
        return tuple(found)
