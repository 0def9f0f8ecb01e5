"""What stands on the table: a scene as plain values, before MuJoCo sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

OBJECT_KINDS = ("cube", "cylinder", "ball")
"""Kinds that move freely."""
FIXED_KINDS = ("bowl", "zone", "drawer")
"""Kinds that stay where they are put (the drawer's tray slides)."""

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.10, 0.25, 0.85),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.55, 0.15, 0.70),
    "orange": (0.95, 0.50, 0.05),
}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing on the table.

    Attributes:
        name: Unique in the scene, for example ``red cube``.
        kind: One of `OBJECT_KINDS` or `FIXED_KINDS`.
        rgb: Colour, 0..1.
        x, y: Centre on the table [m], base frame.
        size: Half edge, radius or scale of the kind [m].
        yaw: Rotation about z [rad].
        lift: Height of what it stands on [m].
    """

    name: str
    kind: str
    rgb: tuple[float, float, float]
    x: float
    y: float
    size: float
    yaw: float = 0.0
    lift: float = 0.0

    @property
    def height(self) -> float:
        """Height of the item's centre above the table when it rests [m]."""
        return {"cylinder": 0.95 * self.size, "bowl": 0.012, "zone": 0.001, "drawer": 0.05}.get(self.kind, self.size)

    @property
    def footprint(self) -> float:
        """Radius of the circle it needs on the table [m]."""
        return {"cube": math.sqrt(2.0) * self.size, "drawer": 0.11}.get(self.kind, self.size)


@dataclass(frozen=True, kw_only=True)
class CameraView:
    """A camera fixed to the table: it looks from `position` at `target` [m], vertical field of view `fovy` [deg]."""

    name: str = "front"
    position: tuple[float, float, float] = (0.68, 0.0, 0.62)
    target: tuple[float, float, float] = (0.34, 0.0, 0.02)
    fovy: float = 42.0

    def moved(self, position: tuple[float, ...], target: tuple[float, ...], fovy: float) -> CameraView:
        """Return a copy displaced by offsets [m] and [deg]."""
        px, py, pz = (a + b for a, b in zip(self.position, position))
        tx, ty, tz = (a + b for a, b in zip(self.target, target))
        return replace(self, position=(px, py, pz), target=(tx, ty, tz), fovy=self.fovy + fovy)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A table with a robot, items, one fixed camera and a light.

    Attributes:
        items: What stands on the table; names are unique.
        view: The fixed camera.
        light: Position of the light [m].
        brightness: Diffuse strength of the light, 0..1.
        table_rgb: Colour of the table top.
        floor_rgb: Colour of the floor below.
    """

    items: tuple[Item, ...] = ()
    view: CameraView = field(default_factory=CameraView)
    light: tuple[float, float, float] = (0.4, 0.3, 1.6)
    brightness: float = 0.5
    table_rgb: tuple[float, float, float] = (0.72, 0.68, 0.62)
    floor_rgb: tuple[float, float, float] = (0.35, 0.36, 0.38)
