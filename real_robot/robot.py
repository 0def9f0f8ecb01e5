"""What a driver is: one class that connects to a robot, reads it, and moves it by commands that safety has passed."""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from ..errors import RobotError, SafetyError
from ..sim.robot import RobotModel
from .safety.command import SafeCommand
from .spec import Reading, RobotSpec


class Robot(ABC):
    """A robot behind one interface; a driver is a file with a subclass and a YAML.

    A subclass implements `connect`, `read`, `apply`, `halt` and `disconnect`. It cannot replace `send`, by which alone
    a robot moves: `send` takes nothing but a `SafeCommand`, and only the safety layer makes those.

    Attributes:
        spec: Known before `connect`.
        model: A MuJoCo model of the arm, on which zones and collisions are checked; None where there is none.
    """

    spec: RobotSpec
    model: RobotModel | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "send" in cls.__dict__:
            raise TypeError(
                f"{cls.__name__}.send: a driver implements apply(position); send is the safety layer's door"
            )

    @abstractmethod
    def connect(self) -> None:
        """Open the connection, without moving anything.

        Raises:
            RobotError: Nobody there, a camera is missing, or the robot is not what the spec says.
        """

    @abstractmethod
    def read(self) -> Reading:
        """The newest reading; returns at once.

        Raises:
            RobotError: The connection is lost.
        """

    @abstractmethod
    def apply(self, position: np.ndarray) -> None:
        """Move towards targets float64 (j,) at once; called by `send` only.

        Raises:
            RobotError: The connection is lost, or the robot refuses.
        """

    @abstractmethod
    def halt(self, why: str) -> None:
        """Stop by the robot's own means and stay; callable from any thread, twice, and without a connection."""

    @abstractmethod
    def disconnect(self) -> None:
        """Close the connection; the robot stays where it is. May be called twice."""

    def rest(self) -> None:  # noqa: B027  # a robot without a watchdog need not know
        """The run is over and the robot at rest: no commands come until the next run, which is no reason to stop it."""

    def send(self, command: SafeCommand) -> None:
        """Move to what the safety layer passed; faster than the robot takes commands, they are left out.

        Raises:
            SafetyError: Anything else than a `SafeCommand` for this robot, or one that was sent before.
            RobotError: The connection is lost.
        """
        if type(command) is not SafeCommand:
            raise SafetyError(f"expected a command of the safety layer, got {type(command).__name__}")
        if command.position.shape != (self.spec.dof,):
            raise SafetyError(f"expected {self.spec.dof} axes, got {command.position.shape}")
        now = time.monotonic()
        last_number, last_time = self.__dict__.get("_sent", (-1, -np.inf))
        if command.number <= last_number:
            raise SafetyError("a command is sent once and in order")
        if now - last_time < 0.5 / self.spec.command_hz:
            return  # the next one is as new; a robot's buffer is not to be filled
        self.__dict__["_sent"] = (command.number, now)
        self.apply(command.position)

    def __enter__(self) -> Robot:
        self.connect()
        return self

    def __exit__(self, *error: object) -> None:
        self.disconnect()


class Watch:
    """Halts a robot when nobody says for a while that all is well: against a control loop that hangs.

    Args:
        robot: What is halted.
        seconds: How long the loop may be silent [s].
    """

    def __init__(self, robot: Robot, seconds: float) -> None:
        self._robot, self._seconds = robot, seconds
        self._last = time.monotonic()
        self._end = threading.Event()
        self.fired = ""
        self._thread = threading.Thread(target=self._watch, name="robot watch", daemon=True)

    def __enter__(self) -> Watch:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def beat(self) -> None:
        """All is well."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._end.wait(self._seconds / 4.0):
            silent = time.monotonic() - self._last
            if silent > self._seconds and not self.fired:
                self.fired = f"the control loop was silent for {silent * 1e3:.0f} ms"
                with contextlib.suppress(RobotError):  # its own watchdog is what is left then
                    self._robot.halt(self.fired)

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join(2.0)
