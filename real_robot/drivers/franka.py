"""A Franka arm (FR3) with or without its hand, through franky-control: joint velocities that follow position targets.

Written against franky-control 2.0.0 and tested with the simulator franky-sim 1.0.4 and a stand-in that breaks on
purpose; no real arm has been moved with it.
"""

from __future__ import annotations

import functools
import gc
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import RobotError
from ...sim.robot import RobotModel
from ...spec import FeatureSpec
from ..cameras import Camera, camera_specs
from ..driver_process import Link, LinkState, ProcessRobot
from ..spec import MotionLimits, RobotSpec

JOINTS = 7
MARGIN = 0.02
"""Kept from the published position limits [rad]: a command that touches one ends in a reflex of the arm."""
PUBLISHED = MotionLimits(
    low=np.array([-2.7437, -1.7837, -2.9007, -3.0421, -2.8065, 0.5445, -3.0159]) + MARGIN,
    high=np.array([2.7437, 1.7837, 2.9007, -0.1518, 2.8065, 4.5169, 3.0159]) - MARGIN,
    velocity=np.array([2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61]),
    acceleration=np.array([10.0, 7.5, 10.0, 10.0, 10.0, 10.0, 10.0]),
    jerk=np.array([5000.0, 3750.0, 5000.0, 5000.0, 5000.0, 5000.0, 5000.0]),
)
"""Positions: the Franka Research 3's, less `MARGIN`. The others: the smaller of what is published for it (FCI
documentation, "Robot and interface specifications") and of what franky 2.0.0 allows [rad, s]."""
END_LOW = np.array([-2.7501, -1.7918, -2.9065, -3.0481, -2.8101, 0.54092, -3.0196])
END_HIGH = np.array([2.7501, 1.7918, 2.9065, -0.1458, 2.8101, 4.5205, 3.0196])
END_SLOPE = np.array([12.0, 5.17, 7.0, 8.0, 34.0, 11.0, 34.0])
END_OFFSET = np.array([0.3, 0.2, 0.2, 0.3, 0.35, 0.35, 0.35])
"""The same documentation: near its ends, a joint may move towards them at ``sqrt(slope distance) - offset`` at most."""

WIDTH_M = 0.08
"""Distance of the hand's fingers that counts as open."""
HAND = (10.0, 200.0, 8000.0)
"""Velocity, acceleration, jerk of the opening [1/s, ...]: of commands. The hand moves at its own speed."""
DEADMAN_S = 0.2
"""A velocity is held for so long; then franky brakes by itself [s]."""
PAUSE_S = 0.15
"""Targets further apart than this have no velocity: a motion begins anew [s]."""
CONNECT_S = 10.0
"""A second client waits for the arm without limit, so the waiting is limited here [s]."""
STOP_S = 0.7
"""How long an orderly stop may take [s]."""
HAND_SILENT_S = 2.0
"""The hand is lost when no width has come for so long [s]."""
REALTIME = Path("/sys/kernel/realtime")
"""What libfranka looks for in a kernel."""


class Franka(ProcessRobot):
    """A Franka Research 3.

    Joint positions are followed by joint velocities: what the target does itself, plus a gain times what is missing.
    The velocity is cut to the limits, also those near a joint's ends, and held for at most 0.2 s: what hangs ends in a
    stop.

    Args:
        host: Address of the arm's control unit; the Franka Control Interface (FCI) is activated in Desk.
        hand: Whether the Franka hand is mounted: the last axis is its opening, 1 for 0.08 m. Closed for good (at most
            0.05) is a grasp with `hand_force`; other openings are moves. An opening that comes while the hand moves
            waits for it. A halt leaves it as it is: it does not drop what it holds.
        hand_speed: Of the fingers [m/s].
        hand_force: Of a grasp [N].
        limits: ``low``, ``high``, ``velocity``, ``acceleration``, ``jerk`` of the joints [rad, s], one number or one a
            joint: they narrow the published ones.
        realtime: ``enforce`` needs a kernel with PREEMPT_RT; with ``ignore``, packets that come late may stop a real
            arm.
        gain: Share of the missing way that is made good per second [1/s].
        rate: Of readings and commands [Hz].
        stale_s: An arm whose clock stands still for so long is lost [s].
        cameras: Name -> camera beside the robot.
        watchdog_s: The arm is stopped when no command comes for so long [s].
        recover: Clear errors of the arm, for example a reflex, when connecting; otherwise a person does so in Desk.
        model: A MuJoCo model of the arm for the safety layer's zones; its joints give the axes their names.
    """

    def __init__(
        self,
        *,
        host: str,
        hand: bool = True,
        hand_speed: float = 0.1,
        hand_force: float = 20.0,
        limits: Mapping[str, float | Sequence[float]] | None = None,
        realtime: str = "enforce",
        gain: float = 4.0,
        rate: float = 200.0,
        stale_s: float = 0.1,
        cameras: Mapping[str, Camera] | None = None,
        watchdog_s: float = 0.2,
        recover: bool = False,
        model: RobotModel | None = None,
    ) -> None:
        if realtime not in ("enforce", "ignore"):
            raise RobotError(f"robot 'franka': expected realtime=enforce or ignore, got {realtime!r}")
        numbers = {"gain": gain, "rate": rate, "stale_s": stale_s, "hand_speed": hand_speed, "hand_force": hand_force}
        for name, value in numbers.items():
            if not (np.isfinite(value) and value > 0):
                raise RobotError(f"robot 'franka': expected {name} above 0, got {value}")
        if model is not None and len(model.joints) != JOINTS:
            raise RobotError(f"robot 'franka': expected a model with {JOINTS} joints, got {list(model.joints)}")
        own, self.model = narrowed(limits), model
        link = functools.partial(
            FrankaLink,
            host,
            limits=own,
            hand=(hand_speed, hand_force) if hand else None,
            enforce=realtime == "enforce",
            gain=gain,
            stale_s=stale_s,
            deadman_s=min(DEADMAN_S, watchdog_s),
            recover=recover,
        )
        names = model.joints if model is not None else tuple(f"joint{k + 1}" for k in range(JOINTS))
        super().__init__(franka_spec(names, own, hand, rate, dict(cameras or {}), watchdog_s), link, cameras=cameras)


def franka_spec(
    names: Sequence[str],
    limits: MotionLimits,
    hand: bool,
    rate: float,
    cameras: Mapping[str, Camera],
    watchdog_s: float,
) -> RobotSpec:
    """What an arm with joints of these names is."""
    count = JOINTS + hand
    return RobotSpec(
        name="franka",
        axes=FeatureSpec(
            name="axes",
            shape=(count,),
            names=(*names, *(["gripper"] if hand else [])),
            units=("rad",) * JOINTS + ("1",) * hand,
            low=(*limits.low.tolist(), *[0.0] * hand),
            high=(*limits.high.tolist(), *[1.0] * hand),
            gripper="open_is_1" if hand else "none",
        ),
        velocity=(*limits.velocity.tolist(), *HAND[:1] * hand),
        acceleration=(*limits.acceleration.tolist(), *HAND[1:2] * hand),
        jerk=(*limits.jerk.tolist(), *HAND[2:] * hand),
        command_hz=rate,
        state_hz=rate,
        cameras=camera_specs(cameras),
        watchdog_s=watchdog_s,
    )


def narrowed(limits: Mapping[str, float | Sequence[float]] | None) -> MotionLimits:
    """The published limits, narrowed by a config's.

    Raises:
        RobotError: A key that is no limit, or neither one number nor seven.
    """
    own = {key: getattr(PUBLISHED, key) for key in ("low", "high", "velocity", "acceleration", "jerk")}
    for key, value in (limits or {}).items():
        given = np.asarray(value, np.float64)
        if key not in own or given.shape not in ((), (JOINTS,)):
            raise RobotError(
                f"robot 'franka': expected limits of {sorted(own)}, one number or {JOINTS}, got {key}: {value}"
            )
        own[key] = np.broadcast_to(given, (JOINTS,))
    return PUBLISHED.tightened(MotionLimits(**own))


def velocity_bounds(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest velocities (7,) [rad/s] that the arm accepts at joint positions (7,) [rad]."""
    down = np.sqrt(END_SLOPE * np.maximum(position - END_LOW, 0.0)) - END_OFFSET
    up = np.sqrt(END_SLOPE * np.maximum(END_HIGH - position, 0.0)) - END_OFFSET
    return -np.maximum(down, 0.0), np.maximum(up, 0.0)


def errors_of(state: Any) -> list[str]:
    """Names of the errors in a ``franky.RobotState``: its set of them is true also when it is empty."""
    errors = state.current_errors
    return [name for name in dir(errors) if not name.startswith("_") and getattr(errors, name) is True]


class Follower:
    """Velocities that follow position targets which come at a steady pace.

    Args:
        gain: Share of the missing way that is made good per second [1/s].
        limits: Of the joints.
    """

    def __init__(self, gain: float, limits: MotionLimits) -> None:
        self._gain, self._limits = gain, limits
        self.restart()

    def restart(self) -> None:
        """What was followed is over."""
        self._last: tuple[float, np.ndarray] | None = None
        self._gaps: deque[float] = deque(maxlen=9)

    def velocity(self, target: np.ndarray, position: np.ndarray, now: float) -> np.ndarray:
        """Joint velocity (7,) [rad/s], towards a target (7,) that came now, from a measured position (7,)."""
        limits = self._limits
        target = np.clip(target, limits.low, limits.high)
        moving = np.zeros(JOINTS)
        if self._last is not None:
            gap = now - self._last[0]
            if gap > PAUSE_S:
                self.restart()
            elif gap > 0:
                # Targets are sent evenly and arrive unevenly: their pace is the middle of what was seen.
                self._gaps.append(gap)
                pace = float(np.median(self._gaps))
                moving = (target - self._last[1]) / (pace * max(1, round(gap / pace)))
        self._last = (now, target)
        least, most = velocity_bounds(position)
        wanted = moving + self._gain * (target - position)
        return np.clip(wanted, np.maximum(least, -limits.velocity), np.minimum(most, limits.velocity))


class Hand:
    """The Franka hand, whose commands wait until the fingers are there: in a thread, and read in another.

    Args:
        gripper: ``franky.Gripper``.
        speed: [m/s].
        force: Of a grasp [N].
        aborted: What `gripper` raises when fingers do not arrive, for example because something is between them.
    """

    CLOSED, CHANGE = 0.05, 0.03
    SETTLE_S, WAIT_S, READ_S = 0.06, 0.25, 0.03

    def __init__(self, gripper: Any, speed: float, force: float, aborted: type[BaseException]) -> None:
        self._gripper, self._speed, self._force, self._aborted = gripper, speed, force, aborted
        self._news, self._end = threading.Condition(), threading.Event()
        self._wanted: float | None = None
        self._changed = 0.0
        self._fault = ""
        self._seen = (time.monotonic(), self._opening(), 0.0)
        self._done = self._seen[1]
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._look, self._work)]
        for thread in self._threads:
            thread.start()

    def _opening(self) -> float:
        return float(np.clip(self._gripper.width / WIDTH_M, 0.0, 1.0))

    def state(self) -> tuple[float, float, str]:
        """Opening (0 to 1), its velocity [1/s], and what is wrong, if anything is."""
        stamp, opening, velocity = self._seen
        silent = time.monotonic() - stamp
        if not self._fault and silent > HAND_SILENT_S:
            self._fault = f"the hand: silent for {silent:.1f} s"
        return opening, velocity, self._fault

    def want(self, opening: float) -> None:
        """Move there, once the hand is free."""
        opening = 0.0 if opening <= self.CLOSED else min(float(opening), 1.0)
        with self._news:
            if abs(opening - (self._done if self._wanted is None else self._wanted)) > 1e-3:
                self._wanted, self._changed = opening, time.monotonic()
                self._news.notify()

    def forget(self) -> None:
        """Nothing is wanted that has not begun."""
        with self._news:
            self._wanted = None

    def close(self) -> None:
        """Let what has begun end, and say no more to the hand."""
        self.forget()
        self._end.set()
        with self._news:
            self._news.notify_all()
        for thread in self._threads:
            thread.join(1.0)

    def _look(self) -> None:
        while not self._end.wait(self.READ_S):
            try:
                opening, now = self._opening(), time.monotonic()
            except Exception as error:
                self._fault = f"the hand: {error}"
                return
            before, last, _ = self._seen
            self._seen = (now, opening, (opening - last) / max(now - before, 1e-3))

    def _next(self) -> float | None:
        """What to move to: what has settled, or changes for so long that it is no use to wait for it."""
        with self._news:
            self._news.wait_for(lambda: self._wanted is not None or self._end.is_set(), 0.5)
        begin = time.monotonic()
        while not self._end.is_set():
            with self._news:
                now = time.monotonic()
                if self._wanted is None:
                    return None
                if now - self._changed > self.SETTLE_S or now - begin > self.WAIT_S:
                    wanted, self._wanted = self._wanted, None
                    small = wanted > 0.0 and abs(wanted - self._done) < self.CHANGE
                    return None if small else wanted
            time.sleep(0.01)
        return None

    def _work(self) -> None:
        while not self._end.is_set():
            wanted = self._next()
            if wanted is None:
                continue
            self._done = wanted
            try:
                if wanted == 0.0:
                    self._gripper.grasp(0.0, self._speed, self._force, WIDTH_M, WIDTH_M)  # any width is a grasp
                else:
                    self._gripper.move(wanted * WIDTH_M, self._speed)
            except self._aborted as error:
                print(f"the hand did not get to {wanted:.2f}: {error}", flush=True)  # held up; its width shows it
            except Exception as error:
                self._fault = f"the hand: {error}"
                return


class FrankaLink(Link):
    """franky's side of the driver, in the child.

    Args:
        host: Address of the arm.
        limits: Of the joints.
        hand: Speed [m/s] and force [N] of the hand; None without one.
        enforce: Whether a real-time kernel is insisted on.
        gain, stale_s, recover: See `Franka`.
        deadman_s: How long a velocity is held [s].
    """

    def __init__(
        self,
        host: str,
        *,
        limits: MotionLimits,
        hand: tuple[float, float] | None,
        enforce: bool,
        gain: float,
        stale_s: float,
        deadman_s: float,
        recover: bool,
    ) -> None:
        self._host, self._limits, self._options = host, limits, hand
        self._enforce, self._stale_s, self._recover = enforce, stale_s, recover
        self._deadman_ms = round(deadman_s * 1e3)
        self._follower = Follower(gain, limits)
        self._franky: Any = None
        self._robot: Any = None
        self._hand: Hand | None = None
        self._position: np.ndarray = np.zeros(JOINTS)
        self._clock, self._seen = -1.0, 0.0
        self._fault = self._lost = ""

    # -- beginning -----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect to the arm and the hand."""
        try:
            import franky
        except ImportError as error:
            raise RobotError(f"a Franka needs franky ({error}). Type: uv pip install 'brachium[franka]'") from error
        if self._enforce and not REALTIME.exists():
            raise RobotError(
                "expected a kernel with PREEMPT_RT, got another: a real arm stops when packets come late. Install one, "
                "or type robot.realtime=ignore"
            )
        self._franky = franky
        self._robot = self._connected()
        self._require_ready()
        robot, limits = self._robot, self._limits
        self._try("set the limits", lambda: robot.joint_velocity_limit.set(limits.velocity.tolist()))
        self._try("set the limits", lambda: robot.joint_acceleration_limit.set(PUBLISHED.acceleration.tolist()))
        self._try("set the limits", lambda: robot.joint_jerk_limit.set(PUBLISHED.jerk.tolist()))
        if self._options is not None:
            gripper = self._try("reach the hand (robot.hand=false without one)", lambda: franky.Gripper(self._host))
            aborted = franky.CommandException
            self._hand = self._try("read the hand", lambda: Hand(gripper, *self._options, aborted))

    def _try(self, what: str, do: Any) -> Any:
        try:
            return do()
        except Exception as error:
            raise RobotError(f"{self._host}: cannot {what}: {error}") from error

    def _connected(self) -> Any:
        """``franky.Robot``, within a time."""
        franky, found = self._franky, []
        config = franky.RealtimeConfig.Enforce if self._enforce else franky.RealtimeConfig.Ignore

        def work() -> None:
            try:
                found.append(franky.Robot(self._host, realtime_config=config))
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(CONNECT_S)
        if not found:
            raise RobotError(
                f"{self._host} did not answer within {CONNECT_S:g} s: does another program hold its control interface?"
            )
        error = found[0]
        if isinstance(error, franky.IncompatibleVersionException):
            raise RobotError(f"{self._host} speaks another version than this franky: {error}. Match its system image")
        if isinstance(error, Exception):
            raise RobotError(
                f"no arm at {self._host}: {str(error).rstrip('.')}. Is it on, unlocked, and FCI activated in Desk?"
            )
        return error

    def _require_ready(self) -> None:
        """The arm would take commands; errors are cleared where that was asked for."""
        state = self._try("read the arm", lambda: self._robot.state)
        if self._recover and (errors_of(state) or state.robot_mode.name == "Reflex"):
            self._try("recover from errors", self._robot.recover_from_errors)
            state = self._try("read the arm", lambda: self._robot.state)
        if why := self._trouble(state):
            hint = "Clear it in Desk, or type robot.recover=true once nobody is in its way."
            raise RobotError(f"{self._host} is not ready: {why}. {hint if errors_of(state) else 'Change that first.'}")

    @staticmethod
    def _trouble(state: Any) -> str:
        """Why an arm in this state does not move."""
        mode = state.robot_mode.name
        if errors := errors_of(state):
            return f"{', '.join(errors)} (mode {mode})"
        if mode == "UserStopped":
            return "user stop: the external activation device is pressed"
        if mode == "Guiding":
            return "it is guided by hand"
        return "" if mode in ("Idle", "Move") else f"its mode is {mode}"

    # -- in use --------------------------------------------------------------------------------------------------------

    def read(self) -> LinkState:
        """Joints and opening; a fault stays."""
        if self._lost:
            raise RobotError(self._lost)
        try:
            self._robot.poll_motion()  # what ended a motion is raised here, and only once
        except Exception as error:
            self._failed(error)
        try:
            state = self._robot.state
        except Exception as error:
            raise self._broken(error) from error
        now, clock = time.monotonic(), state.time.to_sec()
        if clock != self._clock:
            self._clock, self._seen = clock, now
        elif now - self._seen > self._stale_s:
            raise self._broken(f"its clock stands still for {(now - self._seen) * 1e3:.0f} ms")
        self._end(self._trouble(state))
        self._position = np.array(state.q, np.float64)
        position, velocity = self._position, np.array(state.dq, np.float64)
        if self._hand is not None:
            opening, opens, why = self._hand.state()
            position, velocity = np.append(position, opening), np.append(velocity, opens)
            if why and not self._fault:
                self._end(why)
                self._stand()
        return LinkState(position=position, velocity=velocity, timestamp=self._seen, fault=self._fault)

    def move(self, position: np.ndarray) -> None:
        """Follow targets; a fault ends it."""
        if self._lost or self._fault:
            return
        franky = self._franky
        velocity = self._follower.velocity(position[:JOINTS], self._position, time.monotonic())
        try:
            motion = franky.JointVelocityMotion(velocity, duration=franky.Duration(self._deadman_ms))
            self._robot.move(motion, asynchronous=True)
        except Exception as error:
            self._failed(error)
            return
        if self._hand is not None:
            self._hand.want(position[JOINTS])

    def _failed(self, error: Exception) -> None:
        """A motion ended by itself: a fault, or the end of the link."""
        franky = self._franky
        if isinstance(error, (franky.NetworkException, franky.ProtocolException)) or "Net Exception" in str(error):
            raise self._broken(error) from error
        self._end(f"the motion ended: {error}")

    def _end(self, why: str) -> None:
        """A fault, if there is a reason: the first stays."""
        if why and not self._fault:
            self._fault = why
            self._follower.restart()
            if self._hand is not None:
                self._hand.forget()

    def _broken(self, error: Exception | str) -> RobotError:
        """The link is lost for good: franky would wait a second at each call, and take commands without a word."""
        self._lost = f"{self._host} is lost: {error}"
        return RobotError(self._lost)

    # -- the end -------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Brake; the hand ends what it has begun."""
        if self._hand is not None:
            self._hand.forget()
        self._follower.restart()
        if self._robot is not None and not self._lost:
            self._stand()

    def _stand(self) -> None:
        """Brake within the limits; where that does not come to an end, at once."""
        robot, franky = self._robot, self._franky
        try:
            if robot.is_in_control:
                robot.move(franky.JointVelocityStopMotion(), asynchronous=True)
                if not robot.join_motion(timeout=STOP_S):
                    robot.stop()
                    robot.join_motion(timeout=STOP_S)
        except Exception as error:
            if "preempted" not in str(error):  # that is how libfranka says that it stopped as told
                self._failed(error)

    def close(self) -> None:
        """Let go of the arm: franky closes the connection with its last reference."""
        if self._hand is not None:
            self._hand.close()
        self._hand = self._robot = None
        gc.collect()
