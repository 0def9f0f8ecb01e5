"""From a person's hand to axis targets: speeds, where the command goes on from, and when the person is in charge."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import mujoco
import numpy as np

from ...errors import ConfigError, RobotError, SpecMismatchError
from ...sim.kinematics import ArmKinematics
from ...sim.robot import RobotModel
from ..spec import MotionLimits, RobotSpec
from .teleoperator import Hand, Teleoperator

AHEAD_S = 0.15
"""What a person wants may be ahead of what is commanded by what the robot does in so long at its fastest [s]."""
LEADER_S = 0.25
"""The same of a leader arm."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How fast a hand moves a robot.

    Attributes:
        speed: Of the tool at full deflection [m/s].
        turn: Of its rotation [rad/s].
        share: Of an axis's own velocity limit, where there is no model of the arm.
        approach: Of an axis's velocity limit, while a leader arm and the robot are not yet in one place.
        leash: How far the wanted tool position may be ahead of the commanded one [m].
        grip_s: Time of the gripper from open to closed [s].
    """

    speed: float = 0.15
    turn: float = 0.8
    share: float = 0.3
    approach: float = 0.2
    leash: float = 0.05
    grip_s: float = 0.4

    def __post_init__(self) -> None:
        for key in ("speed", "turn", "share", "approach", "leash", "grip_s"):
            if not 0.0 < getattr(self, key) < 10.0:
                raise ConfigError(f"reach: expected {key} above 0 and below 10, got {getattr(self, key)}")


class Pilot:
    """A person at a device, as the control loop sees one.

    What the person wants is kept here and moves on from tick to tick, so that it has a velocity that the robot follows;
    what it starts from is what is commanded when the person takes over.

    Args:
        device: What the person holds.
        spec: The robot.
        model: Of the arm; twists then move its tool, otherwise its axes.
        reach: How fast.
        always: The person is in charge from the first motion on (collecting); otherwise while moving, and for `hold_s`
            afterwards (taking over from a policy).
        hold_s: See `always` [s].
        limits: Stricter ones than the robot's, as the safety layer's.

    Raises:
        SpecMismatchError: A leader arm with other axes than the robot's.
    """

    def __init__(
        self,
        device: Teleoperator,
        spec: RobotSpec,
        model: RobotModel | None,
        *,
        reach: Reach | None = None,
        always: bool = False,
        hold_s: float = 0.7,
        limits: MotionLimits | None = None,
    ) -> None:
        if device.feature is not None:
            mine, theirs = ((f.names, f.units, f.gripper) for f in (spec.axes, device.feature))
            if mine != theirs:
                raise SpecMismatchError(f"{device.name} leads other axes: expected {mine}, got {theirs}")
        self._limits = limits or spec.limits
        self._device, self._spec, self.reach = device, spec, reach or Reach()
        self._always, self._hold_s = always, hold_s
        self._kinematics = ArmKinematics(model) if model is not None and device.kind == "twist" else None
        self.events: deque[str] = deque()
        """What the person said, oldest first; who reads it takes it out."""
        self.failed = ""
        self.engaged = False
        self._hand = Hand(twist=np.zeros(6))
        self._active = -np.inf
        self._begun, self._together = False, False
        self._opening: float | None = None
        self._target: np.ndarray = np.zeros(spec.dof)

    def restart(self) -> None:
        """A new episode: nothing is in charge until the person moves."""
        self._begun, self.engaged, self._opening = False, False, None
        self._active = -np.inf
        self.events.clear()

    def takes_over(self) -> bool:
        """Whether the person moves the robot now."""
        now = time.monotonic()
        try:
            hand = self._device.read()
        except RobotError as error:  # the robot holds; a policy goes on only if a person says so
            self.failed = self.failed or str(error)
            self.events.append("stop")
            hand = Hand(twist=np.zeros(6))
        self.events.extend(hand.keys)
        self._hand = hand
        if hand.active:
            self._active, self._begun = now, True
        coming = self.engaged and hand.axes is not None and not self._together  # the arm is on its way to the leader
        charge = self._begun if self._always else now - self._active < self._hold_s or coming
        if not charge:
            self.engaged, self._opening = False, None
        return charge

    def target(self, commanded: np.ndarray, period: float) -> np.ndarray:
        """Where the person wants the axes (j,), who are commanded to be at `commanded` (j,)."""
        if not self.engaged:
            self.engaged, self._together, self._opening = True, False, None
            self._target = np.array(commanded, float)
        hand, limits = self._hand, self._limits
        before = self._target[-1]
        if hand.axes is not None:
            self._target = self._led(hand.axes, commanded, period)
        elif self._kinematics is not None:
            self._target = self._turned(hand.twist, commanded, period)
        else:
            count = min(6, self._arm)
            self._target[:count] += hand.twist[:count] * self.reach.share * limits.velocity[:count] * period
        # Where the robot does not follow, because it is slow or held up, the wish waits: let go, and it stops there.
        ahead = AHEAD_S * limits.velocity
        if hand.axes is None:
            self._target = np.clip(self._target, commanded - ahead, commanded + ahead)
        if self._spec.has_gripper:
            self._target[-1] = self._gripped(hand, before, period)
        self._target = np.clip(self._target, limits.low, limits.high)
        return self._target.copy()

    @property
    def _arm(self) -> int:
        """Number of axes without the gripper."""
        return self._spec.dof - self._spec.has_gripper

    def _gripped(self, hand: Hand, before: float, period: float) -> float:
        """The gripper on its way to what was said last since the person took over; where it was, if nothing was."""
        if hand.axes is not None:
            self._opening = float(hand.axes[-1])
        elif hand.grip:
            closed = hand.grip == "close" or (hand.grip == "toggle" and before > 0.5)
            self._opening = 0.0 if closed else 1.0
        wanted = before if self._opening is None else self._opening
        most = period / self.reach.grip_s
        return before + float(np.clip(wanted - before, -most, most))

    def _led(self, axes: np.ndarray, commanded: np.ndarray, period: float) -> np.ndarray:
        """Towards a leader arm: slowly until the two are in one place, then as it moves."""
        if axes.shape != self._target.shape or not np.isfinite(axes).all():
            raise RobotError(f"the leader arm: expected {len(self._target)} finite axes, got {axes}")
        limits, arm = self._limits, slice(0, self._arm)
        axes = np.clip(axes, limits.low, limits.high)
        if (np.abs(axes - commanded) > LEADER_S * limits.velocity)[arm].any():
            self._together = False  # a leader that jumps is approached, not followed
        if not self._together:
            step = self.reach.approach * limits.velocity * period
            self._together = bool((np.abs(axes - self._target) <= 2.0 * step)[arm].all())
            return self._target + np.clip(axes - self._target, -step, step)
        return np.array(axes, float)

    def _turned(self, twist: np.ndarray, commanded: np.ndarray, period: float) -> np.ndarray:
        """The tool moved by a twist in the base frame."""
        assert self._kinematics is not None
        count = self._arm
        if not np.abs(twist).max() > 0.0:
            return self._target.copy()
        place, quat = self._kinematics.pose(self._target[:count])
        here, _ = self._kinematics.pose(commanded[:count])
        wanted = place + np.clip(twist[:3], -1.0, 1.0) * self.reach.speed * period
        away = wanted - here
        distance = float(np.linalg.norm(away))
        if distance > self.reach.leash:
            wanted = here + away * (self.reach.leash / distance)
        spin = np.clip(twist[3:], -1.0, 1.0) * self.reach.turn * period
        angle = float(np.linalg.norm(spin))
        if angle > 1e-9:
            rotation, turned = np.zeros(4), np.zeros(4)
            mujoco.mju_axisAngle2Quat(rotation, spin / angle, angle)
            mujoco.mju_mulQuat(turned, rotation, quat)
            quat = turned / np.linalg.norm(turned)
        found = self._target.copy()
        found[:count] = self._kinematics.solve(wanted, quat, self._target[:count])
        most = self._limits.velocity[:count] * period  # near a singularity a small way is a large turn
        found[:count] = self._target[:count] + np.clip(found[:count] - self._target[:count], -most, most)
        return found
