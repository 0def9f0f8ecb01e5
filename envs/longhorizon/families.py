"""The families of long-horizon work: what is on the table, what is asked, and what would fulfil it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ...errors import ConfigError
from ...sim.scene import COLORS
from ...symbols import Literal, Scene, Thing
from .domain import DRAWER, MOVABLE, TABLE, facts_of
from .wordings import NUMBERS, word

Goals = tuple[tuple[Literal, ...], ...]
KINDS = (*MOVABLE, "bowl", "zone")


@dataclass(frozen=True, kw_only=True)
class Errand:
    """One drawn piece of work.

    Attributes:
        family: One of `EVERY`.
        instruction: How it is asked for.
        meaning: The instruction in the planners' language of goals.
        scene: How the table stands at the beginning.
        goals: Alternatives of literals: any of them fulfils it.
        past: What was done before: (instruction, literals that it undid), the latest last.
    """

    family: str
    instruction: str
    meaning: str
    scene: Scene
    goals: Goals
    past: tuple[tuple[str, tuple[Literal, ...]], ...] = ()


@dataclass
class _Table:
    """A table while it is laid."""

    rng: np.random.Generator
    things: dict[str, Thing] = field(default_factory=lambda: {"table": TABLE})
    places: dict[str, str] = field(default_factory=dict)
    drawer_open: bool = False
    past: list[tuple[str, tuple[Literal, ...]]] = field(default_factory=list)

    def colors(self, count: int) -> list[str]:
        return [list(COLORS)[int(i)] for i in self.rng.permutation(len(COLORS))[:count]]

    def draw(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def add(self, name: str, place: str = "") -> str:
        self.things[name] = Thing(name=name, kind=name.split(" ")[-1])
        if place:
            self.places[name] = place
        return name

    def objects(self, count: int, kind: str = "") -> list[str]:
        """Things on the table, of different colours, of a kind or of any."""
        return [self.add(f"{c} {kind or self.kind()}", "table") for c in self.colors(count)]

    def kind(self) -> str:
        return self.draw(("cube", "cylinder", "ball"))

    def fixed(self, kind: str, count: int) -> list[str]:
        return [self.add(f"{c} {kind}") for c in self.colors(count)]

    def drawer(self, is_open: bool | None = None) -> str:
        self.things["drawer"] = DRAWER
        self.drawer_open = bool(self.rng.random() < 0.5) if is_open is None else is_open
        return "drawer"

    def scene(self) -> Scene:
        things = tuple(self.things.values())
        return Scene(things=things, facts=facts_of(self.places, things, self.drawer_open))


_Drawn = tuple[dict[str, str], str, Goals]
"""Roles of the wording, meaning, goals."""


def _all(*wanted: Literal) -> Goals:
    return (tuple(wanted),)


def _in(a: str, b: str) -> Literal:
    return Literal("in", (a, b))


def _on(a: str, b: str) -> Literal:
    return Literal("on", (a, b))


def _closed() -> Literal:
    return Literal("open", ("drawer",), False)


def _sort(table: _Table, least: int = 2, most: int = 4) -> _Drawn:
    kind, colors = table.kind(), table.colors(int(table.rng.integers(least, most + 1)))
    for color in colors:
        table.add(f"{color} bowl")
    if table.rng.random() < 0.5 and len(colors) < 4:
        table.add(f"{next(c for c in COLORS if c not in colors)} bowl")
    for color in colors:
        start = "table"
        if table.rng.random() < 0.25:
            start = f"{table.draw([c for c in colors if c != color])} bowl"
        table.add(f"{color} {kind}", start)
    other = table.draw([k for k in ("cube", "cylinder", "ball") if k != kind])
    table.add(f"{table.draw(colors)} {other}", "table")
    goals = _all(*(_in(f"{c} {kind}", f"{c} bowl") for c in colors))
    return {"kind": kind}, f"sort({kind})", goals


def _stack(table: _Table) -> _Drawn:
    b, a, c, d = table.objects(4, "cube")
    if table.rng.random() < 0.4:  # something must be taken off first
        table.places[d] = table.draw([b, a])
    return {"a": a, "b": b, "c": c}, f"on({a}, {b}); on({c}, {a})", _all(_on(a, b), _on(c, a))


def _gather(table: _Table, least: int = 2, most: int = 4, stored: int = 0) -> _Drawn:
    kind = table.kind()
    goal, other = table.fixed("bowl", 2)
    for k, name in enumerate(table.objects(int(table.rng.integers(least, most + 1)), kind)):
        if k < stored:
            table.places[name] = table.drawer(False)
        elif table.rng.random() < 0.2:
            table.places[name] = other
    rest = table.draw([k for k in ("cube", "cylinder", "ball") if k != kind])
    table.add(f"{table.colors(1)[0]} {rest}", "table")
    names = [n for n in table.places if n.endswith(f" {kind}")]
    return {"kind": kind, "a": goal}, f"in(every {kind}, {goal})", _all(*(_in(n, goal) for n in names))


def _store(table: _Table) -> _Drawn:
    table.drawer()
    a, b = table.objects(2)
    table.fixed("bowl", 1)
    if table.rng.random() < 0.3:
        b = table.add(f"{table.draw([c for c in COLORS if c not in (a.split()[0], b.split()[0])])} cube", "table")
        if a.endswith("cube"):
            table.places[b] = a
    return {"a": a}, f"in({a}, drawer); not open(drawer)", _all(_in(a, "drawer"), _closed())


def _store_two(table: _Table) -> _Drawn:
    table.drawer()
    a, b, _ = table.objects(3)
    meaning = f"in({a}, drawer); in({b}, drawer); not open(drawer)"
    return {"a": a, "b": b}, meaning, _all(_in(a, "drawer"), _in(b, "drawer"), _closed())


def _swap(table: _Table) -> _Drawn:
    zones, (a, b, _) = table.fixed("zone", 2), table.objects(3)
    table.places |= {a: zones[0], b: zones[1]}
    return {"a": a, "b": b}, f"swap({a}, {b})", _all(_on(a, zones[1]), _on(b, zones[0]))


def _replace(table: _Table) -> _Drawn:
    zones, (a, b, c) = table.fixed("zone", 2), table.objects(3)
    table.places[b] = zones[0]
    if table.rng.random() < 0.4:
        table.places[c] = zones[1]
    return {"a": a, "c": zones[0]}, f"on({a}, {zones[0]})", _all(_on(a, zones[0]))


def _leave(table: _Table, counts: tuple[int, int] = (4, 5), most_left: int = 2) -> _Drawn:
    kind, count = table.kind(), int(table.rng.integers(counts[0], counts[1] + 1))
    (goal,) = table.fixed("bowl", 1)
    names, left = table.objects(count, kind), int(table.rng.integers(1, most_left + 1))
    other = table.draw([k for k in ("cube", "cylinder", "ball") if k != kind])
    table.add(f"{table.colors(1)[0]} {other}", "table")
    goals = tuple(
        tuple(_on(n, "table") if n in stays else _in(n, goal) for n in names)
        for stays in itertools.combinations(names, left)
    )
    roles = {"kind": kind, "a": goal, "n": NUMBERS[left]}
    return roles, f"leave({NUMBERS[left]}, {kind}, {goal})", goals


def _condition(table: _Table) -> _Drawn:
    table.drawer()
    (bowl,), (a, b, _) = table.fixed("bowl", 1), table.objects(3)
    goal = "drawer" if table.drawer_open else bowl
    meaning = f"if open(drawer): in({a}, drawer); in({b}, drawer) else: in({a}, {bowl}); in({b}, {bowl})"
    return {"a": a, "b": b, "c": bowl}, meaning, _all(_in(a, goal), _in(b, goal))


def _undo(table: _Table) -> _Drawn:
    bowls, zones, names = table.fixed("bowl", 2), table.fixed("zone", 2), table.objects(3)
    before = dict(zip(names, (zones[0], bowls[0], "table")))
    now = dict(zip(names, (bowls[1], zones[1], bowls[0])))
    steps = int(table.rng.integers(2, 4))
    moved = [names[int(k)] for k in table.rng.permutation(3)[:steps]]
    table.places |= before
    goal = []
    for name in moved:
        place, old = now[name], table.places[name]
        undone = (_in if old.endswith(("bowl", "drawer")) else _on)(name, old)
        table.past.append((f"put the {name} {'in' if place.endswith('bowl') else 'on'} the {place}", (undone,)))
        table.places[name] = place
        goal.append(undone)
    count = int(table.rng.integers(2, steps + 1))
    return {"n": NUMBERS[count]}, f"undo({NUMBERS[count]})", _all(*goal[-count:])


def _pair(table: _Table) -> _Drawn:
    bowls, zones, names = table.fixed("bowl", 2), table.fixed("zone", 2), table.objects(3)
    goals = [*bowls, *zones]
    first, second = (goals[int(k)] for k in table.rng.permutation(4)[:2])
    roles = {"a": names[0], "c": names[1], "to_b": _towards(table, first), "to_d": _towards(table, second)}
    wanted = [_in(n, g) if g.endswith("bowl") else _on(n, g) for n, g in zip(names, (first, second))]
    if table.rng.random() < 0.3 and second.endswith("zone"):
        table.places[names[2]] = second  # which has to be cleared
    return roles, "; ".join(str(w) for w in wanted), _all(*wanted)


def _both(table: _Table) -> _Drawn:
    bowls, (a, b, _) = table.fixed("bowl", 2), table.objects(3)
    table.fixed("zone", 1)
    if table.rng.random() < 0.3:
        table.places[a] = bowls[1]
    meaning = f"in({a}, {bowls[0]}); in({b}, {bowls[0]})"
    roles = {"a": a, "b": b, "to": _towards(table, bowls[0])}
    return roles, meaning, _all(_in(a, bowls[0]), _in(b, bowls[0]))


def _towards(table: _Table, goal: str) -> str:
    inside = goal.endswith(("bowl", "drawer"))
    return f"{table.draw(('in', 'into', 'inside') if inside else ('on', 'onto'))} the {goal}"


FAMILIES: dict[str, Callable[[_Table], _Drawn]] = {
    "sort": _sort,
    "stack": _stack,
    "gather": _gather,
    "store": _store,
    "store_two": _store_two,
    "swap": _swap,
    "replace": _replace,
    "leave": _leave,
    "condition": _condition,
    "undo": _undo,
    "pair": _pair,
    "both": _both,
}


def _single(table: _Table) -> _Drawn:
    (bowl,), (zone,), (a, b, c) = table.fixed("bowl", 1), table.fixed("zone", 1), table.objects(3)
    table.drawer(True)
    cubes = [name for name in (b, c) if name.endswith("cube")]
    places = [bowl, zone, "table", "drawer", *(cubes if a.endswith("cube") else [])]
    goal = table.draw(places)
    if goal == "table":
        table.places[a] = bowl
    wanted = (_in if goal in (bowl, "drawer") else _on)(a, goal)
    to = f"{table.draw(('on', 'on top of'))} the {goal}" if goal in cubes else _towards(table, goal)
    return {"a": a, "to": to}, str(wanted), _all(wanted)


def _bare(table: _Table) -> _Drawn:
    """Things by their kind alone, of which there is one each: what is not told must not be made up."""
    (bowl,), (zone,), (c1, c2) = table.fixed("bowl", 1), table.fixed("zone", 1), table.colors(2)
    kinds = [("cube", "cylinder", "ball")[int(k)] for k in table.rng.permutation(3)]
    a = table.add(f"{c1} {kinds[0]}", "table")
    table.add(f"{c2} {kinds[1]}", "table")
    table.drawer(True)
    goal = table.draw((bowl, zone, "drawer"))
    said = goal if goal == "drawer" or table.rng.random() < 0.5 else goal.split()[-1]
    said_a = a if said != goal and table.rng.random() < 0.3 else kinds[0]
    pred = "on" if goal == zone else "in"
    roles = {"a": said_a, "to": _towards(table, said)}
    return roles, f"{pred}({said_a}, {said})", _all(Literal(pred, (a, goal)))


def _drawer(table: _Table) -> _Drawn:
    table.drawer()
    table.objects(2)
    table.fixed("bowl", 1)
    act = table.draw(("close", "shut") if table.drawer_open else ("open", "pull open"))
    wanted = Literal("open", ("drawer",), not table.drawer_open)
    return {"act": act, "state": "closed" if table.drawer_open else "open"}, str(wanted), _all(wanted)


def _as_mentioned(meaning: str, text: str) -> str:
    """The clauses in the order in which the text names their things: what a model reads is easier to say in order."""
    clauses = meaning.split("; ")
    if ":" in meaning or len(clauses) < 2:
        return meaning
    return "; ".join(sorted(clauses, key=lambda clause: _first_named(clause, text.replace("block", "cube"))))


def _first_named(clause: str, text: str) -> int:
    literal = Literal.parse(clause)
    place = text.find(literal.args[0])
    return len(text) if place < 0 or not literal.value else place


SHORT: dict[str, Callable[[_Table], _Drawn]] = {"single": _single, "bare": _bare, "drawer": _drawer}
"""Families of one skill: a planner must understand them too, but they are no long-horizon work."""


LONG: dict[str, Callable[[_Table], _Drawn]] = {
    "sort_many": partial(_sort, least=5, most=6),
    "gather_many": partial(_gather, least=5, most=6),
    "gather_stored": partial(_gather, least=4, most=6, stored=2),
    "leave_many": partial(_leave, counts=(6, 6), most_left=1),
}
"""Families of five to eight skills, in the wordings of shorter ones: nobody trains on them."""
ALIKE = {
    "bare": "single",
    "sort_many": "sort",
    "gather_many": "gather",
    "gather_stored": "gather",
    "leave_many": "leave",
}
"""Family -> the one in whose wordings it is asked for."""
EVERY: dict[str, Callable[[_Table], _Drawn]] = FAMILIES | SHORT | LONG


SHOWCASE = ("red cube", "blue cube", "yellow ball", "blue bowl", "green zone", "drawer")
"""What is on the table where nobody says."""


def told(instruction: str, names: Sequence[str] = (), *, drawer_open: bool = False) -> Errand:
    """Work that somebody asks for, with the things named on the table; its goal is for the planner to find.

    Raises:
        ConfigError: A name that is no ``COLOR KIND``.
    """
    table = _Table(np.random.default_rng(0))
    for name in names or SHOWCASE:
        if name == "drawer":
            table.drawer(drawer_open)
            continue
        color, _, kind = name.partition(" ")
        if color not in COLORS or kind not in KINDS:
            raise ConfigError(f"no thing {name!r}: expected a color {list(COLORS)} and a kind {KINDS}, or drawer")
        table.add(name, "table" if kind in MOVABLE else "")
    return Errand(family="told", instruction=instruction, meaning="", scene=table.scene(), goals=())


def sample(rng: np.random.Generator, *, families: Sequence[str] = (), held_out: bool = False) -> Errand:
    """Draw a piece of work that is not done yet.

    Args:
        rng: Of the episode.
        families: Those to draw from, of `EVERY`; all of `FAMILIES` when empty.
        held_out: Ask in a wording that training does not know.
    """
    names = list(families or FAMILIES)
    family = names[int(rng.integers(len(names)))]
    draw = EVERY[family]
    while True:
        table = _Table(rng)
        roles, meaning, goals = draw(table)
        scene = table.scene()
        if all(scene.unmet(goal) for goal in goals):
            break
    text = word(ALIKE.get(family, family), roles, rng, held_out)
    meaning = _as_mentioned(meaning, text)
    return Errand(family=family, instruction=text, meaning=meaning, scene=scene, goals=goals, past=tuple(table.past))
