"""What a task is: a scene sampler, an instruction, success and failure predicates, and a scripted expert."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ...errors import ConfigError
from ...sim.scene import COLORS, Item, Scene
from ...sim.simulation import Simulation
from ..language import HELD_OUT_PAIRS, Phrasings

LOW, HIGH = np.array([0.24, -0.18]), np.array([0.45, 0.18])
"""Part of the table that things stand on, x and y [m]."""
HALF_SIZE = {"cube": 0.020, "cylinder": 0.019, "ball": 0.021, "bowl": 0.058, "zone": 0.052}
HOVER = 0.13
"""Height of the tool for moving above things [m]."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One drawn instance of a task.

    Attributes:
        scene: What stands on the table.
        instruction: What the policy is told.
        roles: Role (``object``, ``goal``) -> item name.
        tool_start: Where the tool starts [m].
        drawer_start: How far the drawer is out at the start [m].
    """

    scene: Scene
    instruction: str
    roles: dict[str, str] = field(default_factory=dict)
    tool_start: tuple[float, float, float] = (0.30, 0.0, 0.22)
    drawer_start: float = 0.0


WRONG_OBJECT, WRONG_GOAL, OFF_TABLE, OUT_OF_TIME = "wrong object", "wrong goal", "off the table", "out of time"
"""Why an episode failed."""


class Task(Protocol):
    """A task of the table-top suite; a new one is a file and a YAML."""

    name: str
    max_steps: int
    phrasings: Phrasings

    def sample(self, rng: np.random.Generator, split: str) -> Episode:
        """Draw an instance; `split` is one of `language.SPLITS`."""

    def success(self, sim: Simulation, episode: Episode) -> bool:
        """Whether the task is done now."""

    def failure(self, sim: Simulation, episode: Episode) -> str:
        """Why the episode is lost, in a few words that people and counts can use; empty while it is not."""

    def expert(self, sim: Simulation, episode: Episode) -> tuple[np.ndarray, float]:
        """Where an expert would send the tool next (3,) [m] and the gripper (1 = open), from the present state."""


def fallen(sim: Simulation, name: str) -> bool:
    """Whether a free object left the table."""
    return bool(sim.position(name)[2] < -0.03)


def sample_tool(rng: np.random.Generator) -> tuple[float, float, float]:
    """A start position of the tool above the table [m]."""
    x, y, z = rng.uniform([0.24, -0.12, 0.16], [0.38, 0.12, 0.26])
    return float(x), float(y), float(z)


def place_apart(rng: np.random.Generator, items: list[Item], gap: float = 0.022) -> tuple[Item, ...]:
    """Give each item a random place so that footprints stay `gap` [m] apart; rejection sampling."""
    for _ in range(200):
        placed: list[Item] = []
        for item in sorted(items, key=lambda i: -i.footprint):
            spot = _free_spot(rng, item, placed, gap)
            if spot is None:
                break
            placed.append(spot)
        else:
            order = {item.name: k for k, item in enumerate(items)}
            return tuple(sorted(placed, key=lambda i: order[i.name]))
    raise ConfigError(f"no room on the table for {[i.name for i in items]}; ask for fewer of them")


def _free_spot(rng: np.random.Generator, item: Item, placed: list[Item], gap: float) -> Item | None:
    margin = max(0.0, item.footprint - 0.03)
    for _ in range(60):
        x, y = rng.uniform(LOW + margin, HIGH - margin)
        if all(np.hypot(x - p.x, y - p.y) > item.footprint + p.footprint + gap for p in placed):
            return Item(
                name=item.name,
                kind=item.kind,
                rgb=item.rgb,
                x=float(x),
                y=float(y),
                size=item.size,
                yaw=float(rng.uniform(-0.5, 0.5)) if item.kind != "drawer" else item.yaw,
            )
    return None


def make_item(color: str, kind: str) -> Item:
    """An item called ``COLOR KIND`` at the origin."""
    return Item(name=f"{color} {kind}", kind=kind, rgb=COLORS[color], x=0.0, y=0.0, size=HALF_SIZE[kind])


def sample_objects(
    rng: np.random.Generator, count: int, kinds: tuple[str, ...], split: str, target_kinds: tuple[str, ...] = ()
) -> list[Item]:
    """Objects of different colours; the first is the target.

    The target's (colour, kind) is held out when `split` is ``pair`` and never otherwise.
    """
    _check_count(count, "objects")
    wanted = split == "pair"
    options = [
        (color, kind)
        for color in COLORS
        for kind in (target_kinds or kinds)
        if ((color, kind) in HELD_OUT_PAIRS) == wanted
    ]
    color, kind = options[int(rng.integers(len(options)))]
    others = [c for c in COLORS if c != color]
    picked = rng.permutation(len(others))[: count - 1]
    return [
        make_item(color, kind),
        *(make_item(others[int(i)], kinds[int(rng.integers(len(kinds)))]) for i in picked),
    ]


def held_out(item: Item) -> bool:
    """Whether training never names this item."""
    return tuple(item.name.split(" ")) in HELD_OUT_PAIRS


def _check_count(count: int, what: str) -> None:
    if count > len(COLORS):
        raise ConfigError(f"expected at most {len(COLORS)} {what} of different colours, got {count}")


def sample_colors(rng: np.random.Generator, count: int) -> list[str]:
    """Different colour words."""
    _check_count(count, "things")
    names = list(COLORS)
    return [names[int(i)] for i in rng.permutation(len(names))[:count]]


def approach(sim: Simulation, target: np.ndarray, *, radius: float = 0.012, hover: float = HOVER) -> np.ndarray:
    """Come down on `target` from above: move over it first, then descend while staying over it."""
    tool = sim.tool_position
    offset = float(np.linalg.norm(tool[:2] - target[:2]))
    if offset < radius or (offset < 2.5 * radius and tool[2] < target[2] + 0.04):
        return target
    # Slanted final approach: the closer to the axis, the lower the tool may already be.
    return np.array([target[0], target[1], max(target[2], min(hover, target[2] + 0.035 + 1.2 * offset))])


def grasping(sim: Simulation, name: str) -> bool:
    """Whether the fingers are closed on an object: it is between them and they stopped at its width."""
    size = next(i.size for i in sim.scene.items if i.name == name)
    opening = sim.gripper_opening * sim.embodiment.robot.gripper_stroke
    near = np.abs(sim.tool_position - sim.position(name))
    return bool(near[:2].max() < 0.02 and near[2] < 0.025 and opening < size + 0.008)


def carry(sim: Simulation, name: str, target: np.ndarray, grasp_height: float) -> tuple[np.ndarray, float]:
    """Pick an object up and bring the tool to `target` (x, y, z) by way of a safe height.

    Works from the present state alone, so it recovers when the object is dropped or moved.
    """
    tool, item = sim.tool_position, sim.position(name)
    if not grasping(sim, name):
        grasp = np.array([item[0], item[1], max(0.014, item[2] + grasp_height)])
        ready = np.linalg.norm(tool[:2] - grasp[:2]) < 0.012 and abs(tool[2] - grasp[2]) < 0.010
        if ready:
            return grasp, 0.0
        opening = 1.0
        if np.linalg.norm(tool[:2] - grasp[:2]) < 0.03 and tool[2] < grasp[2] + 0.03 and sim.gripper_opening < 0.8:
            # Fingers are closed beside or above the object: rise before opening would be slow; open here.
            opening = 1.0
        return approach(sim, grasp), opening
    away = float(np.linalg.norm(tool[:2] - target[:2]))
    if away > 0.02 and tool[2] < target[2] - 0.02 and item[2] < 0.05:
        return np.array([tool[0], tool[1], target[2]]), 0.0
    return np.array([target[0], target[1], target[2]]), 0.0
