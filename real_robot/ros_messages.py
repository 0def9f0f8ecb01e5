"""Messages of ROS 2 that robots speak: joint states and pictures as arrays, positions as commands."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RobotError
from .cameras import fitted
from .rosbridge import binary
from .spec import Frame

JOINT_STATE = "sensor_msgs/msg/JointState"
PICTURES = {"compressed": "sensor_msgs/msg/CompressedImage", "raw": "sensor_msgs/msg/Image"}
COMMANDS = {
    "forward_position_controller": "std_msgs/msg/Float64MultiArray",
    "joint_trajectory_controller": "trajectory_msgs/msg/JointTrajectory",
}
TOPICS = {"forward_position_controller": "commands", "joint_trajectory_controller": "joint_trajectory"}
CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}
BACK_S = 0.5
"""Stamps that go back further mean another clock, not two messages that overtook each other [s]."""


class JointStates:
    """What the messages of a topic say of some joints; other joints, and any order of them, are allowed.

    A joint's age counts from when a message with a new stamp arrived here: stamps are of the robot's clock, which may
    be off by hours, and a driver that froze repeats its last one.

    Args:
        names: The joints.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._index = {name: k for k, name in enumerate(names)}
        count = len(self._index)
        self._lock = threading.Lock()
        self._position, self._velocity = np.full(count, np.nan), np.zeros(count)
        self._received = np.full(count, -np.inf)
        self._stamps = [0] * count
        self._stands = False
        self._fault = ""
        self.others: set[str] = set()
        """Names of joints that were seen and not asked for."""

    def take(self, message: Mapping[str, Any], now: float) -> None:
        """Take in a message that came at `now` [s]."""
        with self._lock:
            try:
                why = self._take(message, now)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                why = f"a joint state that is none ({type(error).__name__}: {error})"
            self._fault = self._fault or why

    def _take(self, message: Mapping[str, Any], now: float) -> str:
        names, positions = message["name"], message.get("position") or []
        velocities = message.get("velocity") or []
        if not positions:
            return ""  # a publisher of efforts or velocities alone
        if len(positions) != len(names):
            return f"a joint state of {len(names)} names and {len(positions)} positions"
        stamp = message.get("header", {}).get("stamp", {})
        nanoseconds = int(stamp.get("sec", 0)) * 10**9 + int(stamp.get("nanosec", 0))
        for k, name in enumerate(names):
            joint = self._index.get(name)
            if joint is None:
                self.others.add(str(name))
                continue
            position = positions[k]
            if position is None or not np.isfinite(position):
                return f"the position of joint {name} is not finite"
            if why := self._step(joint, name, float(position), nanoseconds, now):
                return why
            speed = velocities[k] if len(velocities) == len(names) else None
            if speed is not None and np.isfinite(speed):
                self._velocity[joint] = speed
        return ""

    def _step(self, joint: int, name: str, position: float, stamp: int, now: float) -> str:
        """A joint's new position; its velocity by difference, which what the message says takes the place of."""
        passed = (stamp - self._stamps[joint]) * 1e-9
        if stamp and self._stamps[joint]:
            self._stands = passed == 0.0
            if passed < -BACK_S:
                return f"the stamp of joint {name} went back by {-passed:.1f} s: a reset, or two publishers"
            if passed <= 0.0:
                return ""
        elif np.isfinite(self._received[joint]):
            passed = now - self._received[joint]
        if np.isfinite(self._position[joint]):
            self._velocity[joint] = (position - self._position[joint]) / max(passed, 1e-3)
        self._position[joint], self._received[joint], self._stamps[joint] = position, now, stamp
        return ""

    def missing(self) -> list[str]:
        """Joints that no message has named yet."""
        with self._lock:
            return [name for name, k in self._index.items() if not np.isfinite(self._received[k])]

    def now(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Positions and velocities (j,) in the order of the names, and when the oldest of them came [s]."""
        with self._lock:
            return self._position.copy(), self._velocity.copy(), float(self._received.min())

    def fault(self, now: float, age_s: float) -> str:
        """What is wrong at `now`, when no joint's state may be older than `age_s` [s]; empty while nothing is."""
        with self._lock:
            if self._fault:
                return self._fault
            oldest = int(self._received.argmin())
            age = now - self._received[oldest]
            if age <= age_s:
                return ""
            name = list(self._index)[oldest]
            why = "its stamps stand still" if self._stands else "nothing new came"
            return f"the state of joint {name} is {age * 1e3:.0f} ms old, {age_s * 1e3:.0f} are allowed: {why}"


@dataclass(frozen=True, kw_only=True)
class RosCamera:
    """A camera whose pictures a topic has.

    Attributes:
        topic: For example ``/camera/color/image_raw/compressed``.
        type: ``compressed`` (sensor_msgs/CompressedImage, JPEG or PNG) or ``raw`` (sensor_msgs/Image).
        height, width: Size of the pictures as delivered [px]; others are cut and scaled.
        delay_s: From when a picture is taken to when its message comes here, where it was measured [s].

    Raises:
        RobotError: Another type, or no topic's name.
    """

    topic: str
    type: str
    height: int
    width: int
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        if self.type not in PICTURES:
            raise RobotError(f"camera {self.topic}: expected type to be one of {sorted(PICTURES)}, got {self.type!r}")
        topic_name(self.topic)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the pictures."""
        return (self.height, self.width, 3)

    def frame(self, message: Mapping[str, Any], received: float) -> Frame:
        """The picture of a message that came at `received` [s].

        Raises:
            RobotError: It cannot be read.
        """
        image = compressed_picture(message) if self.type == "compressed" else raw_picture(message)
        return Frame(image=fitted(image, self.shape), timestamp=received - self.delay_s)


def compressed_picture(message: Mapping[str, Any]) -> np.ndarray:
    """RGB uint8 (h, w, 3) of a sensor_msgs/CompressedImage.

    Raises:
        RobotError: It is no JPEG or PNG of colours.
    """
    data = binary(message.get("data"))
    if data.startswith(b"\xff\xd8"):
        import simplejpeg

        try:
            return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError as error:
            raise RobotError(f"a JPEG that cannot be read: {error}") from error
    import cv2

    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if found is None:
        raise RobotError(f"expected JPEG or PNG, got format {message.get('format')!r}")
    return cv2.cvtColor(found, cv2.COLOR_BGR2RGB)


def raw_picture(message: Mapping[str, Any]) -> np.ndarray:
    """RGB uint8 (h, w, 3) of a sensor_msgs/Image; its rows may be padded.

    Raises:
        RobotError: Another encoding, or data of another length.
    """
    encoding = message.get("encoding")
    channels = CHANNELS.get(str(encoding))
    if channels is None:
        raise RobotError(f"expected an encoding of {sorted(CHANNELS)}, got {encoding!r}")
    data = binary(message.get("data"))
    height, width, step = (int(message.get(key) or 0) for key in ("height", "width", "step"))
    if not (height > 0 and step >= width * channels > 0 and len(data) == height * step):
        raise RobotError(f"expected {height} rows of {step} bytes with {width} pixels, got {len(data)} bytes")
    rows = np.frombuffer(data, np.uint8).reshape(height, step)[:, : width * channels]
    image = rows.reshape(height, width, channels)[:, :, :3]
    if str(encoding).startswith("bgr"):
        image = image[:, :, ::-1]
    return np.ascontiguousarray(np.broadcast_to(image, (height, width, 3)))


def command(kind: str, names: Sequence[str], positions: np.ndarray, time_from_start_s: float) -> dict[str, Any]:
    """A message of one of `COMMANDS` that moves joints to `positions` (j,).

    A trajectory has one point, and a stamp of 0 for at once: another stamp is compared with the robot's clock, and one
    that is over is dropped without a word.
    """
    values = [float(x) for x in positions]
    if kind == "forward_position_controller":
        return {"layout": {"dim": [], "data_offset": 0}, "data": values}
    nanoseconds = round(time_from_start_s * 1e9)
    point = {
        "positions": values,
        "velocities": [],
        "accelerations": [],
        "effort": [],
        "time_from_start": {"sec": nanoseconds // 10**9, "nanosec": nanoseconds % 10**9},
    }
    header = {"stamp": {"sec": 0, "nanosec": 0}, "frame_id": ""}
    return {"header": header, "joint_names": list(names), "points": [point]}


def topic_name(topic: object) -> str:
    """A topic's full name.

    Raises:
        RobotError: It does not begin with a slash.
    """
    if not isinstance(topic, str) or not topic.startswith("/"):
        raise RobotError(f"expected the full name of a topic, such as /joint_states, got {topic!r}")
    return topic
