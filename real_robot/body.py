"""Between a robot and an embodiment: states from readings, and axis targets from actions."""

from __future__ import annotations

from typing import Any, Protocol

import mujoco
import numpy as np

from ..errors import RobotError, SpecMismatchError
from ..sim.actuation import EndEffectorPose
from ..sim.embodiment import SimEmbodiment
from ..sim.kinematics import ArmKinematics
from ..spec import EmbodimentSpec, FeatureSpec
from .spec import RobotSpec


class Body(Protocol):
    """What makes a robot an embodiment that policies are trained for.

    Attributes:
        embodiment: What policies see, feel and do.
    """

    embodiment: EmbodimentSpec

    def start(self, position: np.ndarray) -> None:
        """Commands go on from axis positions (j,)."""

    def state(self, position: np.ndarray) -> np.ndarray:
        """The embodiment's state float32 (s,) at measured axis positions (j,)."""

    def advance(self, before: np.ndarray, after: np.ndarray, share: float, measured: np.ndarray) -> np.ndarray:
        """Axis targets (j,) at the end of a tick.

        Args:
            before, after: Absolute actions: where the plan is when the tick begins and when it ends (a,). Delta
                actions: the one that is being executed, twice.
            share: Part of an action's time that this tick is.
            measured: Axis positions (j,).
        """

    def action(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """The action (a,) that moves commanded axes from `before` to `after` (j,): how motions become training data."""


class ArmBody:
    """An arm with a model of its kinematics, and a control mode of the simulator: the same numbers mean the same.

    A delta is spread evenly over its action's time. Absolute targets are a path, which is followed; what is off it,
    because another chunk took over, comes back to it within about an action's time.

    Args:
        arm: Robot model, control mode, cameras and rate.
    """

    def __init__(self, arm: SimEmbodiment) -> None:
        self.arm, self.embodiment = arm, arm.spec
        self._driver = arm.control.driver(arm.robot)
        self._kinematics = ArmKinematics(arm.robot)
        self._is_delta = arm.spec.action.reference == "delta"
        self._low, self._high = np.asarray(arm.spec.action.low), np.asarray(arm.spec.action.high)
        self.start(np.array([*arm.robot.home, 1.0]))

    def start(self, position: np.ndarray) -> None:
        """Commands go on from axis positions (joints [rad], gripper opening)."""
        self._driver.reset(np.asarray(position[:-1], float))
        self._aim = np.zeros(0) if self._is_delta else self.action(position, position).astype(float)

    def state(self, position: np.ndarray) -> np.ndarray:
        """Tool pose, gripper opening, joints."""
        joints = np.asarray(position[:-1], float)
        place, columns = self._pose(joints)
        return np.concatenate([place, columns, [position[-1]], joints]).astype(np.float32)

    def _pose(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tool position (3,) [m] and two columns of its rotation matrix (6,)."""
        place, quat = self._kinematics.pose(joints)
        matrix = np.zeros(9)
        mujoco.mju_quat2Mat(matrix, quat)
        return place, matrix.reshape(3, 3)[:, :2].T.ravel()

    def advance(self, before: np.ndarray, after: np.ndarray, share: float, measured: np.ndarray) -> np.ndarray:
        """Axis targets at the end of a tick."""
        if not (np.isfinite(after).all() and np.isfinite(before).all()):
            return np.full(len(measured), np.nan)  # the safety layer's business
        before, after = (np.clip(np.asarray(x, float), self._low, self._high) for x in (before, after))
        gripper = after[-1]
        if self._is_delta:
            action = after * share
        else:  # in the action's own space: a tool on a straight way stays upright on it
            action = self._aim = after + (self._aim - before) * max(0.0, 1.0 - share)
        action[-1] = gripper
        target = self._driver.command(action, np.asarray(measured[:-1], float))
        target[-1] = gripper
        return target

    def action(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """The action that moves commanded axes from `before` to `after`."""
        if isinstance(self.arm.control, EndEffectorPose):
            return np.concatenate([*self._pose(np.asarray(after[:-1], float)), after[-1:]]).astype(np.float32)
        if not self._is_delta:
            return np.asarray(after, np.float32)
        place, quat = self._kinematics.pose(np.asarray(before[:-1], float))
        there, turned = self._kinematics.pose(np.asarray(after[:-1], float))
        inverse, difference, turn = np.zeros(4), np.zeros(4), np.zeros(3)
        mujoco.mju_negQuat(inverse, quat)
        mujoco.mju_mulQuat(difference, turned, inverse)
        mujoco.mju_quat2Vel(turn, difference, 1.0)
        return np.concatenate([there - place, turn, after[-1:]]).astype(np.float32)


class JointBody:
    """A robot whose state and actions are its own axes: absolute targets in, measured positions out.

    Args:
        embodiment: Its state and action have the robot's axes, by name, in an order of their own.
        robot: The robot.

    Raises:
        SpecMismatchError: An axis, unit, reference or gripper sign differs.
    """

    def __init__(self, embodiment: EmbodimentSpec, robot: RobotSpec) -> None:
        self.embodiment = embodiment
        axes = dict(zip(robot.axes.names, robot.axes.units))
        for feature in (embodiment.state, embodiment.action):
            wrong = [f"{name} [{unit}]" for name, unit in zip(feature.names, feature.units) if axes.get(name) != unit]
            if wrong or not feature.names or not feature.units:
                known = [f"{name} [{unit}]" for name, unit in axes.items()]
                raise SpecMismatchError(
                    f"{feature.name}: expected axes of {robot.name!r} {known}, got {wrong or 'none'}"
                )
        if embodiment.action.reference != "absolute" or set(embodiment.action.names) != set(axes):
            raise SpecMismatchError(
                f"expected an absolute target for every axis of {robot.name!r}, got {embodiment.action.reference} "
                f"{list(embodiment.action.names)}"
            )
        if robot.has_gripper and embodiment.action.gripper not in ("none", robot.axes.gripper):
            raise SpecMismatchError(f"gripper: {embodiment.action.gripper} against {robot.axes.gripper}")
        order = robot.axes.names
        self._seen = np.array([order.index(name) for name in embodiment.state.names])
        self._moved = np.array([embodiment.action.names.index(name) for name in order])
        self._back = np.array([order.index(name) for name in embodiment.action.names])
        self._target: np.ndarray = np.zeros(robot.dof)

    def start(self, position: np.ndarray) -> None:
        """Commands go on from axis positions."""
        self._target = np.array(position, float)

    def state(self, position: np.ndarray) -> np.ndarray:
        """The measured axes."""
        return np.asarray(position, float)[self._seen].astype(np.float32)

    def advance(self, before: np.ndarray, after: np.ndarray, share: float, measured: np.ndarray) -> np.ndarray:
        """On the plan, to which what is off it comes back within about an action's time."""
        start, end = (np.asarray(x, float)[self._moved] for x in (before, after))
        self._target = end + (self._target - start) * max(0.0, 1.0 - share)
        return self._target.copy()

    def action(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """The targets themselves."""
        return np.asarray(after, np.float32)[self._back]


def own_embodiment(robot: Any, control_hz: float) -> EmbodimentSpec:
    """What a robot is without a policy that says so: that of its model, or its axes as states and absolute actions."""
    arm, spec = getattr(robot, "body", None), robot.spec
    if isinstance(arm, SimEmbodiment):
        return arm.spec
    axes = spec.axes
    common = {"shape": axes.shape, "names": axes.names, "units": axes.units, "gripper": axes.gripper}
    return EmbodimentSpec(
        name=spec.name,
        robot=spec.name,
        control_hz=control_hz,
        cameras=spec.cameras,
        state=FeatureSpec(name="state", **common),
        action=FeatureSpec(name="action", low=axes.low, high=axes.high, **common),
    )


def body_of(robot: object, spec: RobotSpec, embodiment: EmbodimentSpec) -> Body:
    """What makes `robot` the embodiment that a policy is for.

    Raises:
        SpecMismatchError: It cannot be made.
        RobotError: Cameras that the policy needs are missing, or of another size.
    """
    for camera in embodiment.cameras:
        mine = {c.name: c.shape for c in spec.cameras}
        if mine.get(camera.name) != camera.shape:
            raise RobotError(
                f"robot {spec.name!r}: expected a camera {camera.name!r} of {camera.shape}, got {mine or 'no cameras'}"
            )
    arm = getattr(robot, "body", None)
    if isinstance(arm, SimEmbodiment):
        try:
            embodiment.require_same(arm.spec, "the policy", f"robot {spec.name!r}")
        except SpecMismatchError as error:
            raise SpecMismatchError(
                f"{error}\nFor a simulated robot, type: embodiment@robot.env.embodiment={embodiment.name}"
            ) from error
        return ArmBody(arm)
    return JointBody(embodiment, spec)
