"""Single skills of long-horizon work as tasks: recorded, trained and evaluated like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...errors import ConfigError, did_you_mean
from ...sim.scene import OBJECT_KINDS, Item
from ...sim.scene import Scene as Table
from ...sim.simulation import Simulation
from ...sim.world import DRAWER_TRAVEL
from ...symbols import Facts, Literal, Scene, SkillCall, SkillLibrary
from ..language import Phrasings
from ..tasks.base import OFF_TABLE, Episode, fallen, sample_tool
from .chains import draw_skill, draw_way, sensible
from .domain import tabletop_skills
from .experts import expert
from .families import Errand, sample
from .layout import Layout
from .measure import measured

MOST = 8
"""Things at most on a table: labels of scenes have room for as many."""
BEFORE = 4
"""Skills at most that were done before the one that is asked for."""
BOWL = 0.066
"""Radius of bowls [m]: fingers must have room in them, and four things. Four such bowls hardly fit on a table."""
LEAST = 0.02
"""Least room between things for fingers [m]."""
LOOSE = 0.002
"""How far things on and in others are off [m], one standard deviation."""
TRIES, SOON = 2000, 100
"""Tables drawn at most until one fits, and of those on the way to what is asked."""
RETREATED = 0.14
"""Height of the tool at which a skill is over [m]: the camera sees the table again."""


class SkillTask:
    """One skill, on a table as it comes up in long-horizon work.

    Success: what tells the skill's success holds, and the tool is away from the table. The episode is lost when
    something leaves the table.

    Args:
        skill: Of `tabletop_skills`.
        families: Work whose tables are drawn; all when empty.
        kinds: Movable things that may be on the table.
        gap: Between things on the table, where there is room [m].
        possible: Share of episodes in which the skill can be done; the others are for learning when it cannot.
        way: Share of these in which what was done before is part of the work, if that needs the skill: bowls fill,
            towers grow. In the others it is anything.
        max_steps: Of an episode.
    """

    def __init__(
        self,
        *,
        skill: str,
        families: tuple[str, ...] = (),
        kinds: tuple[str, ...] = ("cube", "cylinder"),
        gap: float = 0.03,
        possible: float = 1.0,
        way: float = 0.5,
        max_steps: int = 100,
    ) -> None:
        self.library: SkillLibrary = tabletop_skills()
        if skill not in self.library.skills:
            raise ConfigError(f"no skill {skill!r}. {did_you_mean(skill, self.library.skills)}")
        self.name, self.families, self.kinds = skill, tuple(families), tuple(kinds)
        self.gap, self.max_steps, self.possible, self.way = gap, max_steps, possible, way
        text = self.library.skills[skill].instruction
        roles = {"x": "{object}", "y": "{goal}"}
        self.phrasings = Phrasings(train=(text.format(**roles),), paraphrase=(text.format(**roles),))

    def sample(self, rng: np.random.Generator, split: str) -> Episode:
        """A table on which some skills were done before, and a call of the skill that is possible there."""
        can = self.possible >= 1.0 or bool(rng.random() < self.possible)
        along = can and bool(rng.random() < self.way)
        for left in reversed(range(TRIES)):
            scene, call = self._state(rng, can, along)
            try:
                layout = Layout.draw(rng, scene.things, gap=self.gap, least=LEAST, bowl=BOWL, lane=True)
            except ConfigError:  # no room for all this
                if not left:
                    raise
                continue
            break
        places = {f.args[0]: f.args[1] for f in sorted(scene.facts) if f.pred in ("on", "in")}
        opening = DRAWER_TRAVEL if Literal("open", ("drawer",)) in scene.facts else 0.0
        items = _loose(rng, layout.placed(places, opening), places)
        first, last = call.args[0], call.args[-1]
        return Episode(
            scene=Table(items=items),
            instruction=call.instruction,
            roles={"object": first, "goal": last},
            tool_start=self._tool(rng, items),
            drawer_start=opening,
        )

    def success(self, sim: Simulation, episode: Episode) -> bool:
        """Whether the skill is done and the tool away."""
        return bool(sim.tool_position[2] > RETREATED) and self.done(sim, self.call(episode))

    def failure(self, sim: Simulation, episode: Episode) -> str:
        """Something left the table."""
        return OFF_TABLE if any(fallen(sim, i.name) for i in sim.scene.items if i.kind in OBJECT_KINDS) else ""

    def expert(self, sim: Simulation, episode: Episode) -> tuple[np.ndarray, float]:
        """Of the skill."""
        call = self.call(episode)
        return expert(sim, call, self.done(sim, call))

    def call(self, episode: Episode) -> SkillCall:
        """What is asked for."""
        args = (episode.roles["object"], episode.roles["goal"])
        return self.library.call(self.name, *args[: len(self.library.skills[self.name].params)])

    @staticmethod
    def done(sim: Simulation, call: SkillCall) -> bool:
        """Whether what tells the skill's success holds."""
        return _holds(measured(sim, was_open=call.spec.name == "close"), call)

    # -- drawing -------------------------------------------------------------------------------------------------------

    def _state(self, rng: np.random.Generator, can: bool, along: bool) -> tuple[Scene, SkillCall]:
        for attempt in range(TRIES):
            along &= attempt < SOON  # some work has no need of the skill
            errand = sample(rng, families=self.families)
            scene = errand.scene
            if len(scene.things) > MOST + 1:  # the table is one
                continue
            if any(t.kind in OBJECT_KINDS and t.kind not in self.kinds for t in scene.things):
                continue
            options = self._along(rng, errand) if along else self._anything(rng, scene, can)
            if options:
                later = np.arange(1, len(options) + 1) if along else np.ones(len(options))  # the fuller, the harder
                facts, call = options[int(rng.choice(len(options), p=later / later.sum()))]
                return Scene(things=scene.things, facts=facts), call
        raise ConfigError(
            f"none of {TRIES} drawn tables of {list(self.families) or 'all families'} with {list(self.kinds)} alone "
            f"allows {self.name}: give the task other families or kinds"
        )

    def _along(self, rng: np.random.Generator, errand: Errand) -> list[tuple[Facts, SkillCall]]:
        """When the skill is due on the way to what is asked."""
        return [(facts, call) for facts, call in draw_way(rng, self.library, errand) if call.spec.name == self.name]

    def _anything(self, rng: np.random.Generator, scene: Scene, can: bool) -> list[tuple[Facts, SkillCall]]:
        """How the skill can be called, or cannot, after some others."""
        facts = scene.facts
        for _ in range(int(rng.integers(0, BEFORE + 1))):
            call = draw_skill(rng, self.library, scene.things, facts)
            facts = facts if call is None else call.apply(facts)
        if can:
            calls = [c for c in sensible(self.library, scene.things, facts) if c.spec.name == self.name]
        else:
            calls = [c for c in self.library.calls(scene.things) if c.spec.name == self.name]
            calls = [c for c in calls if not c.applicable(facts) and not _holds(facts, c)]
        return [(facts, call) for call in calls]

    @staticmethod
    def _tool(rng: np.random.Generator, items: Sequence[Item]) -> tuple[float, float, float]:
        """Where the tool starts: anywhere, or low over something, as after the skill before."""
        if rng.random() < 0.5:
            return sample_tool(rng)
        item = items[int(rng.integers(len(items)))]
        height = float(rng.uniform(0.14, 0.2))
        y = item.y - 0.16 if item.kind == "drawer" else item.y
        return float(np.clip(item.x, 0.2, 0.45)), float(np.clip(y, -0.2, 0.2)), height


def _loose(rng: np.random.Generator, items: Sequence[Item], places: Mapping[str, str]) -> tuple[Item, ...]:
    """Things on and in others not quite where a layout has them: off the middle, and around a bowl anyhow."""
    there, turns = {item.name: item for item in items}, {item.name: float(rng.uniform(-np.pi, np.pi)) for item in items}
    found = []
    for item in items:
        under = there.get(places.get(item.name, ""))
        if under is not None:
            dx, dy, turn = item.x - under.x, item.y - under.y, 0.0
            if under.kind == "bowl":
                turn = turns[under.name]
                c, s = np.cos(turn), np.sin(turn)
                dx, dy = c * dx - s * dy, s * dx + c * dy
            x, y = (float(v) for v in np.array([under.x + dx, under.y + dy]) + rng.normal(0.0, LOOSE, 2))
            item = replace(item, x=x, y=y, yaw=item.yaw + turn)
        found.append(item)
    return tuple(found)


def _holds(facts: Facts, call: SkillCall) -> bool:
    return all((Literal(s.pred, s.args) in facts) == s.value for s in call.success)
