"""From actions to actuator targets, and from target poses to actions: the control modes of an arm."""

from __future__ import annotations

from typing import Protocol

import mujoco
import numpy as np

from ..errors import SpecMismatchError
from ..spec import FeatureSpec
from .kinematics import ArmKinematics
from .robot import RobotModel

AXES = ("x", "y", "z")


class ControlMode(Protocol):
    """What the numbers of an action mean. A mode is a value; `driver` makes the state that belongs to one world."""

    def action_spec(self, robot: RobotModel) -> FeatureSpec:
        """Names, units and limits of an action."""

    def disturbance(self, robot: RobotModel) -> np.ndarray:
        """What counts as a disturbance of size 1 of each element of an action (a,); 0 where none is wanted."""

    def driver(self, robot: RobotModel) -> Driver:
        """A driver for one world."""


class Driver(Protocol):
    """Turns actions into actuator targets for one world."""

    def reset(self, joints: np.ndarray) -> None:
        """Start from joint angles [rad]."""

    def command(self, action: np.ndarray, joints: np.ndarray) -> np.ndarray:
        """Actuator targets (arm joints [rad], gripper joint [m]) for an action, at measured joint angles."""

    def encode(self, position: np.ndarray, quat: np.ndarray, gripper: float) -> np.ndarray:
        """The action that moves the tool towards a pose as far as the limits allow; gripper 1 is open."""


class EndEffectorDelta:
    """Change of the commanded tool pose in the base frame, and the gripper opening.

    The action is ``(dx, dy, dz [m], rx, ry, rz [rad, axis-angle], gripper [1 = open])``.

    Args:
        max_step: Largest change of each position axis in one action [m].
        max_turn: Largest change of each rotation axis in one action [rad].
        workspace_low, workspace_high: Box that the commanded position is kept in [m].
        leash: How far the command may run ahead of the measured tool [m].
    """

    def __init__(
        self,
        *,
        max_step: float = 0.04,
        max_turn: float = 0.2,
        workspace_low: tuple[float, float, float] = (0.14, -0.32, 0.012),
        workspace_high: tuple[float, float, float] = (0.56, 0.32, 0.36),
        leash: float = 0.06,
    ) -> None:
        self.max_step, self.max_turn, self.leash = max_step, max_turn, leash
        self.low, self.high = np.asarray(workspace_low, float), np.asarray(workspace_high, float)

    def action_spec(self, robot: RobotModel) -> FeatureSpec:
        """Seven elements, the field's usual end-effector action."""
        high = (self.max_step,) * 3 + (self.max_turn,) * 3 + (1.0,)
        return FeatureSpec(
            name="action",
            shape=(7,),
            names=(*(f"d{a}" for a in AXES), *(f"r{a}" for a in AXES), "gripper"),
            units=("m",) * 3 + ("rad",) * 3 + ("1",),
            low=(*(-h for h in high[:6]), 0.0),
            high=high,
            frame="base",
            reference="delta",
            rotation="axis_angle",
            gripper="open_is_1",
        )

    def disturbance(self, robot: RobotModel) -> np.ndarray:
        """The largest step of the position; the tool stays upright, and half-open is another action of the gripper."""
        return np.array([self.max_step] * 3 + [0.0] * 4)

    def driver(self, robot: RobotModel) -> EndEffectorDeltaDriver:
        """A driver for one world."""
        return EndEffectorDeltaDriver(self, robot)


class _ToolDriver:
    """Keeps the commanded tool pose of one world and solves inverse kinematics for it."""

    def __init__(self, mode: EndEffectorDelta | EndEffectorPose, robot: RobotModel) -> None:
        self.robot = robot
        self.kinematics = ArmKinematics(robot)
        self._low, self._high, self._leash, self._max_step = mode.low, mode.high, mode.leash, mode.max_step
        self.reset(np.asarray(robot.home))

    def reset(self, joints: np.ndarray) -> None:
        """Start from joint angles [rad]."""
        self._joints = np.array(joints, float)
        self.position, self.quat = self.kinematics.pose(self._joints)

    def _towards(self, position: np.ndarray, quat: np.ndarray, gripper: float, joints: np.ndarray) -> np.ndarray:
        """Actuator targets for a pose, which is pulled back to within the leash of the measured tool."""
        measured, _ = self.kinematics.pose(joints)
        ahead = np.clip(position - measured, -self._leash, self._leash)
        self.position, self.quat = np.clip(measured + ahead, self._low, self._high), quat
        self._joints = self.kinematics.solve(self.position, self.quat, self._joints)
        return np.append(self._joints, np.clip(gripper, 0.0, 1.0) * self.robot.gripper_stroke)

    def _step(self, position: np.ndarray) -> np.ndarray:
        """The way to a position as far as one step goes; a straight line is kept."""
        step = np.asarray(position, float) - self.position
        longest = float(np.abs(step).max())
        return step * (self._max_step / longest) if longest > self._max_step else step


class EndEffectorDeltaDriver(_ToolDriver):
    """Poses that are changed by actions."""

    def __init__(self, mode: EndEffectorDelta, robot: RobotModel) -> None:
        super().__init__(mode, robot)
        self.mode = mode

    def command(self, action: np.ndarray, joints: np.ndarray) -> np.ndarray:
        """Move the commanded pose by the action and return actuator targets."""
        mode = self.mode
        action = _checked(action, 7)
        step = np.clip(action[:3], -mode.max_step, mode.max_step)
        turn = np.clip(action[3:6], -mode.max_turn, mode.max_turn)
        quat = self.quat
        if np.any(np.abs(turn) > 1e-9):
            rotation, turned, angle = np.zeros(4), np.zeros(4), float(np.linalg.norm(turn))
            mujoco.mju_axisAngle2Quat(rotation, turn / angle, angle)
            mujoco.mju_mulQuat(turned, rotation, quat)
            quat = turned / np.linalg.norm(turned)
        return self._towards(self.position + step, quat, action[6], joints)

    def encode(self, position: np.ndarray, quat: np.ndarray, gripper: float) -> np.ndarray:
        """The action towards a pose; a straight line is kept when the position step is longer than allowed."""
        inverse, difference, needed = np.zeros(4), np.zeros(4), np.zeros(3)
        mujoco.mju_negQuat(inverse, self.quat)
        mujoco.mju_mulQuat(difference, np.asarray(quat, float), inverse)
        mujoco.mju_quat2Vel(needed, difference, 1.0)
        turn = np.clip(needed, -self.mode.max_turn, self.mode.max_turn)
        return np.concatenate([self._step(position), turn, [float(gripper)]]).astype(np.float32)


class EndEffectorPose:
    """Absolute targets of the tool's pose in the base frame, and the gripper opening.

    The action is ``(x, y, z [m], rot6d_0 .. rot6d_5, gripper [1 = open])``; the six numbers are the first two columns
    of the tool's rotation matrix (Zhou et al. 2019). What an absolute target means does not depend on what was executed
    before, so a chunk that arrives late still says where to go.

    Args:
        max_step: Longest step of each position axis that `encode` asks for [m].
        workspace_low, workspace_high: Box that the commanded position is kept in [m].
        leash: How far the command may run ahead of the measured tool [m].
    """

    def __init__(
        self,
        *,
        max_step: float = 0.04,
        workspace_low: tuple[float, float, float] = (0.14, -0.32, 0.012),
        workspace_high: tuple[float, float, float] = (0.56, 0.32, 0.36),
        leash: float = 0.06,
    ) -> None:
        self.max_step, self.leash = max_step, leash
        self.low, self.high = np.asarray(workspace_low, float), np.asarray(workspace_high, float)

    def action_spec(self, robot: RobotModel) -> FeatureSpec:
        """Ten elements; the pose part is that of the state."""
        return FeatureSpec(
            name="action",
            shape=(10,),
            names=(*AXES, *(f"rot6d_{i}" for i in range(6)), "gripper"),
            units=("m",) * 3 + ("1",) * 7,
            low=(*self.low.tolist(), *(-1.0,) * 6, 0.0),
            high=(*self.high.tolist(), *(1.0,) * 6, 1.0),
            frame="base",
            reference="absolute",
            rotation="rot6d",
            gripper="open_is_1",
        )

    def disturbance(self, robot: RobotModel) -> np.ndarray:
        """The longest step of the position; the tool stays upright, and half-open is another action of the gripper."""
        return np.array([self.max_step] * 3 + [0.0] * 7)

    def driver(self, robot: RobotModel) -> EndEffectorPoseDriver:
        """A driver for one world."""
        return EndEffectorPoseDriver(self, robot)


class EndEffectorPoseDriver(_ToolDriver):
    """Poses that actions name."""

    def command(self, action: np.ndarray, joints: np.ndarray) -> np.ndarray:
        """Actuator targets for a pose."""
        action = _checked(action, 10)
        return self._towards(action[:3], quat_from_rot6d(action[3:9], self.quat), action[9], joints)

    def encode(self, position: np.ndarray, quat: np.ndarray, gripper: float) -> np.ndarray:
        """The pose at most `max_step` from the commanded one on the straight line to a target."""
        matrix = np.zeros(9)
        mujoco.mju_quat2Mat(matrix, np.asarray(quat, float))
        columns = matrix.reshape(3, 3)
        there = np.clip(self.position + self._step(position), self._low, self._high)
        return np.concatenate([there, columns[:, 0], columns[:, 1], [float(gripper)]]).astype(np.float32)


def quat_from_rot6d(columns: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Quaternion wxyz (4,) of two columns (6,) of a rotation matrix, made orthonormal by Gram and Schmidt.

    Columns that are zero or parallel mean no rotation; then it is `fallback`.
    """
    first, second = columns[:3], columns[3:]
    length = float(np.linalg.norm(first))
    if length < 1e-6:
        return np.array(fallback, float)
    first = first / length
    second = second - first * (first @ second)
    length = float(np.linalg.norm(second))
    if length < 1e-6:
        return np.array(fallback, float)
    second = second / length
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, np.stack([first, second, np.cross(first, second)], axis=1).ravel())
    return quat


class JointPosition:
    """Absolute targets of the arm's joints [rad] and the gripper opening (1 = open).

    Args:
        max_speed: Largest change of a joint target in one action [rad].
    """

    def __init__(self, *, max_speed: float = 0.35) -> None:
        self.max_speed = max_speed

    def action_spec(self, robot: RobotModel) -> FeatureSpec:
        """One element a joint, then the gripper."""
        model = robot.spec().compile()
        limits = np.array([model.joint(name).range for name in robot.joints])
        return FeatureSpec(
            name="action",
            shape=(len(robot.joints) + 1,),
            names=(*robot.joints, "gripper"),
            units=("rad",) * len(robot.joints) + ("1",),
            low=(*limits[:, 0], 0.0),
            high=(*limits[:, 1], 1.0),
            reference="absolute",
            rotation="joint",
            gripper="open_is_1",
        )

    def disturbance(self, robot: RobotModel) -> np.ndarray:
        """Angles that move the tool about as far as the largest end-effector step; never the gripper."""
        return np.array([0.06] * len(robot.joints) + [0.0])

    def driver(self, robot: RobotModel) -> JointPositionDriver:
        """A driver for one world."""
        return JointPositionDriver(self, robot)


class JointPositionDriver:
    """Rate-limits joint targets of one world; `encode` goes through the end-effector driver's kinematics."""

    def __init__(self, mode: JointPosition, robot: RobotModel) -> None:
        self.mode, self.robot = mode, robot
        self._cartesian = EndEffectorDelta().driver(robot)
        model = self._cartesian.kinematics.model
        self._low, self._high = np.array([model.joint(name).range for name in robot.joints]).T
        self.reset(np.asarray(robot.home))

    def reset(self, joints: np.ndarray) -> None:
        """Start from joint angles [rad]."""
        self._joints = np.array(joints, float)
        self._cartesian.reset(self._joints)

    def command(self, action: np.ndarray, joints: np.ndarray) -> np.ndarray:
        """Move the joint targets towards the action, at most `max_speed` [rad] each, within the joint limits."""
        action = _checked(action, len(self.robot.joints) + 1)
        wanted = np.clip(action[:-1], self._low, self._high)
        step = np.clip(wanted - self._joints, -self.mode.max_speed, self.mode.max_speed)
        self._joints = self._joints + step
        return np.append(self._joints, np.clip(action[-1], 0.0, 1.0) * self.robot.gripper_stroke)

    def encode(self, position: np.ndarray, quat: np.ndarray, gripper: float) -> np.ndarray:
        """Joint targets one Cartesian step towards the pose."""
        self._cartesian.reset(self._joints)
        step = self._cartesian.encode(position, quat, gripper)
        targets = self._cartesian.command(step, self._joints)
        return np.append(targets[:-1], float(gripper)).astype(np.float32)


def _checked(action: np.ndarray, dim: int) -> np.ndarray:
    action = np.asarray(action, float)
    if action.shape != (dim,) or not np.all(np.isfinite(action)):
        raise SpecMismatchError(f"expected a finite action of shape ({dim},), got {action.shape}: {action}")
    return action
