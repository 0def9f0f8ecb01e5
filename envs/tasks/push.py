"""Push the named object onto the named zone."""

from __future__ import annotations

import numpy as np

from ...sim.scene import Item, Scene
from ...sim.simulation import Simulation
from ..language import PUSH
from .base import (
    HALF_SIZE,
    OFF_TABLE,
    WRONG_OBJECT,
    Episode,
    fallen,
    make_item,
    place_apart,
    sample_colors,
    sample_objects,
    sample_tool,
)

KINDS = ("cube", "cylinder")
PUSH_HEIGHT = 0.017
TRAVEL_HEIGHT = 0.085
OPENING = 0.3
"""Gripper opening while pushing: two fingers a little apart hold an object straighter than one."""


class Push:
    """Success: the centre of the named object lies within `tolerance` [m] of the centre of the named zone.

    Another object pushed onto the zone, or the object fallen from the table, is a failure.
    """

    name = "push"
    phrasings = PUSH

    def __init__(self, *, max_steps: int = 80, tolerance: float = 0.045, distractors: int = 2) -> None:
        self.max_steps, self.tolerance, self.distractors = max_steps, tolerance, distractors

    def sample(self, rng: np.random.Generator, split: str) -> Episode:
        """Three objects and two zones of different colours; the object starts off its zone."""
        while True:
            items = sample_objects(rng, 1 + self.distractors, KINDS, split)
            colors = sample_colors(rng, 2)
            zones = [make_item(color, "zone") for color in colors]
            placed = place_apart(rng, items + zones, gap=0.03)
            item, zone = placed[0], placed[len(items)]
            if _clear_path(placed, item, zone):
                break
        roles = {"object": item.name, "goal": zone.name}
        text = PUSH.sample(rng, split, roles)
        return Episode(scene=Scene(items=placed), instruction=text, roles=roles, tool_start=sample_tool(rng))

    def success(self, sim: Simulation, episode: Episode) -> bool:
        """The object is on the zone."""
        return _on_zone(sim, episode.roles["object"], episode.roles["goal"], self.tolerance)

    def failure(self, sim: Simulation, episode: Episode) -> str:
        """Another object is on the zone, or the object is gone."""
        others = [i.name for i in sim.scene.items if i.kind in KINDS and i.name != episode.roles["object"]]
        if any(_on_zone(sim, name, episode.roles["goal"], self.tolerance) for name in others):
            return WRONG_OBJECT
        return OFF_TABLE if fallen(sim, episode.roles["object"]) else ""

    def expert(self, sim: Simulation, episode: Episode) -> tuple[np.ndarray, float]:
        """Go behind the object at travel height, down, and push through its centre with the fingers slightly apart."""
        tool = sim.tool_position
        item, zone = sim.position(episode.roles["object"]), sim.position(episode.roles["goal"])
        direction = zone[:2] - item[:2]
        distance = float(np.linalg.norm(direction))
        direction /= max(distance, 1e-6)
        side = np.array([-direction[1], direction[0]])
        along, across = float((tool[:2] - item[:2]) @ direction), float((tool[:2] - item[:2]) @ side)
        standoff = HALF_SIZE["cube"] + 0.030
        low = tool[2] < PUSH_HEIGHT + 0.02
        if low and along < -0.018 and abs(across) < 0.014:
            # Behind and lined up: push, steering back to the line through object and zone.
            reach = min(0.03, distance + 0.01)
            goal = item[:2] + direction * (reach - HALF_SIZE["cube"] - 0.008) - 0.6 * across * side
            return np.array([*goal, PUSH_HEIGHT]), OPENING
        behind = item[:2] - direction * standoff
        offset = float(np.linalg.norm(tool[:2] - behind))
        if offset < 0.014 or (low and offset < 0.022):
            return np.array([*behind, PUSH_HEIGHT]), OPENING
        if low and along < -0.03 and abs(across) < 0.05:
            # Beside the line, behind the object: shift at table height.
            return np.array([*behind, PUSH_HEIGHT]), OPENING
        return np.array([*behind, TRAVEL_HEIGHT if offset > 0.03 else PUSH_HEIGHT + 2.0 * offset]), OPENING


def _on_zone(sim: Simulation, name: str, zone: str, tolerance: float) -> bool:
    return bool(np.linalg.norm(sim.position(name)[:2] - sim.position(zone)[:2]) < tolerance)


def _clear_path(items: tuple[Item, ...], item: Item, zone: Item) -> bool:
    """Whether no other object stands in the corridor of the push, and the tool can stand behind the object."""
    start, end = np.array([item.x, item.y]), np.array([zone.x, zone.y])
    direction = (end - start) / np.linalg.norm(end - start)
    back = start - 0.06 * direction
    if not (0.18 < back[0] < 0.52 and abs(back[1]) < 0.27):
        return False
    for other in items:
        if other.kind == "zone" or other.name == item.name:
            continue
        point = np.array([other.x, other.y])
        along = np.clip((point - back) @ direction, 0.0, np.linalg.norm(end - back))
        if np.linalg.norm(point - back - along * direction) < 0.055:
            return False
    return True
