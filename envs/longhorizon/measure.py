"""What holds on a simulated table: geometry and contacts as literals."""

from __future__ import annotations

import numpy as np

from ...sim.scene import OBJECT_KINDS, Item
from ...sim.simulation import Simulation
from ...symbols import Facts, Thing
from ..tasks.base import grasping
from .domain import TABLE, facts_of

OPEN_AT, CLOSED_AT = 0.07, 0.02
"""How far the drawer is out at least to be open, and at most to be closed [m]."""
STILL = 0.05
"""Below this speed a thing rests [m/s]."""
PILED = 0.05
"""Height of what is under a thing in a bowl at most [m]."""
LEVEL = 0.012
"""How far from its resting height a thing may be [m]."""


def things_in(sim: Simulation) -> tuple[Thing, ...]:
    """What is on the table, the table included."""
    return (*(Thing(name=i.name, kind=i.kind) for i in sim.scene.items), TABLE)


def measured(sim: Simulation, was_open: bool) -> Facts:
    """The facts of a simulated table. What is in the hand, in the air or leaning is on nothing.

    Args:
        sim: The table.
        was_open: Whether the drawer was open before: half-way it still is what it was.
    """
    return facts_of(places(sim), things_in(sim), drawer_open(sim, was_open))


def has_drawer(sim: Simulation) -> bool:
    """Whether there is one."""
    return any(item.kind == "drawer" for item in sim.scene.items)


def drawer_open(sim: Simulation, was_open: bool) -> bool:
    """Whether there is a drawer that is open."""
    return has_drawer(sim) and sim.drawer_opening > (CLOSED_AT if was_open else OPEN_AT)


def places(sim: Simulation) -> dict[str, str]:
    """Thing that can be moved -> what it rests on or in, for those that do."""
    movable = [item for item in sim.scene.items if item.kind in OBJECT_KINDS]
    found = {}
    for item in movable:
        carried = has_drawer(sim) and in_tray(sim, sim.position(item.name))  # what lies in the drawer moves with it
        if grasping(sim, item.name) or (sim.speed(item.name) > STILL and not carried):
            continue
        place = _place(sim, item, movable)
        if place:
            found[item.name] = place
    return found


def _place(sim: Simulation, item: Item, movable: list[Item]) -> str:
    at = sim.position(item.name)
    if at[2] < -0.03:
        return ""
    for other in sim.scene.items:
        if other.kind == "drawer" and in_tray(sim, at):
            return other.name
        if other.kind == "bowl" and in_bowl(sim, item, other.name):
            return other.name
    for other in movable:
        if other.kind == "cube" and other.name != item.name:
            below = sim.position(other.name)
            level = abs(at[2] - below[2] - other.height - item.height) < 0.008
            if level and np.linalg.norm(at[:2] - below[:2]) < other.size:
                return other.name
    if abs(at[2] - item.height) > LEVEL:
        return ""
    for other in sim.scene.items:
        if other.kind == "zone" and np.linalg.norm(at[:2] - sim.position(other.name)[:2]) < other.size:
            return other.name
    return TABLE.name


def in_bowl(sim: Simulation, item: Item, bowl: str) -> bool:
    """Whether something, by its middle, is in a bowl: on its floor, or on what is in it already."""
    at, middle, size = (
        sim.position(item.name),
        sim.position(bowl),
        next(i.size for i in sim.scene.items if i.name == bowl),
    )
    return bool(np.linalg.norm(at[:2] - middle[:2]) < 0.75 * size and at[2] < item.height + PILED)


def in_tray(sim: Simulation, at: np.ndarray) -> bool:
    """Whether a point (3,) [m] is in the drawer's tray."""
    cabinet = next(i for i in sim.scene.items if i.kind == "drawer")
    c, s = np.cos(cabinet.yaw), np.sin(cabinet.yaw)
    x, y = at[0] - cabinet.x, at[1] - cabinet.y
    across, along = c * x + s * y, -s * x + c * y + sim.drawer_opening
    return bool(abs(across) < 0.058 and -0.058 < along < 0.054 and at[2] < 0.045)


def tray_point(sim: Simulation, across: float, along: float) -> np.ndarray:
    """A point of the tray (2,) [m] on the table, given in the tray's own axes."""
    cabinet = next(i for i in sim.scene.items if i.kind == "drawer")
    c, s = np.cos(cabinet.yaw), np.sin(cabinet.yaw)
    y = along - sim.drawer_opening
    return np.array([cabinet.x + c * across - s * y, cabinet.y + s * across + c * y])
