"""A stand-in for the package franky: an arm and a hand in memory, and what the real ones do when they break.

Copied as ``franky.py`` into a folder that children find first. What goes wrong is read from the file ``trouble`` beside
it, what happens is written into ``journal``, a JSON object a line. What is imitated was seen with franky 2.0.0 against
its simulator; reflexes, the user stop and a hand that is held up follow libfranka's documentation.
"""

import enum
import json
import threading
import time
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
HOME = np.array([0.0, -0.785, 0.0, -2.356, 0.0, 1.571, 0.785])
STEP_S = 0.002
SILENCE_S = 1.0


class Exception(Exception):
    pass


class NetworkException(Exception):
    pass


class ProtocolException(Exception):
    pass


class ControlException(Exception):
    pass


class CommandException(Exception):
    pass


class IncompatibleVersionException(Exception):
    pass


class RealtimeConfig(enum.Enum):
    Enforce = 0
    Ignore = 1


class RobotMode(enum.Enum):
    Other = 0
    Idle = 1
    Move = 2
    Guiding = 3
    Reflex = 4
    UserStopped = 5


class Duration:
    def __init__(self, milliseconds):
        if not isinstance(milliseconds, int):
            raise TypeError("expected an integer")
        self.milliseconds = milliseconds

    def to_sec(self):
        return self.milliseconds / 1e3


class JointVelocityMotion:
    def __init__(self, target, duration):
        self.target, self.duration = np.array(target, float), duration
        if self.target.shape != (7,):
            raise TypeError("incompatible function arguments")


class JointVelocityStopMotion:
    pass


class Errors:
    """One truth an error; itself true in any case."""

    joint_reflex = cartesian_reflex = communication_constraints_violation = False

    def __init__(self, names):
        for name in names:
            setattr(self, name, True)


class State:
    def __init__(self, robot):
        self.q, self.dq = robot.q.copy(), robot.dq.copy()
        self.time, self.robot_mode, self.current_errors = Duration(robot.clock), robot.mode, Errors(robot.errors)


def trouble():
    file = FOLDER / "trouble"
    return file.read_text().strip() if file.exists() else ""


_writing = threading.Lock()


def note(what, **rest):
    rest = {key: np.round(value, 9).tolist() if isinstance(value, np.ndarray) else value for key, value in rest.items()}
    with _writing, (FOLDER / "journal").open("a") as file:
        file.write(json.dumps({"t": time.monotonic(), "what": what, **rest}) + "\n")


class Limit:
    def __init__(self, name, most):
        self.name, self.max, self.value = name, np.array(most), np.array(most)

    def set(self, value):
        if (np.array(value) > self.max).any():
            raise RuntimeError(f"{self.name} exceeds maximum")
        self.value = np.array(value)
        note("limit", name=self.name, value=self.value)


class Robot:
    """Velocities are ramped to, held for their duration, and ramped down again; its own clock counts milliseconds."""

    def __init__(self, host, realtime_config=RealtimeConfig.Enforce):
        self.word = trouble()
        if self.word == "refuse":
            raise NetworkException(
                "libfranka: Connection to FCI refused. Please install FCI feature or enable FCI mode"
            )
        if self.word == "busy":
            time.sleep(60)
        if self.word == "version":
            raise IncompatibleVersionException("libfranka: Incompatible library version")
        note("connect", host=host, realtime=realtime_config.name)
        self.joint_velocity_limit = Limit("velocity", [2.175] * 4 + [2.61] * 3)
        self.joint_acceleration_limit = Limit("acceleration", [15.0, 7.5, 10.0, 12.5, 15.0, 20.0, 20.0])
        self.joint_jerk_limit = Limit("jerk", [7500.0, 3750.0, 5000.0, 6250.0, 7500.0, 10000.0, 10000.0])
        self.q, self.dq, self.clock = HOME.copy(), np.zeros(7), 1
        self.goal, self.until = np.zeros(7), 0.0
        self.mode, self.errors = RobotMode.Idle, []
        self.pending, self.moving, self.dead = None, False, False
        if self.word in ("reflex", "stays"):
            self.mode, self.errors = RobotMode.Reflex, ["joint_reflex"]
        self.gone = threading.Event()
        self.lock = threading.RLock()
        threading.Thread(target=Robot._live, args=(_Weak(self), self.gone), daemon=True).start()

    def __del__(self):
        if hasattr(self, "gone"):
            self.gone.set()
            note("disconnect", dq=self.dq)

    # -- the arm -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _live(weak, gone):
        last, noted, frozen = time.monotonic(), 0.0, 0.0
        while not gone.wait(STEP_S):
            robot = weak.get()
            if robot is None:
                return
            now = time.monotonic()
            if trouble() == "silence" or frozen:
                frozen = frozen or now
                if now - frozen > SILENCE_S and not robot.dead:
                    robot.dead, robot.moving = True, False
                    robot.pending = NetworkException("libfranka: UDP receive: Timeout")
                continue
            with robot.lock:
                robot._step(now, now - last)
            if now - noted > 0.01:
                note("state", q=robot.q, dq=robot.dq)
                noted = now
            last = now
            del robot

    def _step(self, now, elapsed):
        self._break(trouble())
        goal = self.goal if now < self.until else np.zeros(7)
        most = self.joint_acceleration_limit.value * elapsed
        self.dq = self.dq + np.clip(goal - self.dq, -most, most)
        self.q = self.q + self.dq * elapsed
        self.clock += max(1, round(elapsed * 1e3))
        if self.moving and now >= self.until and not self.dq.any():
            self.moving, self.mode = False, RobotMode.Idle

    def _break(self, word):
        if word == self.word:
            return
        self.word = word
        found = {
            "reflex": (RobotMode.Reflex, ["cartesian_reflex"], ControlException("motion aborted by reflex!")),
            "user_stop": (RobotMode.UserStopped, [], ControlException("motion aborted by user stop!")),
            "guiding": (RobotMode.Guiding, [], None),
            "planner": (RobotMode.Idle, [], RuntimeError("Motion planner failed with error code -100")),
        }.get(word)
        if found is not None:
            self.mode, self.errors, self.pending = found
            self.moving, self.until, self.goal, self.dq = False, 0.0, np.zeros(7), np.zeros(7)
            note("broke", word=word)

    # -- what franky offers --------------------------------------------------------------------------------------------

    @property
    def state(self):
        if self.dead:
            time.sleep(SILENCE_S)
            raise RuntimeError("Net Exception")
        with self.lock:
            return State(self)

    @property
    def is_in_control(self):
        return self.moving

    def poll_motion(self):
        error, self.pending = self.pending, None
        if error is not None:
            raise error
        return not self.moving

    def move(self, motion, asynchronous=False):
        assert asynchronous, "the loop would wait"
        if isinstance(motion, JointVelocityStopMotion):
            note("stop")
            if self.word != "no_stop":
                self.until = 0.0
            return
        note("move", v=motion.target, ms=motion.duration.milliseconds)
        if self.dead:
            return  # as seen: without a word
        if self.pending is not None:
            self.poll_motion()
        with self.lock:
            if not np.isfinite(motion.target).all():
                self.pending = RuntimeError("Motion planner failed with error code -100")
            elif (np.abs(motion.target) > self.joint_velocity_limit.value).any():
                self.pending = RuntimeError("Waypoint velocity exceeds maximum velocity")
            else:
                self.goal, self.until = motion.target, time.monotonic() + motion.duration.to_sec()
                self.moving, self.mode = True, RobotMode.Move

    def join_motion(self, timeout=None):
        end = time.monotonic() + timeout
        while self.moving and time.monotonic() < end:
            time.sleep(STEP_S)
        self.poll_motion()
        return not self.moving

    def stop(self):
        note("stop at once")
        with self.lock:
            self.until, self.moving, self.mode, self.dq = 0.0, False, RobotMode.Idle, np.zeros(7)
            self.pending = ControlException("libfranka: Move command preempted!")

    def recover_from_errors(self):
        note("recover")
        if self.word == "stays":
            return False
        self.mode, self.errors = RobotMode.Idle, []
        return True


class _Weak:
    """A reference that lets the robot go: the last one that somebody else drops disconnects."""

    def __init__(self, robot):
        import weakref

        self.get = weakref.ref(robot)


class Gripper:
    """Fingers at the speed that is asked for; something of 0.03 m is between them while the trouble is ``held``."""

    def __init__(self, host):
        if trouble() == "no_hand":
            raise NetworkException("libfranka gripper: Connection error")
        self.at, self.held = 0.04, 0.03

    @property
    def width(self):
        if trouble() == "hand_lost":
            raise NetworkException("libfranka gripper: UDP receive: Timeout")
        return self.at

    def _go(self, width, speed):
        if width > 0.08:
            raise CommandException("libfranka gripper: Command failed!")
        least = self.held if trouble() == "held" else 0.0
        while abs(self.at - width) > 1e-9:
            time.sleep(STEP_S)
            step = float(np.clip(width - self.at, -speed * STEP_S, speed * STEP_S))
            if step < 0 and self.at + step < least:
                return False
            self.at += step
        return True

    def move(self, width, speed):
        note("hand", do="move", width=width)
        if not self._go(width, speed):
            raise CommandException("libfranka gripper: Command failed!")
        note("hand there", width=self.at)
        return True

    def grasp(self, width, speed, force, epsilon_inner=0.005, epsilon_outer=0.005):
        note("hand", do="grasp", width=width, force=force, outer=epsilon_outer)
        self._go(width, speed)
        note("hand there", width=self.at)
        return width - epsilon_inner < self.at < width + epsilon_outer
