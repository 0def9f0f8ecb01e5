"""A robot that is a formula: axes that follow with a lag, cameras that show where they are. For tests and dry runs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from ...errors import RobotError
from ...spec import FeatureSpec
from ..robot import Robot
from ..spec import Frame, Reading, RobotSpec


class MockRobot(Robot):
    """Axes that follow their commands like a first-order lag.

    Args:
        axes: Names of the axes [rad]; with `gripper`, a gripper's opening comes last.
        gripper: Whether there is one.
        cameras: Names of the cameras.
        image_size: Height and width of a picture [px].
        lag_s: Time constant of the lag [s].
        velocity, acceleration, jerk: Largest values of every axis.
    """

    def __init__(
        self,
        *,
        axes: Sequence[str] = ("j1", "j2", "j3"),
        gripper: bool = True,
        cameras: Sequence[str] = ("front",),
        image_size: int = 32,
        lag_s: float = 0.03,
        velocity: float = 2.0,
        acceleration: float = 10.0,
        jerk: float = 200.0,
    ) -> None:
        names = (*axes, *(["gripper"] if gripper else []))
        count = len(names)
        self.spec = RobotSpec(
            name="mock",
            axes=FeatureSpec(
                name="axes",
                shape=(count,),
                names=names,
                units=("rad",) * len(axes) + ("1",) * gripper,
                low=(-2.0,) * len(axes) + (0.0,) * gripper,
                high=(2.0,) * len(axes) + (1.0,) * gripper,
                gripper="open_is_1" if gripper else "none",
            ),
            velocity=(velocity,) * count,
            acceleration=(acceleration,) * count,
            jerk=(jerk,) * count,
            command_hz=500.0,
            state_hz=1000.0,
            cameras=tuple(FeatureSpec(name=c, shape=(image_size, image_size, 3), dtype="uint8") for c in cameras),
            camera_hz=50.0,
            watchdog_s=0.2,
        )
        self._size, self._lag = image_size, lag_s
        self.commands: list[tuple[float, np.ndarray]] = []
        self.halts: list[str] = []
        self._connected = False
        self._position: np.ndarray = np.zeros(count)
        self._goal = self._position.copy()
        self._velocity: np.ndarray = np.zeros(count)
        self._moved = self._heard = 0.0
        self._engaged = False
        self._fault = ""

    def connect(self) -> None:
        """Nothing to open."""
        self._connected, self._engaged, self._fault = True, False, ""
        self._moved = self._heard = time.monotonic()

    def read(self) -> Reading:
        """Where the axes are now."""
        if not self._connected:
            raise RobotError("the mock robot is not connected")
        now = time.monotonic()
        self._advance(now)
        stamp = np.floor(now * self.spec.camera_hz) / self.spec.camera_hz
        frames = {name: Frame(image=self._picture(k), timestamp=stamp) for k, name in enumerate(self.spec.camera_names)}
        return Reading(
            position=self._position.copy(),
            velocity=self._velocity.copy(),
            timestamp=now,
            frames=frames,
            fault=self._fault,
        )

    def _advance(self, now: float) -> None:
        """Follow the goal until `now`; hold when nobody commands any more."""
        assert self.spec.watchdog_s is not None
        if self._engaged and not self._fault and now - self._heard > self.spec.watchdog_s:
            self._fault = "watchdog: no command"
        elapsed = now - self._moved
        if elapsed > 0:
            before = self._position
            goal = before if self._fault else self._goal
            self._position = goal + (before - goal) * np.exp(-elapsed / self._lag)
            self._velocity = (self._position - before) / elapsed
            self._moved = now

    def _picture(self, camera: int) -> np.ndarray:
        """Bars as high as the axes are far, and as bright as their last digits: the smallest motion is seen."""
        image = np.full((self._size, self._size, 3), 40 + 20 * camera, np.uint8)
        low, high = self.spec.limits.low, self.spec.limits.high
        heights = np.clip((self._position - low) / (high - low), 0.0, 1.0)
        width = max(1, self._size // len(heights))
        for k, share in enumerate(heights):
            bar = image[self._size - int(share * self._size) :, k * width : (k + 1) * width]
            bar[:] = int(1e3 * share) % 216 + 40
        return image

    def apply(self, position: np.ndarray) -> None:
        """Take a goal."""
        if not self._connected:
            raise RobotError("the mock robot is not connected")
        now = time.monotonic()
        self._advance(now)
        self._heard, self._engaged = now, True
        self.commands.append((now, position.copy()))
        if not self._fault:
            self._goal = position.copy()

    def halt(self, why: str) -> None:
        """Stay."""
        self.halts.append(why)
        self._fault = self._fault or f"halted: {why}"

    def rest(self) -> None:
        """No commands come for a while."""
        self._engaged = False

    def release(self) -> None:
        """Take a fault back."""
        self._fault, self._goal, self._engaged = "", self._position.copy(), False

    def disconnect(self) -> None:
        """Nothing to close."""
        self._connected = False
