"""Hold the tool above the named object."""

from __future__ import annotations

import numpy as np

from brachium.envs.language import Phrasings
from brachium.envs.tasks.base import WRONG_OBJECT, Episode, place_apart, sample_objects, sample_tool
from brachium.sim.scene import Scene
from brachium.sim.simulation import Simulation

HEIGHT = 0.15


class Hover:
    """Success: the tool is within `tolerance` [m] of a point 15 cm above the named object."""

    name = "hover"
    phrasings = Phrasings(
        train=("hover above the {object}", "wait over the {object}"), paraphrase=("stay above the {object}",)
    )

    def __init__(self, *, max_steps: int = 40, tolerance: float = 0.02) -> None:
        self.max_steps, self.tolerance = max_steps, tolerance

    def sample(self, rng: np.random.Generator, split: str) -> Episode:
        """Three objects of different colours."""
        items = sample_objects(rng, 3, ("cube", "ball"), split)
        roles = {"object": items[0].name, "goal": items[0].name}
        text = self.phrasings.sample(rng, split, roles)
        scene = Scene(items=place_apart(rng, items))
        return Episode(scene=scene, instruction=text, roles=roles, tool_start=sample_tool(rng))

    def _above(self, sim: Simulation, name: str) -> bool:
        target = sim.position(name) + np.array([0.0, 0.0, HEIGHT])
        return bool(np.linalg.norm(sim.tool_position - target) < self.tolerance)

    def success(self, sim: Simulation, episode: Episode) -> bool:
        """Above the named object."""
        return self._above(sim, episode.roles["object"])

    def failure(self, sim: Simulation, episode: Episode) -> str:
        """Above another object."""
        others = [i.name for i in sim.scene.items if i.name != episode.roles["object"]]
        return WRONG_OBJECT if any(self._above(sim, name) for name in others) else ""

    def expert(self, sim: Simulation, episode: Episode) -> tuple[np.ndarray, float]:
        """Up first, then over."""
        target = sim.position(episode.roles["object"]) + np.array([0.0, 0.0, HEIGHT])
        tool = sim.tool_position
        if tool[2] < target[2] - 0.02:
            return np.array([tool[0], tool[1], target[2]]), 1.0
        return target, 1.0
