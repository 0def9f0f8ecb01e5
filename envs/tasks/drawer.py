"""Open or close the drawer."""

from __future__ import annotations

import numpy as np

from ...sim.scene import Item, Scene
from ...sim.simulation import Simulation
from ...sim.world import DRAWER_TRAVEL
from ..language import CLOSE_DRAWER, OPEN_DRAWER
from .base import Episode, approach, make_item, place_apart, sample_colors, sample_tool

WOOD = (0.48, 0.32, 0.18)
FINGER = 0.026
"""Distance from the tool centre to the outside of the closed fingers plus half the handle [m]."""


class Drawer:
    """Success: the drawer is at least `open_at` [m] out (opening) or at most `closed_at` [m] out (closing).

    Args:
        close: Close the drawer instead of opening it.
    """

    def __init__(
        self, *, close: bool = False, max_steps: int = 70, open_at: float = 0.07, closed_at: float = 0.012
    ) -> None:
        self.close, self.max_steps, self.open_at, self.closed_at = close, max_steps, open_at, closed_at
        self.name = "close_drawer" if close else "open_drawer"
        self.phrasings = CLOSE_DRAWER if close else OPEN_DRAWER

    def sample(self, rng: np.random.Generator, split: str) -> Episode:
        """A cabinet on the left edge and up to two objects."""
        drawer = Item(
            name="drawer",
            kind="drawer",
            rgb=WOOD,
            x=float(rng.uniform(0.30, 0.42)),
            y=float(rng.uniform(0.20, 0.24)),
            size=1.0,
            yaw=float(rng.uniform(-0.15, 0.15)),
        )
        objects = [make_item(color, "cube") for color in sample_colors(rng, int(rng.integers(0, 3)))]
        while True:
            placed = place_apart(rng, objects)
            if all(np.hypot(p.x - drawer.x, p.y - drawer.y) > 0.26 for p in placed):
                break
        roles = {"object": "drawer", "goal": "drawer"}
        text = self.phrasings.sample(rng, split, roles)
        start = float(rng.uniform(0.06, DRAWER_TRAVEL)) if self.close else float(rng.uniform(0.0, 0.02))
        return Episode(
            scene=Scene(items=(drawer, *placed)),
            instruction=text,
            roles=roles,
            tool_start=sample_tool(rng),
            drawer_start=start,
        )

    def success(self, sim: Simulation, episode: Episode) -> bool:
        """The drawer is where it was asked to be."""
        opening = sim.drawer_opening
        return opening < self.closed_at if self.close else opening > self.open_at

    def failure(self, sim: Simulation, episode: Episode) -> str:
        """A drawer can always be tried again."""
        return ""

    def expert(self, sim: Simulation, episode: Episode) -> tuple[np.ndarray, float]:
        """Open: close the fingers around the handle and pull. Close: push the handle from the front."""
        handle, tool = sim.position("drawer"), sim.tool_position
        yaw = next(i.yaw for i in sim.scene.items if i.name == "drawer")
        outward = np.array([np.sin(yaw), -np.cos(yaw)])
        if self.close:
            before = handle[:2] + outward * (FINGER + 0.02)
            aligned = np.linalg.norm(tool[:2] - before) < 0.02
            behind = (tool[:2] - handle[:2]) @ outward > 0.01
            if (
                tool[2] < handle[2] + 0.02
                and behind
                and abs((tool[:2] - handle[:2]) @ [outward[1], -outward[0]]) < 0.03
            ):
                return np.array([*(handle[:2] - outward * 0.03), handle[2]]), 0.0
            target = np.array([*before, handle[2]])
            return (target if aligned else approach(sim, target, hover=0.14)), 0.0
        grasp = np.array([handle[0], handle[1], handle[2] - 0.005])
        around = np.linalg.norm(tool[:2] - handle[:2]) < 0.02 and tool[2] < handle[2] + 0.012
        if around and sim.gripper_opening < 0.36:
            return np.array([*(tool[:2] + outward * 0.04), tool[2]]), 0.0
        if around:
            return grasp, 0.0
        return approach(sim, grasp, hover=0.14), 0.55  # half open: wide fingers would hit the cabinet
