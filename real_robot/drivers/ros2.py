"""Robots that ROS 2 drives, over rosbridge: joint states in, positions for a controller of ros2_control out.

Written against rosbridge's protocol 2 and the code of rosbridge_suite and ros2_controllers; tested against a stand-in
that imitates them (tests/real_robot/fake_rosbridge.py), never against a ROS installation or a robot.

rosbridge has no watchdog, and neither have most controllers: when this computer or the network is gone, the robot goes
to the last position it was told, and stays there. What must happen then is set up on the robot's side.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import RobotError
from ...spec import FeatureSpec
from ..cameras import Camera
from ..driver_process import Link, LinkState, ProcessRobot
from ..ros_messages import (
    COMMANDS,
    JOINT_STATE,
    PICTURES,
    TOPICS,
    JointStates,
    RosCamera,
    command,
    topic_name,
)
from ..rosbridge import Rosbridge
from ..safety.motion import Motion, MotionState
from ..spec import Frame, MotionLimits, RobotSpec

BRAKE_S = 3.0
"""A way to rest that takes longer is cut short [s]."""


@dataclass(frozen=True, kw_only=True)
class Commanded:
    """A controller that is commanded.

    Attributes:
        kind: One of `COMMANDS`.
        topic: Where it listens.
        joints: What it moves, in its own order.
    """

    kind: str
    topic: str
    joints: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RosSide:
    """What a robot is in ROS, and how it is reached; arrays have one element an axis.

    Attributes:
        address: Of the rosbridge server.
        joints: Name of each axis' joint.
        zero, scale: A joint's position is ``zero + scale * axis``.
        state_topic: Where joint states come from.
        state_age_s: How old they may get [s].
        controllers: What is commanded.
        time_from_start_s: When a trajectory's point is to be reached [s].
        cameras: Name -> camera.
        camera_hz: Rate of pictures that is asked for [Hz].
        verify: Ask rosapi whether the topics are what is expected.
        controller_manager: Asked for the controllers; None where there is none.
        timeout_s: Patience while connecting [s].
        limits: Of the axes.
        held: Axes that stay where they were commanded when the robot is stopped: grippers, which hold something.
        period: Time between commands [s].
    """

    address: str
    joints: tuple[str, ...]
    zero: np.ndarray
    scale: np.ndarray
    state_topic: str
    state_age_s: float
    controllers: tuple[Commanded, ...]
    time_from_start_s: float
    cameras: Mapping[str, RosCamera]
    camera_hz: float
    verify: bool
    controller_manager: str | None
    timeout_s: float
    limits: MotionLimits
    held: np.ndarray
    period: float


class RosLink(Link):
    """A rosbridge server and what is behind it.

    Args:
        side: What to expect.
    """

    def __init__(self, side: RosSide) -> None:
        self._side = side
        self._bridge: Rosbridge | None = None
        self._states = JointStates(side.joints)
        self._pictures = _Pictures(side.cameras)
        self._sent: tuple[np.ndarray, np.ndarray, float] | None = None
        self._motion = Motion(side.limits, side.period)
        self._braking: MotionState | None = None
        self._hold: np.ndarray = np.zeros(len(side.joints))
        self._begun = self._stepped = 0.0

    @property
    def bridge(self) -> Rosbridge:
        """The connection.

        Raises:
            RobotError: There is none, or it is lost.
        """
        if self._bridge is None:
            raise RobotError("not connected")
        if self._bridge.lost:
            raise RobotError(f"the connection to rosbridge is lost: {self._bridge.lost}")
        return self._bridge

    def open(self) -> None:
        """Connect, look at what is there, and wait for every joint and picture."""
        side = self._side
        self._bridge = Rosbridge(side.address, timeout_s=side.timeout_s)
        if side.verify:
            Verification(self._bridge, side).check()
        for controller in side.controllers:
            self._bridge.advertise(controller.topic, COMMANDS[controller.kind])
        self._bridge.subscribe(side.state_topic, JOINT_STATE, self._states.take)
        throttle = round(600.0 / side.camera_hz)  # ms, less than a period: one that comes a little early is let through
        for name, camera in side.cameras.items():
            heard = functools.partial(self._pictures.take, name)
            self._bridge.subscribe(camera.topic, PICTURES[camera.type], heard, throttle_ms=throttle)
        self._await_joints()
        self._await_pictures()

    def _await_joints(self) -> None:
        until = time.monotonic() + self._side.timeout_s
        while missing := self._states.missing():
            garbled = self._garbled()
            if why := self._states.fault(time.monotonic(), np.inf):
                raise RobotError(f"{self._side.state_topic}: {why}")
            if time.monotonic() > until:
                others = sorted(self._states.others)
                said = f"it names {', '.join(others)}" if others else "nothing came: is the robot's driver running?"
                raise RobotError(
                    f"{self._side.state_topic}: expected joints {', '.join(missing)} within "
                    f"{self._side.timeout_s:g} s; {said}{garbled}"
                )
            time.sleep(0.01)

    def _await_pictures(self) -> None:
        until = time.monotonic() + self._side.timeout_s
        while missing := self._pictures.missing():
            name, garbled = missing[0], self._garbled()
            if time.monotonic() > until:
                why = self._pictures.why.get(name, "no message came")
                raise RobotError(
                    f"camera {name}: no picture on {self._side.cameras[name].topic} within "
                    f"{self._side.timeout_s:g} s: {why}{garbled}"
                )
            time.sleep(0.01)

    def _garbled(self) -> str:
        """What to say of messages that could not be read."""
        count = self.bridge.unread
        return f"; {count} messages were garbled or lacked pieces: raise max_message_size of rosbridge" if count else ""

    def read(self) -> LinkState:
        """The newest joint states and pictures."""
        bridge, now = self.bridge, time.monotonic()
        if self._braking is not None and now - self._stepped >= 0.9 * self._side.period:
            self._brake(now)
        positions, velocities, received = self._states.now()
        fault = self._states.fault(now, self._side.state_age_s)
        if not fault and bridge.complaint:
            fault = f"rosbridge complains: {bridge.complaint}"
        return LinkState(
            position=(positions - self._side.zero) / self._side.scale,
            velocity=velocities / self._side.scale,
            timestamp=received,
            fault=fault,
            frames=self._pictures.frames(),
        )

    def move(self, position: np.ndarray) -> None:
        """Publish targets."""
        now, velocity = time.monotonic(), np.zeros(len(position))
        if self._sent is not None:
            velocity = (position - self._sent[0]) / max(now - self._sent[2], self._side.period)
        self._publish(position)
        self._sent = (position.copy(), velocity, now)

    def stop(self) -> None:
        """Come to rest at the measured position, within all limits; `read` and `close` take the steps.

        Without it a robot that is held up would go on pushing towards where it was commanded to be. A gripper keeps
        what it was told: it is to go on holding.
        """
        if self._sent is None or self._braking is not None:
            return  # it was never moved
        limits, (position, velocity, _) = self._side.limits, self._sent
        measured = (self._states.now()[0] - self._side.zero) / self._side.scale
        self._hold = np.where(self._side.held, position, np.clip(measured, limits.low, limits.high))
        velocity = np.clip(velocity, -limits.velocity, limits.velocity)
        self._braking = MotionState(position=position, velocity=velocity, acceleration=np.zeros_like(position))
        self._begun = self._stepped = time.monotonic()

    def _brake(self, now: float) -> None:
        """One step towards where the robot is to rest."""
        assert self._braking is not None
        self._braking, self._stepped = self._motion.step(self._braking, self._hold), now
        arrived = self._braking.is_resting and np.abs(self._braking.position - self._hold).max() < 1e-6
        if arrived or now - self._begun > BRAKE_S:
            self._braking = None
            self._publish(self._hold)
        else:
            self._publish(self._braking.position)

    def close(self) -> None:
        """Wait until a stop has come to rest, and disconnect."""
        while self._braking is not None:
            self._brake(time.monotonic())
            time.sleep(self._side.period)
        self.bridge.close()

    def _publish(self, position: np.ndarray) -> None:
        side = self._side
        joints = dict(zip(side.joints, side.zero + side.scale * position))
        for controller in side.controllers:
            values = np.array([joints[name] for name in controller.joints])
            message = command(controller.kind, controller.joints, values, side.time_from_start_s)
            self.bridge.publish(controller.topic, message)


class Verification:
    """What can be known before anything moves; rosbridge itself says nothing about messages that it drops.

    Args:
        bridge: The connection.
        side: What is expected.
    """

    def __init__(self, bridge: Rosbridge, side: RosSide) -> None:
        self._bridge, self._side = bridge, side

    def check(self) -> None:
        """Look at topics and controllers.

        Raises:
            RobotError: The first difference, and what to do about it.
        """
        side = self._side
        self._topic(side.state_topic, JOINT_STATE)
        for camera in side.cameras.values():
            self._topic(camera.topic, PICTURES[camera.type])
        for controller in side.controllers:
            if side.controller_manager is not None:
                self._controller(controller)  # says more than the topic, which is absent while it is inactive
            self._topic(controller.topic, COMMANDS[controller.kind])
            self._listener(controller.topic)

    def _ask(self, service: str, hint: str, **arguments: Any) -> dict[str, Any]:
        try:
            return self._bridge.call(service, arguments)
        except RobotError as error:
            raise RobotError(f"{error}. {hint}") from error

    def _rosapi(self, what: str, **arguments: str) -> dict[str, Any]:
        hint = "Start rosapi (rosbridge's launch file does), or connect unchecked: verify: false"
        return self._ask(f"/rosapi/{what}", hint, **arguments)

    def _topic(self, topic: str, kind: str) -> None:
        found = str(self._rosapi("topic_type", topic=topic).get("type", ""))
        if "/msg/" not in found:
            found = found.replace("/", "/msg/")
        if not found:
            others = self._rosapi("topics_for_type", type=kind).get("topics") or []
            said = f"there are {', '.join(sorted(map(str, others)))}" if others else "there is none of that type"
            raise RobotError(f"expected a topic {topic} of {kind}; {said}")
        if found != kind:
            raise RobotError(f"topic {topic}: expected {kind}, got {found}")

    def _listener(self, topic: str) -> None:
        found = [str(node) for node in self._rosapi("subscribers", topic=topic).get("subscribers") or []]
        if not [node for node in found if "rosbridge" not in node]:
            raise RobotError(f"nobody listens to {topic}. Is its controller running? ros2 control list_controllers")
        found = [str(node) for node in self._rosapi("publishers", topic=topic).get("publishers") or []]
        if others := [node for node in found if "rosbridge" not in node]:
            raise RobotError(f"{', '.join(others)} publishes to {topic} too: expected nobody else to command the robot")

    def _controller(self, controller: Commanded) -> None:
        """That it is active, takes positions, and has the joints that are commanded."""
        node, hint = controller.topic.rpartition("/")[0], "No ros2_control? controller_manager: null"
        name = node.rpartition("/")[2]
        listed = self._ask(f"{self._side.controller_manager}/list_controllers", hint).get("controller") or []
        states = {str(one.get("name")): one for one in listed}
        if name not in states:
            raise RobotError(f"expected a controller {name}, got {', '.join(sorted(states)) or 'none'}")
        if (state := states[name].get("state")) != "active":
            raise RobotError(
                f"controller {name} is {state}. On the robot type: ros2 control switch_controllers --activate {name}"
            )
        claimed = [str(one) for one in states[name].get("claimed_interfaces") or []]
        ordered = controller.kind == "forward_position_controller"
        if ordered and (wrong := [one for one in claimed if not one.endswith("/position")]):
            raise RobotError(f"controller {name}: expected it to command positions, got {', '.join(wrong)}")
        values = self._ask(f"{node}/get_parameters", hint, names=["joints"]).get("values") or [{}]
        joints = tuple(str(one) for one in values[0].get("string_array_value") or ())
        same = joints == controller.joints if ordered else set(joints) == set(controller.joints)
        if not same:
            raise RobotError(
                f"controller {name} moves joints {', '.join(joints) or 'unknown'}; expected "
                f"{', '.join(controller.joints)}" + (", in this order: set command_joints" if ordered else "")
            )


class _Pictures:
    """Reads the newest picture of each camera in a thread of its own: joint states never wait for a JPEG."""

    def __init__(self, cameras: Mapping[str, RosCamera]) -> None:
        self._cameras = dict(cameras)
        self._waiting: dict[str, tuple[dict[str, Any], float]] = {}
        self._frames: dict[str, Frame] = {}
        self._news = threading.Condition()
        self.why: dict[str, str] = {}
        """Name -> why its last message was no picture."""
        if self._cameras:
            threading.Thread(target=self._work, name="pictures", daemon=True).start()

    def take(self, name: str, message: dict[str, Any], now: float) -> None:
        """A message of a camera; one that still waits is left out."""
        with self._news:
            self._waiting[name] = (message, now)
            self._news.notify()

    def missing(self) -> list[str]:
        """Cameras without a picture."""
        return [name for name in self._cameras if name not in self._frames]

    def frames(self) -> dict[str, Frame]:
        """The newest picture of each camera; where none comes, the last grows old."""
        return dict(self._frames)

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: bool(self._waiting))
                waiting, self._waiting = self._waiting, {}
            for name, (message, received) in waiting.items():
                try:
                    self._frames[name] = self._cameras[name].frame(message, received)
                except Exception as error:  # whatever a message holds: the thread goes on
                    self.why[name] = str(error)


class Ros2(ProcessRobot):
    """A robot behind rosbridge; its axes are joints that a controller of ros2_control moves to positions.

    Args:
        address: ``ws://HOST:9090`` of the rosbridge server. It asks nobody who they are: use a network of your own.
        joints: Names of the joints, in the order of the policy.
        low, high: Position limits, one a joint [unit].
        velocity, acceleration, jerk: Largest values, one or one a joint [unit/s, unit/s^2, unit/s^3].
        unit: ``rad`` or ``m``, one or one a joint.
        state_topic: Topic of sensor_msgs/JointState; names may come in any order, with others among them.
        state_age_s: No joint's state may be older, counted from when it came here [s].
        command: ``forward_position_controller`` (std_msgs/Float64MultiArray: each position goes to the hardware at
            once) or ``joint_trajectory_controller`` (trajectory_msgs/JointTrajectory of one point).
        command_topic: Where the controller listens; None: the controller's usual one.
        command_joints: The controller's own order of the joints on its topic; None: that of `joints`, then the gripper
            where it has no topic of its own.
        time_from_start_s: When a trajectory's point is to be reached [s]; 1.5 to 3 periods of the control loop.
        gripper: ``joint``, ``closed`` and ``open`` (positions of the joint), ``velocity``, ``acceleration``, ``jerk``
            (of the opening, which is 0 to 1 [1/s, ...]), and where another controller moves it ``command`` and
            ``command_topic``. None: no gripper.
        cameras: Name -> ``topic``, ``type`` (``compressed`` or ``raw``), ``height``, ``width`` [px], perhaps
            ``delay_s``; or a camera beside the robot that this computer reads.
        camera_hz: Rate of pictures [Hz].
        command_hz: Highest rate of commands [Hz].
        state_hz: Rate of joint states [Hz].
        watchdog_s: Without commands for so long the robot is brought to rest [s]. Kept on this computer: see above.
        verify: Ask rosapi whether topics exist, have the expected types, and are listened to.
        controller_manager: Its name, to be asked whether the controllers are active; None: not ros2_control.
        timeout_s: How long each step of connecting may take [s].

    Raises:
        RobotError: Options that do not fit.
    """

    def __init__(
        self,
        *,
        address: str,
        joints: Sequence[str],
        low: Sequence[float],
        high: Sequence[float],
        velocity: float | Sequence[float],
        acceleration: float | Sequence[float],
        jerk: float | Sequence[float],
        unit: str | Sequence[str] = "rad",
        state_topic: str = "/joint_states",
        state_age_s: float = 0.2,
        command: str = "joint_trajectory_controller",
        command_topic: str | None = None,
        command_joints: Sequence[str] | None = None,
        time_from_start_s: float = 0.05,
        gripper: Mapping[str, Any] | None = None,
        cameras: Mapping[str, Any] | None = None,
        camera_hz: float = 30.0,
        command_hz: float = 100.0,
        state_hz: float = 100.0,
        watchdog_s: float = 0.25,
        verify: bool = True,
        controller_manager: str | None = "/controller_manager",
        timeout_s: float = 5.0,
    ) -> None:
        arm, hand = tuple(str(name) for name in joints), Gripper(**gripper) if gripper else None
        names = (*arm, *([hand.joint] if hand else []))
        if len(set(names)) != len(names):
            raise RobotError(f"expected each joint once, got {', '.join(names)}")
        for key, value in (
            ("time_from_start_s", time_from_start_s),
            ("timeout_s", timeout_s),
            ("camera_hz", camera_hz),
        ):
            if not value > 0:
                raise RobotError(f"expected {key} above 0, got {value}")
        topics = {name: RosCamera(**one) for name, one in (cameras or {}).items() if not isinstance(one, Camera)}
        beside = {name: one for name, one in (cameras or {}).items() if isinstance(one, Camera)}
        count = len(arm)

        def each(value: float | Sequence[float], of_gripper: str) -> tuple[float, ...]:
            values = (value,) * count if isinstance(value, (int, float)) else tuple(value)
            return (*values, *([getattr(hand, of_gripper)] if hand else []))

        spec = RobotSpec(
            name="ros2",
            axes=FeatureSpec(
                name="axes",
                shape=(len(names),),
                names=(*arm, *(["gripper"] if hand else [])),
                units=(*((unit,) * count if isinstance(unit, str) else unit), *(["1"] if hand else [])),
                low=(*low, *([0.0] if hand else [])),
                high=(*high, *([1.0] if hand else [])),
                gripper="open_is_1" if hand else "none",
            ),
            velocity=each(velocity, "velocity"),
            acceleration=each(acceleration, "acceleration"),
            jerk=each(jerk, "jerk"),
            command_hz=command_hz,
            state_hz=state_hz,
            cameras=tuple(
                FeatureSpec(name=name, shape=(topics.get(name) or beside[name]).shape, dtype="uint8")
                for name in cameras or {}
            ),
            camera_hz=camera_hz,
            watchdog_s=watchdog_s,
        )
        side = RosSide(
            address=address,
            joints=names,
            zero=np.array([0.0] * count + ([hand.closed] if hand else [])),
            scale=np.array([1.0] * count + ([hand.open - hand.closed] if hand else [])),
            state_topic=topic_name(state_topic),
            state_age_s=state_age_s,
            controllers=_controllers(arm, command, command_topic, command_joints, hand),
            time_from_start_s=time_from_start_s,
            cameras=topics,
            camera_hz=camera_hz,
            verify=verify,
            controller_manager=controller_manager,
            timeout_s=timeout_s,
            limits=spec.limits,
            held=np.array([False] * count + [True] * (hand is not None)),
            period=1.0 / command_hz,
        )
        super().__init__(spec, functools.partial(RosLink, side), cameras=beside)


@dataclass(frozen=True, kw_only=True)
class Gripper:
    """A gripper with one joint.

    Attributes:
        joint: Its name.
        closed, open: The joint's positions [rad or m].
        velocity, acceleration, jerk: Largest values of the opening [1/s, 1/s^2, 1/s^3].
        command, command_topic: The controller that moves it; None: the arm's.

    Raises:
        RobotError: Closed and open are the same.
    """

    joint: str
    closed: float
    open: float
    velocity: float = 4.0
    acceleration: float = 40.0
    jerk: float = 2000.0
    command: str | None = None
    command_topic: str | None = None

    def __post_init__(self) -> None:
        if self.closed == self.open:
            raise RobotError(f"gripper {self.joint}: expected closed and open to differ, got {self.closed} twice")
        if (self.command is None) != (self.command_topic is None):
            raise RobotError(f"gripper {self.joint}: expected command and command_topic, or neither")


def _controllers(
    arm: tuple[str, ...], kind: str, topic: str | None, order: Sequence[str] | None, gripper: Gripper | None
) -> tuple[Commanded, ...]:
    """The arm's controller, and the gripper's where it has one of its own."""
    for one in (kind, *([gripper.command] if gripper and gripper.command else [])):
        if one not in COMMANDS:
            raise RobotError(f"expected command to be one of {', '.join(COMMANDS)}, got {one!r}")
    own = gripper is not None and gripper.command is not None
    moved = arm if gripper is None or own else (*arm, gripper.joint)
    joints = moved if order is None else tuple(str(name) for name in order)
    if sorted(joints) != sorted(moved):
        raise RobotError(f"command_joints: expected {', '.join(moved)} in any order, got {', '.join(joints)}")
    found = [Commanded(kind=kind, topic=topic_name(topic or f"/{kind}/{TOPICS[kind]}"), joints=joints)]
    if gripper is not None and own:
        assert gripper.command is not None
        found.append(Commanded(kind=gripper.command, topic=topic_name(gripper.command_topic), joints=(gripper.joint,)))
    return tuple(found)
