"""Where the things of long-horizon work stand: spots on the table, and places on and in one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...errors import ConfigError
from ...sim.scene import Item
from ...symbols import Thing
from ..tasks.base import HIGH, LOW, make_item
from ..tasks.drawer import WOOD

BOWL, ZONE = 0.050, 0.045
"""Radii of bowls and zones [m]: a little smaller than for single tasks, where nothing falls into them."""
FROM_DRAWER = 0.25
"""Distance of things from the cabinet's middle [m]."""
LANE = (0.035, 0.25)
"""Half width and length of the way of the drawer's handle and of the hand at it, from the cabinet's middle [m]."""
ATTEMPTS = 200
"""Layouts tried, ever tighter, before there is said to be no room."""
RING, ASIDE = 4, 0.042
"""Things beside one another in a bowl at most, and the distance of their middles [m]."""
TRAY = 0.011
"""Height of the drawer's floor [m]."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Spots for all things; those that stand on or in others keep theirs for when they are put down.

    Attributes:
        items: Of the scene; each at its spot.
    """

    items: tuple[Item, ...]

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        things: Sequence[Thing],
        *,
        gap: float = 0.02,
        least: float = 0.004,
        bowl: float = BOWL,
        lane: bool = False,
    ) -> Layout:
        """Draw spots.

        Args:
            rng: Of the episode.
            things: What is there.
            gap, least: Between things where there is room, and where there is little [m].
            bowl: Radius of bowls [m].
            lane: Keep free what a hand needs to pull the drawer's handle.

        Raises:
            ConfigError: There is no room at all.
        """
        cabinet = None
        if any(t.kind == "drawer" for t in things):
            x, y, yaw = (float(rng.uniform(*limits)) for limits in ((0.32, 0.40), (0.21, 0.24), (-0.1, 0.1)))
            cabinet = Item(name="drawer", kind="drawer", rgb=WOOD, x=x, y=y, size=1.0, yaw=yaw)
        wanted = [_sized(make_item(t.color, t.kind), bowl) for t in things if t.kind not in ("drawer", "table")]
        wanted.sort(key=lambda item: -item.footprint)
        for attempt in range(ATTEMPTS):
            room = max(least, gap * (1.0 - attempt / ATTEMPTS))
            near = FROM_DRAWER - 0.08 * attempt / ATTEMPTS
            placed: list[Item] = [cabinet] if cabinet else []
            for item in wanted:
                spot = _spot(rng, item, placed, room, near, lane)
                if spot is None:
                    break
                placed.append(spot)
            else:
                order = {t.name: k for k, t in enumerate(things)}
                return cls(items=tuple(sorted(placed, key=lambda item: order[item.name])))
        raise ConfigError(f"no room on the table for {[t.name for t in things]}")

    def item(self, name: str) -> Item:
        """An item by its name."""
        return next(item for item in self.items if item.name == name)

    def position(self, name: str, places: Mapping[str, str], opening: float) -> np.ndarray:
        """Where a thing's middle is (3,) [m].

        Args:
            name: Of a thing that can be moved.
            places: Movable thing -> what it is on or in.
            opening: How far the drawer is out [m].
        """
        item, place = self.item(name), places[name]
        if place == "table":
            return np.array([item.x, item.y, item.height])
        under = self.item(place)
        alike = [n for n, p in places.items() if p == place]
        rank = alike.index(name)
        if under.kind == "cube":
            return self.position(place, places, opening) + np.array([0.0, 0.0, under.height + item.height])
        if under.kind == "drawer":
            across, along = 0.027 * (2 * (rank % 2) - 1), -0.006 - opening + 0.04 * (rank // 2)
            c, s = np.cos(under.yaw), np.sin(under.yaw)
            spot = [under.x + c * across - s * along, under.y + s * across + c * along]
            return np.array([*spot, TRAY + item.height])
        if under.kind == "zone":
            return np.array([under.x, under.y, item.height])
        beside = min(len(alike), RING)
        angle = under.yaw + 2.0 * np.pi * (rank % RING + 0.5) / beside
        radius = 0.0 if beside == 1 else 0.5 * ASIDE / np.sin(np.pi / beside)
        spot = [under.x + radius * np.cos(angle), under.y + radius * np.sin(angle)]
        return np.array([*spot, 0.008 + item.height + 2.0 * item.height * (rank // RING)])

    def placed(self, places: Mapping[str, str], opening: float) -> tuple[Item, ...]:
        """The items with those that can be moved where they are."""
        found = []
        for item in self.items:
            if item.name in places:
                x, y, z = (float(v) for v in self.position(item.name, places, opening))
                within = next(
                    (i for i in self.items if i.name == places[item.name] and i.kind in ("bowl", "drawer")), None
                )
                yaw = item.yaw if within is None else within.yaw  # or corners are in one another
                item = replace(item, x=x, y=y, lift=z - item.height, yaw=yaw)
            found.append(item)
        return tuple(found)


def _spot(
    rng: np.random.Generator, item: Item, placed: Sequence[Item], gap: float, near: float, lane: bool
) -> Item | None:
    """The item where it is apart from those that are there; None where no place was found."""
    margin = max(0.0, item.footprint - 0.03)
    for _ in range(60):
        x, y = (float(v) for v in rng.uniform(LOW + margin, HIGH - margin))
        put = replace(item, x=x, y=y, yaw=float(rng.uniform(-0.5, 0.5)))
        if all(_apart(put, other, gap, near, lane) for other in placed):
            return put
    return None


def _apart(item: Item, other: Item, gap: float, near: float, lane: bool) -> bool:
    away = float(np.hypot(item.x - other.x, item.y - other.y))
    if other.kind == "drawer":
        return away > near and not (lane and _in_lane(item, other))
    return away > item.footprint + other.footprint + gap


def _sized(item: Item, bowl: float) -> Item:
    return replace(item, size={"bowl": bowl, "zone": ZONE}.get(item.kind, item.size))


def _in_lane(item: Item, cabinet: Item) -> bool:
    """Whether a thing stands where the handle or a hand at it comes by."""
    c, s = np.cos(cabinet.yaw), np.sin(cabinet.yaw)
    x, y = item.x - cabinet.x, item.y - cabinet.y
    across, along = c * x + s * y, -s * x + c * y
    return bool(abs(across) < LANE[0] + item.footprint and along > -LANE[1] - item.footprint)
