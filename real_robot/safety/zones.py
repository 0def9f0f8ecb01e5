"""Where a robot may be: a box for its tool, zones to keep out of, the table, and itself, through MuJoCo."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mujoco
import numpy as np

from ...errors import ConfigError
from ...sim.robot import RobotModel
from ..spec import RobotSpec

SHAPES = {"box": 3, "sphere": 1, "cylinder": 2, "capsule": 2}
"""Shape -> how many sizes it has: half lengths; radius; radius and half length."""


class PositionCheck(Protocol):
    """Whether a robot may be at a position of its axes."""

    def check(self, position: np.ndarray) -> str:
        """Why not, in a few words; empty where it may. Positions are float64 (j,)."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """An axis-aligned box in the base frame [m]."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]

    def __post_init__(self) -> None:
        for key in ("low", "high"):
            object.__setattr__(self, key, tuple(float(x) for x in getattr(self, key)))
        if len(self.low) != 3 or len(self.high) != 3 or not np.isfinite([*self.low, *self.high]).all():
            raise ConfigError(f"workspace: expected three finite numbers as low and high, got {self.low}, {self.high}")
        if any(a >= b for a, b in zip(self.low, self.high)):
            raise ConfigError(f"workspace: expected low below high, got {self.low} and {self.high}")


@dataclass(frozen=True, kw_only=True)
class KeepOut:
    """A body of space that no part of the robot may touch.

    Attributes:
        name: For people.
        shape: ``box``, ``sphere``, ``cylinder`` or ``capsule``.
        size: Half lengths; radius; radius and half length [m].
        position: Centre in the base frame [m].
        margin: Distance to keep from it [m].
    """

    name: str
    shape: str
    size: tuple[float, ...]
    position: tuple[float, float, float]
    margin: float = 0.01

    def __post_init__(self) -> None:
        for key in ("size", "position"):
            object.__setattr__(self, key, tuple(float(x) for x in getattr(self, key)))
        if self.shape not in SHAPES or len(self.size) != SHAPES[self.shape]:
            raise ConfigError(
                f"keep-out zone {self.name!r}: expected a shape and its sizes of {SHAPES}, got {self.shape} {self.size}"
            )
        numbers = [*self.size, *self.position, self.margin]
        if len(self.position) != 3 or not np.isfinite(numbers).all() or min(self.size) <= 0 or self.margin < 0:
            raise ConfigError(f"keep-out zone {self.name!r}: expected finite numbers and sizes above 0")


class ModelCheck:
    """Checks positions on a MuJoCo model of the robot: tool in the workspace, clear of zones, table and itself.

    Parts at most two joints apart, and those that touch each other at the robot's home position, may touch.

    Args:
        model: The robot.
        workspace: Box that the tool centre point stays in.
        keep_out: Zones that no part of the robot touches.
        table_height: Top of the table in the base frame [m]; None for no table.
        margin: Distance that parts of the robot keep from the table and each other [m].
        self_collision: Whether the robot is checked against itself.
    """

    def __init__(
        self,
        model: RobotModel,
        *,
        workspace: Box | None = None,
        keep_out: Sequence[KeepOut] = (),
        table_height: float | None = 0.0,
        margin: float = 0.0,
        self_collision: bool = True,
    ) -> None:
        self.robot, self.workspace = model, _as(Box, workspace)
        spec = model.spec()
        bodies = {body.name for body in spec.bodies}
        world = spec.worldbody
        mine = {"contype": 2, "conaffinity": 1}
        zones = [zone for given in keep_out if (zone := _as(KeepOut, given)) is not None]
        for zone in zones:
            shape = getattr(mujoco.mjtGeom, f"mjGEOM_{zone.shape.upper()}")
            size = [*zone.size, 0.0, 0.0][:3]
            world.add_geom(
                name=f"keep out {zone.name}", type=shape, size=size, pos=zone.position, margin=zone.margin, **mine
            )
        if table_height is not None:
            plane = mujoco.mjtGeom.mjGEOM_PLANE
            world.add_geom(
                name="the table", type=plane, size=[0, 0, 1], pos=[0, 0, table_height], margin=margin, **mine
            )
        for geom in spec.geoms:
            if geom.parent.name in bodies and geom.parent.name != "world":  # what only shows in the simulator, too
                geom.contype, geom.conaffinity = (3, 3) if self_collision else (0, 2)
                geom.margin = max(geom.margin, margin)
        self.model = spec.compile()
        self._data = mujoco.MjData(self.model)
        self._qpos = np.array([self.model.joint(j).qposadr[0] for j in model.joints])
        self._fingers = self._finger_addresses()
        self._site = self.model.site(model.site).id
        self._owner = [self.model.body(self.model.geom_bodyid[g]).name for g in range(self.model.ngeom)]
        self._allowed: set[tuple[int, int]] = set()
        self._place(np.append(model.home, 1.0))
        self._allowed = {pair for pair in self._touching() if 0 not in (self.model.geom_bodyid[g] for g in pair)}
        near = _neighbours(self.model.body_parentid)
        bodies = self.model.geom_bodyid
        count = range(self.model.ngeom)
        self._allowed |= {(a, b) for a in count for b in count if (bodies[a], bodies[b]) in near}

    def _finger_addresses(self) -> np.ndarray:
        """Joints that move with the gripper: the named one, if any, and those an equality ties to it."""
        if not self.robot.gripper_joint:
            return np.zeros(0, int)
        model, found = self.model, [self.model.joint(self.robot.gripper_joint).id]
        for k in range(model.neq):
            if model.eq_type[k] == mujoco.mjtEq.mjEQ_JOINT and found[0] in (model.eq_obj1id[k], model.eq_obj2id[k]):
                found += [j for j in (model.eq_obj1id[k], model.eq_obj2id[k]) if j not in found]
        return np.array([model.jnt_qposadr[j] for j in found])

    def check(self, position: np.ndarray) -> str:
        """Why the robot may not be at `position` (arm joints, gripper opening); empty where it may."""
        self._place(position)
        if self.workspace is not None:
            tool = self._data.site_xpos[self._site]
            for axis in range(3):
                if tool[axis] < self.workspace.low[axis]:
                    return f"tool at {'xyz'[axis]} = {tool[axis]:.3f} m, workspace from {self.workspace.low[axis]:g} m"
                if tool[axis] > self.workspace.high[axis]:
                    return f"tool at {'xyz'[axis]} = {tool[axis]:.3f} m, workspace to {self.workspace.high[axis]:g} m"
        for pair in self._touching():
            if pair not in self._allowed:
                first, second = (self._part(geom) for geom in pair)
                return f"{first} would touch {second}"
        return ""

    def _part(self, geom: int) -> str:
        return self.model.geom(geom).name if self.model.geom_bodyid[geom] == 0 else self._owner[geom]

    def _place(self, position: np.ndarray) -> None:
        joints = len(self._qpos)
        self._data.qpos[self._qpos] = position[:joints]
        if len(position) > joints:
            self._data.qpos[self._fingers] = position[joints] * self.robot.gripper_stroke
        mujoco.mj_kinematics(self.model, self._data)
        mujoco.mj_comPos(self.model, self._data)
        mujoco.mj_collision(self.model, self._data)

    def _touching(self) -> list[tuple[int, int]]:
        """Pairs of geoms nearer than their margins."""
        contacts = self._data.contact
        pairs = contacts.geom[: self._data.ncon]
        near = contacts.dist[: self._data.ncon] <= contacts.includemargin[: self._data.ncon]
        return [(min(a, b), max(a, b)) for a, b in pairs[near].tolist()]


def _neighbours(parents: np.ndarray) -> set[tuple[int, int]]:
    """Pairs of bodies at most two joints apart: their housings overlap, and their joints' limits keep them apart."""
    found = set()
    for body in range(1, len(parents)):
        up = int(parents[body])
        for other in (up, int(parents[up])):
            if other != 0:
                found |= {(body, other), (other, body)}
        found |= {(body, k) for k in range(1, len(parents)) if parents[k] == up and up != 0}
    return found


def model_check(spec: RobotSpec, model: RobotModel | None, **options: Any) -> ModelCheck | None:
    """A `ModelCheck` for a robot, where there is a model of it.

    Raises:
        ConfigError: Zones or a workspace without a model to check them on, or a model of another robot.
    """
    if model is None:
        if options.get("workspace") or options.get("keep_out"):
            raise ConfigError(
                f"robot {spec.name!r}: a workspace and keep-out zones need a MuJoCo model of the robot: safety.model"
            )
        return None
    wanted = spec.axes.names[: -1 if spec.has_gripper else None]
    if tuple(model.joints) != wanted:
        raise ConfigError(f"robot {spec.name!r} has the joints {list(wanted)}, its model {list(model.joints)}")
    return ModelCheck(model, **options)


def _as(kind: type, value: Any) -> Any:
    """A value, or the mapping in a YAML that describes it.

    Raises:
        ConfigError: It lacks something, or has something more.
    """
    if not isinstance(value, Mapping):
        return value
    known = inspect.signature(kind).parameters
    needed = {name for name, one in known.items() if one.default is one.empty}
    if needed - set(value) or set(value) - set(known):
        raise ConfigError(
            f"{kind.__name__}: expected {sorted(needed)} and perhaps {sorted(set(known) - needed)}, got {sorted(value)}"
        )
    return kind(**value)
