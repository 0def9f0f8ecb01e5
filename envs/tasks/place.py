"""Pick up the named object and place it in the named bowl."""

from __future__ import annotations

import numpy as np

from ...sim.scene import Scene
from ...sim.simulation import Simulation
from ..language import PLACE
from .base import (
    OFF_TABLE,
    WRONG_GOAL,
    WRONG_OBJECT,
    Episode,
    carry,
    fallen,
    make_item,
    place_apart,
    sample_colors,
    sample_objects,
    sample_tool,
)

KINDS = ("cube", "cylinder")
RELEASE_HEIGHT = 0.085


class Place:
    """Success: the named object lies in the named bowl and the gripper has let it go.

    An object in the wrong bowl, or the wrong object in the bowl, is a failure.
    """

    name = "place"
    phrasings = PLACE

    def __init__(self, *, max_steps: int = 80, distractors: int = 2, bowls: int = 2) -> None:
        self.max_steps, self.distractors, self.bowls = max_steps, distractors, bowls

    def sample(self, rng: np.random.Generator, split: str) -> Episode:
        """Three objects and two bowls of different colours."""
        items = sample_objects(rng, 1 + self.distractors, KINDS, split)
        bowls = [make_item(color, "bowl") for color in sample_colors(rng, self.bowls)]
        placed = place_apart(rng, items + bowls, gap=0.03)
        roles = {"object": items[0].name, "goal": bowls[0].name}
        text = PLACE.sample(rng, split, roles)
        return Episode(scene=Scene(items=placed), instruction=text, roles=roles, tool_start=sample_tool(rng))

    def success(self, sim: Simulation, episode: Episode) -> bool:
        """The object is in the bowl, released."""
        return _inside(sim, episode.roles["object"], episode.roles["goal"])

    def failure(self, sim: Simulation, episode: Episode) -> str:
        """Something is where it should not be."""
        target, goal = episode.roles["object"], episode.roles["goal"]
        for item in sim.scene.items:
            if item.kind != "bowl":
                continue
            for other in sim.scene.items:
                wrong = (other.name == target) != (item.name == goal)
                if other.kind in KINDS and wrong and _inside(sim, other.name, item.name):
                    return WRONG_GOAL if other.name == target else WRONG_OBJECT
        return OFF_TABLE if fallen(sim, target) else ""

    def expert(self, sim: Simulation, episode: Episode) -> tuple[np.ndarray, float]:
        """Grasp from above, carry over the bowl, let go."""
        target, goal = episode.roles["object"], sim.position(episode.roles["goal"])
        item = sim.position(target)
        over = np.linalg.norm(item[:2] - goal[:2]) < 0.022
        if over and item[2] > 0.015:
            return np.array([goal[0], goal[1], RELEASE_HEIGHT]), 1.0
        return carry(sim, target, np.array([goal[0], goal[1], RELEASE_HEIGHT]), grasp_height=0.0)


def _inside(sim: Simulation, name: str, bowl: str) -> bool:
    item, centre = sim.position(name), sim.position(bowl)
    radius = next(i.size for i in sim.scene.items if i.name == bowl)
    released = np.linalg.norm(sim.tool_position - item) > 0.03
    return bool(np.linalg.norm(item[:2] - centre[:2]) < 0.75 * radius and item[2] < 0.045 and released)
