"""Stack the named cube on another."""

from __future__ import annotations

import numpy as np

from ...sim.scene import Scene
from ...sim.simulation import Simulation
from ..language import STACK
from .base import OFF_TABLE, Episode, carry, fallen, grasping, held_out, place_apart, sample_objects, sample_tool


class Stack:
    """Success: the named cube rests on the other one, released and still."""

    name = "stack"
    phrasings = STACK

    def __init__(self, *, max_steps: int = 90, distractors: int = 1) -> None:
        self.max_steps, self.distractors = max_steps, distractors

    def sample(self, rng: np.random.Generator, split: str) -> Episode:
        """Cubes of different colours; the second is stacked on, and is no held-out one: the instruction names it."""
        while True:
            items = sample_objects(rng, 2 + self.distractors, ("cube",), split)
            if not held_out(items[1]):
                break
        placed = place_apart(rng, items, gap=0.04)
        roles = {"object": placed[0].name, "goal": placed[1].name}
        text = STACK.sample(rng, split, roles)
        return Episode(scene=Scene(items=placed), instruction=text, roles=roles, tool_start=sample_tool(rng))

    def success(self, sim: Simulation, episode: Episode) -> bool:
        """Resting on top, with the gripper away."""
        item, base = sim.position(episode.roles["object"]), sim.position(episode.roles["goal"])
        size = sim.scene.items[0].size
        resting = np.linalg.norm(item[:2] - base[:2]) < size and abs(item[2] - base[2] - 2 * size) < 0.006
        away = np.linalg.norm(sim.tool_position - item) > 0.02 or sim.gripper_opening > 0.75
        return bool(resting and away and sim.speed(episode.roles["object"]) < 0.02)

    def failure(self, sim: Simulation, episode: Episode) -> str:
        """A cube left the table."""
        return OFF_TABLE if any(fallen(sim, episode.roles[role]) for role in ("object", "goal")) else ""

    def expert(self, sim: Simulation, episode: Episode) -> tuple[np.ndarray, float]:
        """Carry over the base at a safe height, lower, let go."""
        name, base = episode.roles["object"], sim.position(episode.roles["goal"])
        item, tool = sim.position(name), sim.tool_position
        size = sim.scene.items[0].size
        rest = base[2] + 2 * size
        offset = float(np.linalg.norm(item[:2] - base[:2]))
        if offset < 0.012 and abs(item[2] - rest) < 0.008:
            return np.array([tool[0], tool[1], tool[2] + (0.05 if sim.gripper_opening > 0.7 else 0.0)]), 1.0
        if grasping(sim, name):
            correction = base[:2] - item[:2]  # the cube need not sit exactly between the fingers
            if offset < 0.008:
                return np.array([*(tool[:2] + correction), rest + 0.001 + tool[2] - item[2]]), 0.0
            height = rest + 0.04 if offset > 0.03 else rest + 0.012 + offset
            if item[2] < rest + 0.01 and offset > 0.03:
                return np.array([tool[0], tool[1], height + 0.01]), 0.0
            return np.array([*(tool[:2] + correction), height]), 0.0
        return carry(sim, name, np.array([base[0], base[1], rest + 0.04]), grasp_height=0.005)
