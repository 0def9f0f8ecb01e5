"""Any robot that LeRobot drives, third-party plugins included; LeRobot lives in a process of its own.

LeRobot's contract names keys and no units, limits, velocities or times, so those are in the YAML, and held against what
the robot tells of itself where it does. Written for LeRobot 0.6.1. Tested with a robot plugin in memory, and with
LeRobot's own SO-101 on Feetech's SDK and a stand-in for its servo bus; no hardware was used.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import RobotError
from ...spec import FeatureSpec
from ..driver_process import ProcessRobot
from ..spec import RobotSpec
from .lerobot_link import CameraMap, LeRobotLink
from .lerobot_units import AxisMap

START_S = 90.0
"""LeRobot's import takes 3 to 13 s, and each camera warms up for a second or more."""


class LeRobot(ProcessRobot):
    """A robot of LeRobot.

    `connect` runs LeRobot's own, which switches the motors' torque off for a moment on most arms: hold them. It never
    calibrates. Disconnecting keeps the torque on, as every driver here leaves a robot where it is.

    Args:
        config: LeRobot's configuration, as ``{type: so101_follower, port: /dev/ttyACM0, id: mine}``; cameras in it too.
        axes: The axes in order, a gripper last; each a mapping with name, key (``shoulder_pan.pos``), unit of the key
            (degrees, radians, metres, normalised for -100..100, percent for 0..100), limits low, high [rad, m, or 1],
            velocity, acceleration, jerk, and where needed gripper: true, scale, offset (axis = scale * key + offset).
        cameras: Name of a camera here -> key of LeRobot's observation, height and width of the picture that is
            delivered [px], and crop: whether the middle is cut out (true) or the picture squeezed.
        rate_hz: Rate of commands and readings [Hz]; what the bus takes.
        camera_hz: Rate of the cameras [Hz].
        watchdog_s: The process stops the robot when it hears no command for so long [s]; the servos themselves have no
            watchdog.
        failures: Readings that may fail one after the other before the link is lost.
        packages: Modules to import that bring robots or cameras, beside installed ones named ``lerobot_robot_...``.
        start_s: How long connecting may take [s].
    """

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        axes: Sequence[Mapping[str, Any]],
        cameras: Mapping[str, Mapping[str, Any]] | None = None,
        rate_hz: float = 50.0,
        camera_hz: float = 30.0,
        watchdog_s: float = 0.3,
        failures: int = 5,
        packages: Sequence[str] = (),
        start_s: float = START_S,
    ) -> None:
        kind = (config or {}).get("type")
        if not kind:
            raise RobotError("expected config with LeRobot's type, as {type: so101_follower, port: ...}, got none")
        self.axes = AxisMap(axes)
        self.views = {name: CameraMap.build(name, given) for name, given in (cameras or {}).items()}
        spec = RobotSpec(
            name=str(kind),
            axes=self.axes.feature(),
            velocity=self.axes.limits("velocity"),
            acceleration=self.axes.limits("acceleration"),
            jerk=self.axes.limits("jerk"),
            command_hz=rate_hz,
            state_hz=rate_hz,
            cameras=tuple(FeatureSpec(name=name, shape=view.shape, dtype="uint8") for name, view in self.views.items()),
            camera_hz=camera_hz,
            watchdog_s=watchdog_s,
        )
        link = functools.partial(
            LeRobotLink, dict(config), self.axes, self.views, failures=failures, packages=tuple(packages)
        )
        super().__init__(spec, link, rate_hz=rate_hz, start_s=start_s)

    def inside_lerobot(self) -> dict[str, Any]:
        """What LeRobot's keys and cameras mean, for policies that run inside LeRobot: plain values."""
        return {
            "axes": [dataclasses.asdict(axis) for axis in self.axes.axes],
            "camera_keys": {name: view.key for name, view in self.views.items()},
            "fit": {name: "crop" if view.crop else "squeeze" for name, view in self.views.items()},
        }
