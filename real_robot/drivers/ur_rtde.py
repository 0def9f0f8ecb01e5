"""Arms of Universal Robots (CB3, e-Series), through the public package `ur_rtde`.

The package starts a program of its own on the controller and streams targets to its `servoj`. What it does when a link
is lost or the robot is stopped was read in its source and measured against a stand-in for the controller
(tests/real_robot/fake_ur.py). This driver was never tried on an arm.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import RobotError
from ...sim.robot import RobotModel
from ...spec import FeatureSpec
from ..cameras import Camera, camera_specs
from ..driver_process import Link, LinkState, ProcessRobot
from ..spec import RobotSpec

JOINTS = (
    "shoulder_pan_joint",
    "shoulder_lift_joint",
    "elbow_joint",
    "wrist_1_joint",
    "wrist_2_joint",
    "wrist_3_joint",
)
FULL_TURN = 6.2831
"""Every joint turns this far both ways [rad]: UR5e data sheet, +-360 degrees."""
LOOKAHEAD_S, GAIN = (0.03, 0.2), (100.0, 2000.0)
"""What servoj takes (URScript manual)."""
STOP_DECELERATION = 10.0
"""Of the tool, when the stream ends before the robot rests: the package's default [m/s^2]."""
PROBE_S, STOP_S, CLOSE_S = 2.0, 0.8, 3.0
"""How long an answer, a stop and a farewell may take; the package takes a second for the last [s]."""

GUARD_S = 5e-3
"""How often calls under way are looked at; connecting again takes the package 0.1 s and more [s]."""

RTDE_PORT, DASHBOARD_PORT = 30004, 29999
STATES = ("timestamp", "actual_q", "actual_qd", "robot_mode", "safety_mode", "runtime_state")
RUNNING, PLAYING = 7, 2
SAFE = (1, 2)
ROBOT_MODES = (
    "disconnected",
    "waiting for its safety to be confirmed",
    "booting",
    "switched off",
    "switched on with brakes closed",
    "idle with brakes closed",
    "moved by hand (backdrive)",
    "running",
    "updating",
)
SAFETY_MODES = (
    "",
    "normal",
    "reduced",
    "protective stop",
    "recovery",
    "safeguard stop",
    "system emergency stop",
    "emergency stop",
    "safety violation",
    "safety fault",
)
PROGRAM_STATES = ("stopping", "stopped", "playing", "pausing", "paused", "resuming")
ADVICE = (
    ("remote control", "On the pendant, switch from Local to Remote Control"),
    ("registers are already in use", "Another program controls the robot, or a fieldbus is enabled: end it"),
    ("start control script", "On the pendant, see that no stop is pending and no popup is open"),
    ("dashboard", f"See that nothing blocks its port {DASHBOARD_PORT}"),
)
"""What the package's errors say -> what to do."""


class URRtde(ProcessRobot):
    """An arm of Universal Robots; six joints, and no gripper yet.

    Limits are those of a UR5e unless the YAML says otherwise. The velocity is URScript's default for movej, a third of
    the data sheet's 180 degrees/s; UR publishes no accelerations, and this is what its ROS description takes; the jerk,
    ten times the acceleration in a second, is a choice. The controller's own safety limits hold besides.

    Targets reach the arm as they come, and its controller smooths them over `lookahead_s`: with ``timing.control_hz``
    near `rate_hz` there is less to smooth. Nothing reconnects: a robot that was lost or stopped is connected anew by a
    person.

    Args:
        host: Name or address of the controller.
        low, high: Position limits of each joint, within one turn both ways [rad].
        velocity, acceleration, jerk: Largest values, one or one a joint [rad/s, rad/s^2, rad/s^3].
        rate_hz: Rate of readings, and highest rate of targets; 125 is what a CB3 can, an e-Series up to 500 [Hz].
        lookahead_s: Over what time the controller smooths targets, 0.03 to 0.2 [s].
        gain: How hard it follows them, 100 to 2000.
        watchdog_s: Without targets for so long, the arm is stopped; its controller stops it by itself when the driver
            is gone for so long [s].
        silent_s: A controller that sends nothing for so long is taken for lost; less than
            `watchdog_s`: nothing is asked of a dead link [s].
        start_s: How long connecting may take [s].
        gripper: None; this driver has no gripper axis yet.
        cameras: Name -> camera beside the robot.
        camera_hz: Rate of their frames [Hz].
        model: A MuJoCo model with joints of these names, for zones and collisions.

    Raises:
        RobotError: An option that does not fit.
    """

    def __init__(
        self,
        *,
        host: str,
        low: Sequence[float] = (-FULL_TURN,) * 6,
        high: Sequence[float] = (FULL_TURN,) * 6,
        velocity: float | Sequence[float] = 1.05,
        acceleration: float | Sequence[float] = 3.14,
        jerk: float | Sequence[float] = 31.4,
        rate_hz: float = 125.0,
        lookahead_s: float = 0.1,
        gain: float = 300.0,
        watchdog_s: float = 0.2,
        silent_s: float = 0.15,
        start_s: float = 30.0,
        gripper: None = None,
        cameras: Mapping[str, Camera] | None = None,
        camera_hz: float = 30.0,
        model: RobotModel | None = None,
    ) -> None:
        if gripper is not None:
            raise RobotError(f"ur_rtde: expected gripper=null, got {gripper!r}: there is no gripper axis yet")
        for name, value, (least, most) in (
            ("lookahead_s", lookahead_s, LOOKAHEAD_S),
            ("gain", gain, GAIN),
            ("rate_hz", rate_hz, (50.0, 500.0)),
            ("watchdog_s", watchdog_s, (0.05, 2.0)),
            ("silent_s", silent_s, (0.05, 2.0)),
        ):
            if not least <= value <= most:
                raise RobotError(f"ur_rtde: expected {name} from {least:g} to {most:g}, got {value}")
        if silent_s >= watchdog_s:
            raise RobotError(f"ur_rtde: expected silent_s below watchdog_s={watchdog_s:g}, got {silent_s:g}")
        if min(low) < -FULL_TURN or max(high) > FULL_TURN:
            raise RobotError(f"ur_rtde: expected joint limits within +-{FULL_TURN}, got {list(low)} and {list(high)}")
        cameras = dict(cameras or {})
        spec = RobotSpec(
            name="ur",
            axes=FeatureSpec(
                name="axes", shape=(6,), names=JOINTS, units=("rad",) * 6, low=tuple(low), high=tuple(high)
            ),
            velocity=_each(velocity),
            acceleration=_each(acceleration),
            jerk=_each(jerk),
            command_hz=rate_hz,
            state_hz=rate_hz,
            cameras=camera_specs(cameras),
            camera_hz=camera_hz,
            watchdog_s=watchdog_s,
        )
        link = functools.partial(
            URLink,
            host=host,
            low=tuple(low),
            high=tuple(high),
            rate_hz=rate_hz,
            lookahead_s=lookahead_s,
            gain=gain,
            watchdog_s=watchdog_s,
            silent_s=silent_s,
        )
        super().__init__(spec, link, cameras=cameras, rate_hz=rate_hz, start_s=start_s)
        self.model = model


def _each(value: float | Sequence[float]) -> tuple[float, ...]:
    return (float(value),) * 6 if isinstance(value, (int, float)) else tuple(float(x) for x in value)


class ControllerClock:
    """The controller's times as this computer's: what came quickest of late says how far apart the clocks are.

    Attributes:
        DRIFT: How fast the clocks may run apart; so fast a delay that stays is forgotten.
    """

    DRIFT = 1e-4

    def __init__(self) -> None:
        self._offset, self._seen = np.inf, 0.0

    def local(self, stamp: float, now: float) -> float:
        """When it was here that the controller measured at `stamp`, having heard of it by `now`; never after it [s]."""
        self._offset = min(now - stamp, self._offset + self.DRIFT * (now - self._seen))
        self._seen = now
        return stamp + self._offset


class URLink(Link):
    """The package `ur_rtde`, in the child.

    Its getters give the last value for ever, and on a lost link `servoJ` goes on to say that all is well while the
    package connects again by itself. So what the controller says is looked at before every target, and after any
    trouble this process ends without another word to the package.

    Args:
        host, low, high, rate_hz, lookahead_s, gain, watchdog_s, silent_s: See `URRtde`.
    """

    def __init__(
        self,
        *,
        host: str,
        low: Sequence[float],
        high: Sequence[float],
        rate_hz: float,
        lookahead_s: float,
        gain: float,
        watchdog_s: float,
        silent_s: float,
    ) -> None:
        self._host, self._rate_hz = host, rate_hz
        self._low, self._high = np.array(low), np.array(high)
        self._servo = (1.0 / rate_hz, lookahead_s, gain)
        self._watchdog_s, self._silent_s = watchdog_s, silent_s
        self._receive: Any = None
        self._control: Any = None
        self._clock = ControllerClock()
        self._stamp, self._heard, self._fed = -np.inf, 0.0, 0.0
        self._refused, self._fault = False, ""
        self._sockets: set[str] = set()
        self._called = np.inf  # when a call began that has not returned

    def open(self) -> None:
        """Find the controller, see that it is ready, and start the package's program on it, which ends any other."""
        try:
            import rtde_control
            import rtde_receive
        except ImportError as error:
            raise RobotError(
                "arms of Universal Robots need ur_rtde, of which there are wheels for Python 3.12 on Linux and Windows "
                f"(x86-64). Type: uv pip install 'brachium[ur]' ({error})"
            ) from error
        probe(self._host)
        before = open_sockets()
        with _said_by_the_package(self._host):
            self._receive = rtde_receive.RTDEReceiveInterface(self._host, self._rate_hz, list(STATES))
        if why := self._unready():
            raise RobotError(f"{self._host}: {why}. See the pendant; then connect again")
        with _said_by_the_package(self._host):
            self._control = rtde_control.RTDEControlInterface(self._host, self._rate_hz)
            watched = self._control.setWatchdog(1.0 / self._watchdog_s)
        if not watched:
            raise RobotError(f"{self._host}: the controller did not take the watchdog; nothing moves without")
        for _ in range(100):  # the quickest of some packets, before an age means anything
            self._listen(time.monotonic())
            time.sleep(1e-3)
        self._sockets = open_sockets() - before
        threading.Thread(target=self._guard, name="guard", daemon=True).start()

    def read(self) -> LinkState:
        """What the controller sent last; an error where it sends nothing any more."""
        now = time.monotonic()
        stamp = self._listen(now)
        with _said_by_the_package(self._host):
            if now - self._heard > self._silent_s:
                raise RobotError(f"{self._host}: nothing came for {(now - self._heard) * 1e3:.0f} ms")
            if not self._is_whole():
                raise RobotError(f"{self._host}: the connection was closed")
            position, velocity = self._receive.getActualQ(), self._receive.getActualQd()
            if not self._fault:
                self._look()
            if not self._fault and now - self._fed > 0.3 * self._watchdog_s:
                self._call(self._control.kickWatchdog)
        return LinkState(position=np.array(position), velocity=np.array(velocity), timestamp=stamp, fault=self._fault)

    def move(self, position: np.ndarray) -> None:
        """A target; whether the arm follows is seen in what is read."""
        if ((position < self._low - 1e-6) | (position > self._high + 1e-6)).any():
            raise RobotError(f"{self._host}: expected targets within the limits, got {position.tolist()}")
        if self._fault:
            return
        period, lookahead_s, gain = self._servo
        with _said_by_the_package(self._host):
            self._refused = not self._call(self._control.servoJ, position.tolist(), 0.0, 0.0, period, lookahead_s, gain)

    def stop(self) -> None:
        """Brake, and end the stream; the package's program goes on."""
        if not self._fault:
            with _at_most(STOP_S), _said_by_the_package(self._host):
                self._control.servoStop(STOP_DECELERATION)

    def close(self) -> None:
        """End the package's program; one that was stopped is left to the end of the process."""
        if not self._fault:
            with _at_most(CLOSE_S), _said_by_the_package(self._host):
                self._control.stopScript()
                self._control.disconnect()
                self._receive.disconnect()

    def _call(self, function: Callable[..., bool], *arguments: Any) -> bool:
        """Call what feeds the controller's watchdog, under guard."""
        self._called = time.monotonic()
        taken = function(*arguments)
        self._called, self._fed = np.inf, time.monotonic()
        return taken

    def _guard(self) -> None:
        """End this process when a call connects again by itself: the program it then starts has no watchdog."""
        while True:
            time.sleep(GUARD_S)
            if time.monotonic() - self._called < 3 * GUARD_S:
                continue
            if not self._is_whole() or (self._receive.getRuntimeState() != PLAYING and not self._unready()):
                os._exit(1)

    def _is_whole(self) -> bool:
        """Whether the connections that were opened are there; the package replaces lost ones unasked."""
        return self._receive.isConnected() and self._control.isConnected() and self._sockets <= open_sockets()

    def _listen(self, now: float) -> float:
        """Note whether something new came; returns when it was measured, by this computer's clock [s]."""
        stamp = self._receive.getTimestamp()
        if stamp != self._stamp:
            self._stamp, self._heard = stamp, now
        return self._clock.local(stamp, now)

    def _look(self) -> None:
        """Note a stop of the arm; an error where only the program has ended, which the package may start anew."""
        unplayed = self._unplayed()
        if unplayed and not self._unready():
            time.sleep(0.03)  # the reason may come a few packets later
        if why := self._unready() or unplayed:
            stop_program(self._host)
            self._fault = f"{why}. See the pendant; then connect again"
            if why == unplayed:
                raise RobotError(f"{self._host}: {self._fault}")

    def _unready(self) -> str:
        """Why the arm cannot move, program or not."""
        mode, safety = self._receive.getRobotMode(), self._receive.getSafetyMode()
        if safety not in SAFE:
            return f"{_named(SAFETY_MODES, safety)} (safety mode {safety})"
        return "" if mode == RUNNING else f"the robot is {_named(ROBOT_MODES, mode)} (robot mode {mode})"

    def _unplayed(self) -> str:
        """Whether the package's program does not run: stopped on the pendant, or by the controller's watchdog."""
        state = self._receive.getRuntimeState()
        if state != PLAYING:
            return f"the control program is {_named(PROGRAM_STATES, state)}, by the pendant or the watchdog"
        return "the controller refused a target" if self._refused else ""


def _named(names: Sequence[str], number: int) -> str:
    return names[number] if 0 <= number < len(names) else "in a state without a name"


def probe(host: str) -> None:
    """See that a controller answers: the package waits without limit for one that does not.

    Raises:
        RobotError: Nobody there, or somebody else.
    """
    asked = struct.pack(">HBH", 5, ord("V"), 2)  # "do you speak version 2 of RTDE?"
    try:
        with socket.create_connection((host, RTDE_PORT), PROBE_S) as connection:
            connection.settimeout(PROBE_S)
            connection.sendall(asked)
            answer = connection.recv(64)
    except TimeoutError as error:
        raise RobotError(
            f"{host}: no answer at port {RTDE_PORT}. Is this the address of the arm's controller?"
        ) from error
    except OSError as error:
        raise RobotError(f"no controller at {host}, port {RTDE_PORT}: {error}. Is it switched on and wired?") from error
    if len(answer) < 4 or answer[2:4] != b"V\x01":
        raise RobotError(
            f"{host}: expected a controller of Universal Robots with RTDE 2, got the answer {answer[:16]!r}"
        )


def open_sockets() -> set[str]:
    """Names of this process' sockets; none where the system does not say (other than Linux)."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # closed since
                found.add(os.readlink(f"/proc/self/fd/{name}"))
    return {name for name in found if name.startswith("socket:")}


def stop_program(host: str) -> None:
    """Stop the controller's program, where it listens: one that is only paused would resume its last motion."""
    with contextlib.suppress(OSError), socket.create_connection((host, DASHBOARD_PORT), 0.2) as connection:
        connection.settimeout(0.2)
        connection.recv(256)  # it greets
        connection.sendall(b"stop\n")
        connection.recv(256)


@contextlib.contextmanager
def _said_by_the_package(host: str) -> Iterator[None]:
    """The package's errors as ours, with what to do about them."""
    try:
        yield
    except RobotError:
        raise
    except (RuntimeError, ValueError) as error:
        said = str(error).strip().removeprefix("ur_rtde: ")
        advice = next((f". {what}" for words, what in ADVICE if words in said.lower()), "")
        raise RobotError(f"{host}: {said.rstrip('.!')}{advice}") from error


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """End this process when something takes longer: on a lost link the package waits for minutes."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
