"""Scenes as a trained reader sees them, at once and whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ...spec import Observation
from ...symbols import Scene, Thing
from ...vla.scene_reader import Reading, SceneReader
from .asking import GRIPPER, TABLE, Kinds
from .beliefs import Beliefs
from .seeing import details, views

ZONE = "zone"
LOOKS = 3
"""Looks after which what is there may be corrected."""
TELLING = (-4.0, 8.0)
"""Log-odds that one look may add: what is not seen may be behind the hand, what is seen is there."""
NAMED = 2.0
"""Log-odds that the instruction's naming a thing adds: people name what is there."""
SYNONYMS = {"block": "cube", "blocks": "cube"}
SURE = 2.0
"""Mean log-odds from which on it is."""


@dataclass
class _Lane:
    """What is remembered.

    Attributes:
        beliefs: So far.
        recent: The last looks: how likely the drawer is open, and log-odds of places, (n, n + 2).
        looks: How many there were.
        present: Sum of the log-odds of everything that could be there.
    """

    beliefs: Beliefs
    recent: deque[tuple[float, Tensor]]
    looks: int = 0
    present: np.ndarray = field(default_factory=lambda: np.zeros(0))


class ReadScenes:
    """Reads scenes with a trained `SceneReader`.

    What is there is said at the first look, and corrected when several looks together are sure of something else;
    things do not come and go. What the instruction names is taken to be there rather than not; of two things on a zone,
    which holds one, the surer one is there. Where things are is what the last looks say on average: a hand on its way
    makes one look err, seldom the next. What was last seen in the drawer is in it while it is closed.

    Args:
        reader: `SceneReader`, or its folder.
        kinds: Of the world.
        memory: Looks that are averaged.
    """

    def __init__(self, *, reader: SceneReader | str, kinds: Kinds, memory: int = 3) -> None:
        if memory < 1:
            raise ConfigError(f"expected a memory of at least one look, got {memory}")
        self.memory = memory
        self.reader = SceneReader.load(reader) if isinstance(reader, str) else reader
        self.kinds = kinds
        known = {name: k for k, name in enumerate(self.reader.universe.names)}
        self._things = [(thing, known[thing.name]) for thing in kinds.things if thing.name in known]
        self._always = tuple(thing for thing in kinds.things if thing.kind == TABLE)
        self._lanes: dict[int, _Lane] = {}

    def reset(self, lane: int) -> None:
        """Forget what was seen in a lane."""
        self._lanes.pop(lane, None)

    def estimate(self, observation: Observation, lane: int) -> Scene:
        """The scene as it looks."""
        images = views(observation, self.reader.model.cameras)
        closer = details(observation, self.reader.details)
        reading = self.reader.read(images, np.asarray(observation.state, np.float32), closer)
        present = np.clip(reading.present[0].double().numpy(), *TELLING) + NAMED * self._named(
            str(observation.instruction)
        )
        state = self._seen(lane, present, reading)
        beliefs = state.beliefs
        state.recent.append((float(reading.open[0].sigmoid()), reading.place[0]))
        places = self._places([place for _, place in state.recent], beliefs.things)
        is_open = float(np.mean([opened for opened, _ in state.recent])) if beliefs.has_drawer else 0.0
        return beliefs.look(places, is_open, source="vision", stamp=float(observation.timestamp))

    def _named(self, instruction: str) -> np.ndarray:
        """One for every thing that the instruction names, else zero."""
        words = " ".join(SYNONYMS.get(word, word) for word in instruction.lower().split())
        return np.array([float(name in words) for name in self.reader.universe.names])

    def _single(self, things: tuple[Thing, ...], present: np.ndarray, reading: Reading) -> tuple[Thing, ...]:
        """Without what is said to be on a zone where something surer is."""
        places, number = self._places([reading.place[0]], things), {thing.name: k for thing, k in self._things}
        zones = {thing.name for thing in things if thing.kind == ZONE}
        best: dict[str, str] = {}
        for name, (place, _) in places.items():
            if place in zones and (place not in best or present[number[name]] > present[number[best[place]]]):
                best[place] = name
        return tuple(t for t in things if t.name not in places or best.get(places[t.name][0], t.name) == t.name)

    def _seen(self, lane: int, present: np.ndarray, reading: Reading) -> _Lane:
        """What is there, as far as the looks so far tell."""
        if lane not in self._lanes:
            things = self._single(tuple(t for t, k in self._things if present[k] > 0.0), present, reading)
            beliefs = Beliefs(kinds=self.kinds, things=(*things, *self._always))
            self._lanes[lane] = _Lane(beliefs, deque(maxlen=self.memory), 1, present)
            return self._lanes[lane]
        state = self._lanes[lane]
        state.present, state.looks = state.present + present, state.looks + 1
        mean, beliefs = state.present / state.looks, state.beliefs
        if state.looks >= LOOKS:
            there = {thing.name for thing in beliefs.things}
            hidden = beliefs.hidden
            kept = [
                thing
                for thing, k in self._things
                if mean[k] > (-SURE if thing.name in there else SURE) or thing.name in hidden
            ]
            beliefs.things = (*kept, *self._always)
        return state

    def _places(self, looks: Sequence[Tensor], things: tuple[Thing, ...]) -> dict[str, tuple[str, float]]:
        """The likeliest place of each thing that can be moved, and its probability, by some looks together."""
        names = self.reader.universe.names
        there = {thing.name for thing in things}
        allowed = torch.tensor([name in there for name in names] + [True, True])
        each = [look.masked_fill(~allowed, -torch.inf).double().softmax(1) for look in looks]
        shares = torch.stack(each).mean(0).numpy()
        labels = (*names, TABLE, GRIPPER)
        found = {}
        for thing, k in self._things:
            if thing.kind in self.kinds.movable and thing.name in there:
                best = int(np.argmax(shares[k]))
                found[thing.name] = (labels[best], float(shares[k, best]))
        return found
