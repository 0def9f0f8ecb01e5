"""Scripted experts of the skills: where the tool should go next, from the present state alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...sim.scene import OBJECT_KINDS, Item
from ...sim.simulation import Simulation
from ...symbols import SkillCall
from ..tasks.base import grasping
from ..tasks.drawer import FINGER
from .measure import in_bowl, in_tray, tray_point

Move = tuple[np.ndarray, float]
"""Where the tool should go (3,) [m], and the gripper (1 = open)."""
RETREAT = 0.19
"""Height to which the tool rises when a skill is done [m]."""
FIRST, NEXT = 0.014, 0.03
"""How far from a bowl's middle the first cube is dropped, and what comes after [m]."""
OVER_BOWL, OVER_PILE, OVER_TRAY = 0.085, 0.03, 0.088
"""Heights of the tool from which things are let fall into bowls, above what lies there, and into the drawer [m]."""
PARK = (0.185, 0.215)
"""Rows on the robot's side of the table, where things are put that must go somewhere: x [m]."""
NARROW = 0.78
"""Opening of the gripper where something stands near."""
WIDE = 0.06
"""How far from its way the tool's hand can hit something [m]."""


def expert(sim: Simulation, call: SkillCall, done: bool) -> Move:
    """Where the tool should go for a skill; straight up where it is done."""
    tool = sim.tool_position
    if done:
        return np.array([tool[0], tool[1], max(RETREAT, tool[2])]), 1.0
    return _EXPERTS[call.spec.name](sim, *call.args)


# -- ways --------------------------------------------------------------------------------------------------------------


def top(sim: Simulation, item: Item) -> float:
    """Height of an item's highest point [m]."""
    if item.kind in OBJECT_KINDS:
        return float(sim.position(item.name)[2]) + item.height
    return {"bowl": 0.034, "drawer": 0.093}.get(item.kind, 0.002)


def _clearance(sim: Simulation, target: np.ndarray, held: str = "") -> float:
    """Height that the tool needs on its way to `target`, so that hand and what it holds hit nothing [m]."""
    start, end = sim.tool_position[:2], target[:2]
    below = 0.02
    if held:
        below += (
            sim.tool_position[2] - sim.position(held)[2] + next(i.height for i in sim.scene.items if i.name == held)
        )
    highest = 0.0
    for item in sim.scene.items:
        if item.name == held:
            continue
        if any(_distance(at, start, end) < wide for at, wide in _extent(sim, item)):
            highest = max(highest, top(sim, item))
    return highest + below


def _extent(sim: Simulation, item: Item) -> list[tuple[np.ndarray, float]]:
    """Points (2,) of an item [m], and how near a hand may come to them [m]."""
    at = sim.position(item.name)[:2]
    if item.kind != "drawer":
        return [(at, WIDE)]
    return [(at, WIDE), (np.array([item.x, item.y]), 0.14), (tray_point(sim, 0.0, 0.0), 0.1)]


def _distance(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    """Of a point from a straight way, all (2,) [m]."""
    way = end - start
    share = float(np.clip((point - start) @ way / max(1e-9, way @ way), 0.0, 1.0))
    return float(np.linalg.norm(point - start - share * way))


def _go(sim: Simulation, target: np.ndarray, held: str = "", *, radius: float = 0.012) -> np.ndarray:
    """Next point of a way over everything to `target` (3,): up, across, and down onto it."""
    tool = sim.tool_position
    offset = float(np.linalg.norm(tool[:2] - target[:2]))
    if offset < radius or (offset < 2.5 * radius and tool[2] < target[2] + 0.04):
        return target
    cone = target[2] + 0.035 + 1.2 * offset  # the closer to the axis, the lower the tool may already be
    height = max(target[2], min(cone, max(_clearance(sim, target, held), target[2] + 0.035)))
    free = float(np.clip((tool[2] - height + 0.045) / 0.03, 0.0, 1.0)) if offset > 3.0 * radius else 1.0
    across = tool[:2] + free * (target[:2] - tool[:2])
    return np.array([across[0], across[1], height])


def _carry(sim: Simulation, name: str, target: np.ndarray) -> Move | None:
    """Fetch a thing; then bring it to `target`, where the tool should be. None once it is there."""
    tool, item = sim.tool_position, sim.position(name)
    if not grasping(sim, name):
        low = 0.014 if item[2] < 0.05 else 0.0
        grasp = np.array([item[0], item[1], max(low, item[2] + 0.002)])
        ready = np.linalg.norm(tool[:2] - grasp[:2]) < 0.012 and abs(tool[2] - grasp[2]) < 0.010
        return (grasp, 0.0) if ready else (_go(sim, grasp), _opening(sim, name))
    offset = float(np.linalg.norm(tool[:2] - target[:2]))
    if offset < 0.008 and abs(tool[2] - target[2]) < 0.008:
        return None
    return _go(sim, target, name, radius=0.008), 0.0


def _opening(sim: Simulation, name: str) -> float:
    """How far the gripper opens to take a thing: less in a bowl or the drawer, and beside other things."""
    at, own = sim.position(name), next(i for i in sim.scene.items if i.name == name)
    walls = 0.64 if own.kind == "cylinder" else 0.72
    for item in sim.scene.items:
        if item.kind == "zone" or item.name == name:
            continue
        if item.kind == "drawer":
            if in_tray(sim, at):
                return walls
            continue
        away = float(np.linalg.norm(at[:2] - sim.position(item.name)[:2]))
        if item.kind == "bowl" and away < item.size:
            return walls
        if away < item.footprint + 0.06 and top(sim, item) > at[2] - own.height + 0.01:
            return NARROW
    return 1.0


# -- skills ------------------------------------------------------------------------------------------------------------


def _place_in(sim: Simulation, name: str, bowl: str) -> Move:
    own = next(i for i in sim.scene.items if i.name == name)
    aim, pile = _free_spot(sim, name, bowl)
    target = np.array([aim[0], aim[1], max(OVER_BOWL, pile + own.height + OVER_PILE)])
    item = sim.position(name)
    falling = np.linalg.norm(item[:2] - aim) < 0.02 and 0.03 < item[2] < target[2] + 0.035
    if falling or in_bowl(sim, own, bowl):
        return target, 1.0  # to take it again, in the bowl, would squeeze it out
    return _carry(sim, name, target) or (target, 1.0)


def _free_spot(sim: Simulation, name: str, bowl: str) -> tuple[np.ndarray, float]:
    """Where in a bowl (2,) [m] there is most room, and how high things are piled there [m]."""
    middle = sim.position(bowl)[:2]
    reach = 0.75 * next(i.size for i in sim.scene.items if i.name == bowl)
    others = [i for i in sim.scene.items if i.kind in OBJECT_KINDS and i.name != name]
    others = [i for i in others if np.linalg.norm(sim.position(i.name)[:2] - middle) < reach]
    if not others:  # a cube leaves room for more, on the robot's side; what is round would roll out from there
        own = next(i for i in sim.scene.items if i.name == name)
        return middle - np.array([FIRST if own.kind == "cube" else 0.0, 0.0]), 0.0
    angles = np.linspace(0.0, 2 * np.pi, 24, endpoint=False)
    spots = middle + NEXT * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    away = np.linalg.norm(spots[:, None] - np.array([sim.position(i.name)[:2] for i in others]), axis=2)
    best = int(away.min(1).round(3).argmax())  # of spots that are as good the first, at every step
    return spots[best], max([top(sim, i) for i, d in zip(others, away[best]) if d < 0.034], default=0.0)


def _set_down(sim: Simulation, name: str, spot: np.ndarray, rest: float) -> Move:
    """Lower a thing at `spot` (2,) until its middle is at `rest` [m], and let it go."""
    item, tool = sim.position(name), sim.tool_position
    if not grasping(sim, name):
        found = _carry(sim, name, np.zeros(3))
        assert found is not None
        return found
    correction, offset = spot - item[:2], float(np.linalg.norm(spot - item[:2]))  # it need not sit in the middle
    at = tool[:2] + correction
    height = rest + 0.002 + tool[2] - item[2]
    low = item[2] < rest + 0.006 or tool[2] < 0.016  # held askew it comes no lower
    if offset < 0.012 and low:
        return np.array([*at, tool[2]]), 1.0
    if offset < 0.010:
        return np.array([*at, height]), 0.0
    return _go(sim, np.array([*at, height]), name, radius=0.008), 0.0


def _place_on(sim: Simulation, name: str, zone: str) -> Move:
    return _set_down(sim, name, sim.position(zone)[:2], _height(sim, name))


def _stack(sim: Simulation, name: str, base: str) -> Move:
    below = sim.position(base)
    return _set_down(sim, name, below[:2], float(below[2]) + _height(sim, base) + _height(sim, name))


def _put_down(sim: Simulation, name: str) -> Move:
    return _set_down(sim, name, parking(sim, name), _height(sim, name))


def _height(sim: Simulation, name: str) -> float:
    return next(i.height for i in sim.scene.items if i.name == name)


def parking(sim: Simulation, name: str) -> np.ndarray:
    """The free spot (2,) [m] on the robot's side that is nearest to a thing."""
    own = next(i for i in sim.scene.items if i.name == name)
    at = sim.position(name)[:2]
    taken = [
        (np.array([i.x, i.y]) if i.kind == "drawer" else sim.position(i.name)[:2], i.footprint)
        for i in sim.scene.items
        if i.name != name and i.kind != "zone"
    ]
    best, least = np.array([PARK[0], 0.0]), np.inf
    for row, x in enumerate(PARK):
        for y in np.linspace(-0.18, 0.18, 25):
            spot = np.array([x, y])
            if all(np.linalg.norm(spot - p) > r + own.footprint + 0.022 for p, r in taken):
                cost = abs(y - at[1]) + 0.1 * row
                if cost < least:
                    best, least = spot, cost
    return best


def _store(sim: Simulation, name: str, drawer: str) -> Move:
    inside = [
        sim.position(i.name)
        for i in sim.scene.items
        if i.kind in OBJECT_KINDS and i.name != name and in_tray(sim, sim.position(i.name))
    ]
    aims = [tray_point(sim, across, -0.006) for across in (-0.027, 0.027)]
    room = [min([0.04, *(float(np.linalg.norm(aim - p[:2])) for p in inside)]) for aim in aims]
    aim = aims[int(np.argmax(np.array(room) - [0.0, 0.003]))]  # the first of those that are about as free
    target, item = np.array([aim[0], aim[1], OVER_TRAY]), sim.position(name)
    if np.linalg.norm(item[:2] - aim) < 0.014 and 0.03 < item[2] < 0.12:
        return target, 1.0
    return _carry(sim, name, target) or (target, 1.0)


def _outward(sim: Simulation) -> np.ndarray:
    yaw = next(i.yaw for i in sim.scene.items if i.kind == "drawer")
    return np.array([np.sin(yaw), -np.cos(yaw)])


def _open(sim: Simulation, drawer: str) -> Move:
    """Close the fingers around the handle and pull."""
    handle, tool, outward = sim.position(drawer), sim.tool_position, _outward(sim)
    grasp = np.array([handle[0], handle[1], handle[2] - 0.005])
    around = np.linalg.norm(tool[:2] - handle[:2]) < 0.02 and tool[2] < handle[2] + 0.012
    if around and sim.gripper_opening < 0.36:
        return np.array([*(tool[:2] + outward * 0.04), tool[2]]), 0.0
    if around:
        return grasp, 0.0
    return _go(sim, grasp), 0.55  # half open: wide fingers would hit the cabinet


def _close(sim: Simulation, drawer: str) -> Move:
    """Push the handle from the front."""
    handle, tool, outward = sim.position(drawer), sim.tool_position, _outward(sim)
    before = handle[:2] + outward * (FINGER + 0.02)
    sideways = abs((tool[:2] - handle[:2]) @ np.array([outward[1], -outward[0]]))
    if tool[2] < handle[2] + 0.02 and (tool[:2] - handle[:2]) @ outward > 0.01 and sideways < 0.03:
        return np.array([*(handle[:2] - outward * 0.03), handle[2]]), 0.0
    target = np.array([*before, handle[2]])
    return (target if np.linalg.norm(tool[:2] - before) < 0.02 else _go(sim, target)), 0.0


_EXPERTS: dict[str, Callable[..., Move]] = {
    "put_down": _put_down,
    "place_in": _place_in,
    "place_on": _place_on,
    "stack": _stack,
    "store": _store,
    "open": _open,
    "close": _close,
}
