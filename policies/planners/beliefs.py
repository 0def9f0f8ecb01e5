"""What is believed of a scene from look to look: places, the drawer, and what was seen to go into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...symbols import Literal, Scene, Thing
from .asking import DRAWER, GRIPPER, TABLE, Kinds


@dataclass
class Beliefs:
    """Of one lane.

    Attributes:
        kinds: Of the world.
        things: What is there; things do not come and go.
        hidden: Things last seen in the drawer while it was open, and not since it was closed on them.
    """

    kinds: Kinds
    things: tuple[Thing, ...]
    hidden: frozenset[str] = field(default_factory=frozenset)

    @property
    def has_drawer(self) -> bool:
        """Whether there is one."""
        return any(thing.kind == DRAWER for thing in self.things)

    def look(self, places: Mapping[str, tuple[str, float]], is_open: float, *, source: str, stamp: float) -> Scene:
        """The scene after a look.

        Args:
            places: Thing that can be moved -> the likeliest place and its probability; `GRIPPER` for none.
            is_open: Probability that the drawer is open.
            source: Who says so.
            stamp: When [s].
        """
        opened = self.has_drawer and is_open > 0.5
        known = dict(places)
        if self.has_drawer and not opened:  # what cannot be seen is where it was
            known |= {name: (DRAWER, 1.0) for name in self.hidden if name in known}
        kinds = {thing.name: thing.kind for thing in self.things}
        facts = {Literal("clear", (t.name,)) for t in self.things if t.kind not in self.kinds.inside}
        confidence: dict[Literal, float] = {}
        if self.has_drawer:
            confidence[Literal("open", (DRAWER,))] = max(is_open, 1.0 - is_open)
        if opened:
            facts.add(Literal("open", (DRAWER,)))
        for name, (place, p) in known.items():
            if place == GRIPPER:
                continue
            within = kinds[place] in self.kinds.inside
            fact = Literal("in" if within else "on", (name, place))
            facts.add(fact)
            confidence[fact] = p
            if within:
                facts.add(Literal("inside", (name,)))
            if place == DRAWER and not opened:
                facts.add(Literal("hidden", (name,)))
            if not within and place != TABLE:
                facts.discard(Literal("clear", (place,)))
        self.hidden = frozenset(name for name, (place, _) in known.items() if place == DRAWER)
        return Scene(things=self.things, facts=frozenset(facts), confidence=confidence, source=source, stamp=stamp)
