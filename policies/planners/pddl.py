"""Skills and work as PDDL for other planners, and goals of LIBERO's BDDL files as literals."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ...errors import ConfigError
from ...symbols import Literal, Scene, SkillLibrary, SkillSpec
from .search import Goals

PDDL_NAME = "brachium"


def to_pddl(library: SkillLibrary, scene: Scene, goals: Goals) -> tuple[str, str]:
    """Domain and problem in PDDL 2.1 with typing, negative preconditions and conditional effects.

    Names are written with ``-`` for spaces, skills with ``do_`` before them: some planners want all names to differ.
    The search of `search.py` and a PDDL planner must find plans of the same length.
    """
    skills = list(library.skills.values())
    constants = sorted({a for s in skills for p in _literals_of(s) for a in p.args if not a.startswith("?")})
    kinds = sorted({t.kind for t in scene.things} | {k for s in skills for param in s.params for k in param.kinds})
    groups = _groups(skills)
    known = {thing.name: thing.kind for thing in scene.things}
    arities: dict[str, int] = {}
    for literal in (*(p for s in skills for p in _literals_of(s)), *scene.facts, *(p for g in goals for p in g)):
        arities[literal.pred] = len(literal.args)
    predicates = " ".join(
        f"({pred}{''.join(f' ?a{k} - object' for k in range(count))})" for pred, count in sorted(arities.items())
    )
    typed_constants = " ".join(f"{_name(c)} - {_kind(known.get(c, kinds[0]))}" for c in constants)
    domain = [
        f"(define (domain {PDDL_NAME})",
        "  (:requirements :strips :typing :negative-preconditions :equality :conditional-effects "
        ":disjunctive-preconditions)",
        f"  (:types {_types(kinds, groups)})",
        f"  (:constants {typed_constants})" if constants else "",
        f"  (:predicates {predicates})",
        *(_action(skill, groups) for skill in skills),
        ")",
    ]
    things = " ".join(f"{_name(t.name)} - {_kind(t.kind)}" for t in scene.things if t.name not in constants)
    facts = " ".join(_atom(fact) for fact in sorted(scene.facts))
    wanted = [f"(and {' '.join(_atom(p) for p in goal)})" for goal in goals]
    goal = wanted[0] if len(wanted) == 1 else f"(or {' '.join(wanted)})"
    problem = [
        f"(define (problem work) (:domain {PDDL_NAME})",
        f"  (:objects {things})",
        f"  (:init {facts})",
        f"  (:goal {goal})",
        ")",
    ]
    return "\n".join(line for line in domain if line) + "\n", "\n".join(problem) + "\n"


def _literals_of(skill: SkillSpec) -> Iterator[Literal]:
    yield from skill.pre
    for effect in skill.effects:
        yield effect.literal
        yield from effect.when


def _action(skill: SkillSpec, groups: Sequence[tuple[str, ...]]) -> str:
    names = [f"?{param.name}" for param in skill.params]
    typed = " ".join(f"{n} - {_type(param.kinds, groups)}" for n, param in zip(names, skill.params))
    differ = [f"(not (= {a} {b}))" for k, a in enumerate(names) for b in names[k + 1 :]]
    conditions = " ".join([*differ, *(_atom(p) for p in skill.pre)])
    effects = []
    for effect in skill.effects:
        made = _atom(effect.literal)
        if effect.when:
            made = f"(when (and {' '.join(_atom(w) for w in effect.when)}) {made})"
        free = sorted({a for p in (effect.literal, *effect.when) for a in p.args if a.startswith("?")} - set(names))
        if free:
            made = f"(forall ({' '.join(f'{v} - object' for v in free)}) {made})"
        effects.append(made)
    return (
        f"  (:action do_{skill.name}\n    :parameters ({typed})\n    :precondition (and {conditions})\n"
        f"    :effect (and {' '.join(effects)}))"
    )


def _groups(skills: Sequence[SkillSpec]) -> list[tuple[str, ...]]:
    """Kinds that a parameter takes together, as types above them; few planners read PDDL's ``either``."""
    found: list[tuple[str, ...]] = []
    for kinds in dict.fromkeys(param.kinds for skill in skills for param in skill.params):
        if len(kinds) > 1 and not any(set(kinds) & set(other) for other in found):
            found.append(kinds)
    return found


def _types(kinds: Sequence[str], groups: Sequence[tuple[str, ...]]) -> str:
    alone = [_kind(kind) for kind in kinds if not any(kind in group for group in groups)]
    parts = [f"{' '.join(map(_kind, group))} - {'_or_'.join(group)}" for group in groups]
    return " ".join([*parts, *(["_or_".join(group) for group in groups]), *alone, "- object"])


def _type(kinds: tuple[str, ...], groups: Sequence[tuple[str, ...]]) -> str:
    if len(kinds) == 1:
        return _kind(kinds[0])
    return "_or_".join(kinds) if kinds in groups else f"(either {' '.join(map(_kind, kinds))})"


def _kind(kind: str) -> str:
    """The name of a type, which may not be that of a thing."""
    return f"{kind}-kind"


def _atom(literal: Literal) -> str:
    text = f"({' '.join([literal.pred, *map(_name, literal.args)])})"
    return text if literal.value else f"(not {text})"


def _name(text: str) -> str:
    return text if text.startswith("?") else text.replace(" ", "-")


# -- BDDL --------------------------------------------------------------------------------------------------------------


def bddl_goal(text: str) -> tuple[Literal, ...]:
    """The goal of a LIBERO task as literals: ``(And (On a b) (Not (Open c)))`` -> on(a, b), not open(c).

    Args:
        text: A whole BDDL file, or the goal alone.

    Raises:
        ConfigError: There is no goal, its brackets do not match, or it is no conjunction of literals.
    """
    tree = _tree(text)
    if isinstance(tree, list) and tree and tree[0] == "define":
        goals = [part[1] for part in tree if isinstance(part, list) and len(part) == 2 and part[0] == ":goal"]
        if len(goals) != 1:
            raise ConfigError(f"expected one (:goal ...) in a BDDL file, got {len(goals)}")
        tree = goals[0]
    return tuple(_conjunction(tree))


def _conjunction(tree: object) -> Iterator[Literal]:
    if not isinstance(tree, list) or not tree or not isinstance(tree[0], str):
        raise ConfigError(f"expected a goal such as (And (On a b) (Open c)), got {tree!r}")
    head, rest = tree[0].lower(), tree[1:]
    if head == "and":
        for part in rest:
            yield from _conjunction(part)
    elif head == "not" and len(rest) == 1:
        inner = list(_conjunction(rest[0]))
        if len(inner) != 1:
            raise ConfigError("expected one literal to be negated: a goal is a conjunction of literals")
        yield -inner[0]
    elif head in ("or", "forall", "exists", "imply", "not"):
        raise ConfigError(f"expected a conjunction of literals as a goal, got {tree[0]}")
    elif all(isinstance(a, str) for a in rest):
        yield Literal(head, tuple(str(a) for a in rest))
    else:
        raise ConfigError(f"expected names in ({tree[0]} ...), got {rest!r}")


def _tree(text: str) -> object:
    """Nested lists of words."""
    stack: list[list[object]] = [[]]
    for token in re.findall(r"[()]|[^\s()]+", re.sub(r";[^\n]*", "", text)):
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                raise ConfigError("expected brackets that match, got one ')' too many")
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    if len(stack) > 1:
        raise ConfigError(f"expected brackets that match, got {len(stack) - 1} '(' too many")
    if len(stack[0]) != 1:
        raise ConfigError("expected one expression in brackets")
    return stack[0][0]
