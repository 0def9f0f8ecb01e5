"""Bring the tool to the named object."""

from __future__ import annotations

import numpy as np

from ...sim.scene import Scene
from ...sim.simulation import Simulation
from ..language import REACH
from .base import WRONG_OBJECT, Episode, place_apart, sample_objects, sample_tool

KINDS = ("cube", "cylinder", "ball")
ABOVE = 0.035
"""Height of the tool over the object's centre that counts as reached [m]."""


class Reach:
    """Success: the tool is within `tolerance` [m] of a point just above the named object.

    Going to another object first is a failure.
    """

    name = "reach"
    phrasings = REACH

    def __init__(self, *, max_steps: int = 40, tolerance: float = 0.025, objects: tuple[int, int] = (3, 5)) -> None:
        self.max_steps, self.tolerance, self.objects = max_steps, tolerance, objects

    def sample(self, rng: np.random.Generator, split: str) -> Episode:
        """Three to five objects of different colours."""
        count = int(rng.integers(self.objects[0], self.objects[1] + 1))
        items = sample_objects(rng, count, KINDS, split)
        roles = {"object": items[0].name, "goal": items[0].name}
        text = REACH.sample(rng, split, roles)
        return Episode(
            scene=Scene(items=place_apart(rng, items)), instruction=text, roles=roles, tool_start=sample_tool(rng)
        )

    def _reached(self, sim: Simulation, name: str) -> bool:
        target = sim.position(name) + np.array([0.0, 0.0, ABOVE])
        return bool(np.linalg.norm(sim.tool_position - target) < self.tolerance)

    def success(self, sim: Simulation, episode: Episode) -> bool:
        """The tool is at the named object."""
        return self._reached(sim, episode.roles["object"])

    def failure(self, sim: Simulation, episode: Episode) -> str:
        """The tool is at another object."""
        others = [i.name for i in sim.scene.items if i.name != episode.roles["object"]]
        return WRONG_OBJECT if any(self._reached(sim, name) for name in others) else ""

    def expert(self, sim: Simulation, episode: Episode) -> tuple[np.ndarray, float]:
        """Over the object, then down."""
        target = sim.position(episode.roles["object"]) + np.array([0.0, 0.0, ABOVE - 0.005])
        offset = float(np.linalg.norm(sim.tool_position[:2] - target[:2]))
        return np.array([target[0], target[1], target[2] + min(0.08, 0.8 * max(0.0, offset - 0.01))]), 1.0
