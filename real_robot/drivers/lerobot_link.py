"""LeRobot's robot in the child's process: one thread reads it, moves it, and checks what it says of itself."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import RobotError
from ..cameras import fitted
from ..driver_process import Link, LinkState
from ..spec import Frame
from . import lerobot_make as make
from .lerobot_units import AxisMap

VELOCITY_S = 0.1
"""Velocities are differences of positions over this time [s]: encoders are coarse."""
AT_REST = {"rad": 0.05, "m": 0.01, "1": 0.05}
"""An axis slower than this is at rest, per second."""
NEAR = {"rad": 0.1, "m": 0.01, "1": 1.0}
"""An axis at rest so near to its goal keeps the goal when it is stopped: it bears a load, or grips something."""
CLIPPED = 0.02
"""A robot that takes another goal than the one it was told, by this share of the axis's range, is at fault."""


@dataclass(frozen=True, kw_only=True)
class CameraMap:
    """A camera of LeRobot's robot, and the picture that is delivered.

    Attributes:
        key: Of LeRobot's observation.
        shape: Height, width and 3 of the delivered picture [px].
        crop: Whether its middle is cut out where the shapes differ, or the picture is squeezed.
    """

    key: str
    shape: tuple[int, int, int]
    crop: bool = True

    @classmethod
    def build(cls, name: str, given: Mapping[str, Any]) -> CameraMap:
        """From YAML: ``{key: front, height: 224, width: 224, crop: true}``."""
        wanted = {"height", "width"}
        if not isinstance(given, Mapping) or not wanted <= set(given) <= wanted | {"key", "crop"}:
            raise RobotError(f"camera {name!r}: expected key, height, width and crop, got {given}")
        shape = (int(given["height"]), int(given["width"]), 3)
        return cls(key=str(given.get("key") or name), shape=shape, crop=bool(given.get("crop", True)))


class LeRobotLink(Link):
    """A robot of LeRobot.

    Args:
        config: Its configuration, with ``type``.
        axes: What its keys mean.
        cameras: Name -> camera.
        failures: Readings that may fail one after the other.
        packages: Modules that bring robots.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        axes: AxisMap,
        cameras: Mapping[str, CameraMap],
        *,
        failures: int = 5,
        packages: Sequence[str] = (),
    ) -> None:
        self._config, self._axes, self._cameras = dict(config), axes, dict(cameras)
        self._failures, self._packages = failures, tuple(packages)
        self._units = tuple(axis.axis_unit for axis in axes.axes)
        self._ranges = np.array([axis.high - axis.low for axis in axes.axes])
        self.robot: Any = None
        self._past: deque[tuple[float, np.ndarray]] = deque()
        self._state: LinkState | None = None
        self._goal: np.ndarray | None = None
        self._frames: dict[str, Frame] = {}
        self._images: dict[str, Any] = {}
        self._failed, self._fault = 0, ""

    # -- opening -------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the robot, hold it against the YAML before anything is touched, connect, see that it is calibrated."""
        kind = self._config["type"]
        self.robot = make.make_robot(self._config, self._packages)
        self._check_features()
        self._check_units()
        try:
            make.connect(self.robot)
            calibrated = self.robot.is_calibrated is not False  # some robots cannot tell
        except (ImportError, EOFError, *make.TROUBLE) as error:
            raise RobotError(f"{kind}: {make.one_line(error)}") from error
        if not calibrated:
            words = [f"--robot.{key}={self._config[key]}" for key in ("type", "port", "id") if self._config.get(key)]
            typed = f"lerobot-calibrate {' '.join(words)}"
            raise RobotError(f"{kind} is not calibrated, or not with the file of its id. Type: {typed}")
        self._first()

    def _first(self) -> None:
        """A reading must come; cameras may need a moment for theirs."""
        until = time.monotonic() + 5.0
        while True:
            try:
                self._look()
                return
            except (RobotError, *make.TROUBLE) as error:
                if time.monotonic() > until:
                    raise RobotError(f"{self._config['type']} gives no readings: {make.one_line(error)}") from error
                time.sleep(0.05)

    def _check_features(self) -> None:
        """The keys of the YAML are keys of the robot, and its motors are all in the YAML."""
        kind = f"robot {self._config['type']!r}"
        seen, moved = dict(self.robot.observation_features), dict(self.robot.action_features)
        self._axes.require(seen, f"{kind}, what it observes")
        self._axes.require(moved, f"{kind}, what it takes")
        if forgotten := sorted(key for key in moved if key not in self._axes.keys and not _is_extra(key, moved)):
            raise RobotError(f"{kind} is moved by {sorted(moved)}: expected an axis for each, got none for {forgotten}")
        pictures = {key: shape for key, shape in seen.items() if isinstance(shape, tuple)}
        for name, camera in self._cameras.items():
            if len(pictures.get(camera.key, ())) != 3 or pictures[camera.key][2] != 3:
                raise RobotError(
                    f"camera {name!r}: expected a camera {camera.key!r} among LeRobot's, got {pictures or 'none'}; "
                    "cameras are named in config.cameras"
                )

    def _check_units(self) -> None:
        """Units and scales against the motors' modes and calibration, where the robot tells them."""
        for axis in self._axes.axes:
            found = make.motor_of(self.robot, axis.motor)
            if found is None:
                self._check_switch(axis.unit, axis.key)
                continue
            bus, motor = found
            mode = getattr(bus.motors[motor], "norm_mode", None)
            if mode is not None:
                axis.check_mode(str(getattr(mode, "value", mode)))
            calibration = (getattr(bus, "calibration", None) or {}).get(motor)
            table = getattr(bus, "model_resolution_table", {})
            resolution = table.get(getattr(bus.motors[motor], "model", None))
            if calibration is not None and resolution:
                axis.check_calibration(calibration.range_min, calibration.range_max, resolution)

    def _check_switch(self, unit: str, key: str) -> None:
        """Robots without a bus may still have LeRobot's switch between degrees and shares."""
        degrees = getattr(getattr(self.robot, "config", None), "use_degrees", None)
        if (degrees is True and unit == "normalised") or (degrees is False and unit == "degrees"):
            raise RobotError(f"{key!r} is said to be {unit}, and the robot has use_degrees: {str(degrees).lower()}")

    # -- running -------------------------------------------------------------------------------------------------------

    def read(self) -> LinkState:
        """What is measured now; where a reading fails, the last one, which grows old."""
        try:
            self._look()
            self._failed = 0
        except (RobotError, *make.TROUBLE) as error:
            self._failed += 1
            print(f"reading {self._failed} failed: {make.one_line(error)}", flush=True)
            if self._failed > self._failures or self._state is None:
                raise RobotError(f"{self._config['type']}: {make.one_line(error)}") from error
        assert self._state is not None
        return self._state

    def _look(self) -> None:
        before = time.monotonic()  # joints come first, however long pictures take after them
        seen = self.robot.get_observation()
        position = self._axes.to_axes(seen)
        self._past.append((before, position))
        while len(self._past) > 2 and self._past[1][0] <= before - VELOCITY_S:
            self._past.popleft()
        then, where = self._past[0]
        velocity = (position - where) / max(before - then, 1e-3)
        for name, camera in self._cameras.items():
            self._take(name, camera, seen[camera.key], before)
        self._state = LinkState(
            position=position, velocity=velocity, timestamp=before, fault=self._fault, frames=dict(self._frames)
        )

    def _take(self, name: str, camera: CameraMap, image: Any, before: float) -> None:
        """The picture, when it is another than the last."""
        source, stamp = self._source(camera.key, image), before
        if source is not None:
            if image is self._images.get(name):
                return
            with getattr(source, "frame_lock", None) or contextlib.nullcontext():  # picture and time change together
                if source.latest_frame is image:  # by another clock, which runs as fast
                    stamp = time.monotonic() - (time.perf_counter() - float(source.latest_timestamp))
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise RobotError(f"camera {name!r}: expected a picture uint8 (height, width, 3)")
        self._images[name] = image
        made = getattr(source or (getattr(self.robot, "cameras", None) or {}).get(camera.key), "color_mode", "rgb")
        if str(getattr(made, "value", made)).lower() == "bgr":
            image = image[..., ::-1]
        image = fitted(np.ascontiguousarray(image), camera.shape, crop=camera.crop)
        self._frames[name] = Frame(image=image, timestamp=stamp)

    def _source(self, key: str, image: Any) -> Any:
        """LeRobot's camera of a picture, where it notes when pictures come: the one that holds it, or of its name."""
        cameras = dict(getattr(self.robot, "cameras", None) or {})
        noted = {name: one for name, one in cameras.items() if getattr(one, "latest_timestamp", None) is not None}
        return next((one for one in noted.values() if one.latest_frame is image), noted.get(key))

    def move(self, position: np.ndarray) -> None:
        """Send a goal; a robot that takes another one is stopped, and at fault. Nothing is sent while readings fail."""
        if self._failed:
            return
        self._goal = np.array(position, float)
        took = self._send(self._goal)
        if not isinstance(took, Mapping) or not set(self._axes.keys) <= set(took):
            return
        apart = np.abs(self._axes.to_axes(took) - self._goal) / self._ranges
        if (apart > CLIPPED).any():
            worst = int(np.argmax(apart))
            axis = self._axes.axes[worst]
            self._fault = (
                f"told {axis.name} = {self._goal[worst]:.4g}, the robot took {axis.from_key(took[axis.key]):.4g} "
                f"{self._units[worst]}: LeRobot limits it (max_relative_target, joint_limits). Narrow the YAML's limits"
            )
            self.stop()

    def _send(self, position: np.ndarray) -> Any:
        try:
            return self.robot.send_action(self._axes.to_keys(position))
        except make.TROUBLE as error:
            raise RobotError(f"{self._config['type']}: {make.one_line(error)}") from error

    def stop(self) -> None:
        """An axis that moves is sent to where it is; one that rests near its goal keeps that, and what it holds."""
        if self._goal is None or self._state is None or self._failed:
            return  # nothing was commanded, or nobody knows where it is: it holds its last goal by itself
        where, speed = self._state.position, np.abs(self._state.velocity)
        rests = speed < [AT_REST[unit] for unit in self._units]
        near = np.abs(self._goal - where) <= [NEAR[unit] for unit in self._units]
        self._goal = np.where(rests & near, self._goal, where)
        self._send(self._goal)

    def close(self) -> None:
        """Disconnect; the motors keep their torque."""
        try:
            self.robot.disconnect()
        except make.TROUBLE as error:  # LeRobot refuses where a camera is gone: the end of the process closes the port
            print(f"disconnecting failed: {make.one_line(error)}", flush=True)


def _is_extra(key: str, keys: Mapping[str, Any]) -> bool:
    """A velocity or torque beside a position of the same motor: LeRobot lists some, and takes positions only."""
    motor, _, what = key.rpartition(".")
    return what in ("vel", "torque") and f"{motor}.pos" in keys
