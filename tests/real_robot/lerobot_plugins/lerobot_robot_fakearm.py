"""A robot plugin of LeRobot for tests: two joints, a gripper and a camera in memory; it is where it was last sent.

What it was sent is written into a file, and what goes wrong is read from another.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from lerobot.motors import MotorCalibration, MotorNormMode
from lerobot.robots import Robot, RobotConfig
from lerobot.robots.utils import ensure_safe_goal_position
from lerobot.utils.decorators import check_if_already_connected, check_if_not_connected

JOINTS = ("shoulder", "elbow", "gripper")
HEIGHT, WIDTH = 32, 48


@RobotConfig.register_subclass("fakearm")
@dataclass(kw_only=True)
class FakearmConfig(RobotConfig):
    folder: str
    use_degrees: bool = True
    disable_torque_on_disconnect: bool = True
    max_relative_target: float | None = None
    calibrated: bool = True
    color_mode: str = "rgb"
    timed: bool = True


class FakeCamera:
    """What shipped cameras have beside the contract: the time of the newest picture, by `time.perf_counter`."""

    def __init__(self, config):
        self.color_mode, self.latest_frame, self.number = config.color_mode, None, 0
        if config.timed:
            self.latest_timestamp = None

    def shoot(self):
        image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        self.number += 1
        image[..., 0 if self.color_mode == "rgb" else 2] = 200  # red
        image[..., 1] = self.number % 256
        self.latest_frame = image
        if hasattr(self, "latest_timestamp"):
            self.latest_timestamp = time.perf_counter()


class Fakearm(Robot):
    config_class = FakearmConfig
    name = "fakearm"

    def __init__(self, config):
        super().__init__(config)
        self.config, self.folder, self.connected = config, Path(config.folder), False
        self.cameras = {"front": FakeCamera(config)}
        self.position = {"shoulder": 0.0, "elbow": 10.0, "gripper": 50.0}
        body = MotorNormMode.DEGREES if config.use_degrees else MotorNormMode.RANGE_M100_100
        modes = dict(zip(JOINTS, (body, body, MotorNormMode.RANGE_0_100)))
        self.bus = SimpleNamespace(
            motors={name: SimpleNamespace(norm_mode=mode, model="sts3215") for name, mode in modes.items()},
            calibration={
                name: MotorCalibration(id=k, drive_mode=0, homing_offset=0, range_min=1000, range_max=3000)
                for k, name in enumerate(JOINTS)
            },
            model_resolution_table={"sts3215": 4096},
        )

    def note(self, what):
        with (self.folder / "journal").open("a") as file:
            file.write(f"{time.monotonic()} {what}\n")

    @property
    def trouble(self):
        file = self.folder / "trouble"
        return file.read_text() if file.exists() else ""

    @property
    def observation_features(self):
        return {**self.action_features, "front": (HEIGHT, WIDTH, 3)}

    @property
    def action_features(self):
        return {f"{joint}.pos": float for joint in JOINTS}

    @property
    def is_connected(self):
        return self.connected

    @check_if_already_connected
    def connect(self, calibrate=True):
        self.connected = True
        if calibrate and not self.is_calibrated:
            self.calibrate()
        self.note("connect")

    @property
    def is_calibrated(self):
        return self.config.calibrated

    def calibrate(self):
        raise EOFError("a real arm asks a question here")

    def configure(self):
        pass

    @check_if_not_connected
    def get_observation(self):
        if self.trouble == "bus":
            raise ConnectionError("Failed to sync read 'Present_Position' on ids=[1, 2, 3] after 3 tries.")
        if self.trouble == "nan":
            return {**{f"{joint}.pos": float("nan") for joint in JOINTS}, "front": self.cameras["front"].latest_frame}
        if self.trouble != "frozen":
            self.cameras["front"].shoot()
        return {**{f"{j}.pos": p for j, p in self.position.items()}, "front": self.cameras["front"].latest_frame}

    @check_if_not_connected
    def send_action(self, action):
        goal = {key.removesuffix(".pos"): value for key, value in action.items()}
        if self.config.max_relative_target is not None:
            pairs = {key: (value, self.position[key]) for key, value in goal.items()}
            goal = ensure_safe_goal_position(pairs, self.config.max_relative_target)
        self.position.update(goal)
        self.note("send " + " ".join(f"{goal[joint]:.9f}" for joint in JOINTS))
        return {f"{joint}.pos": value for joint, value in goal.items()}

    @check_if_not_connected
    def disconnect(self):
        self.note(f"disconnect torque={'off' if self.config.disable_torque_on_disconnect else 'on'}")
        self.connected = False
