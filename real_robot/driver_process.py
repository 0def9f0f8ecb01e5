"""Drivers on a vendor's package: the package lives in a process of its own, which the control loop never waits for.

Such packages hold Python's lock, wait for sockets without limit, or take the process with them when a link is lost. So
a `Link` wraps the package in a child process, and a `ProcessRobot` is the driver in this one. The child has a watchdog:
when nobody commands for a while, or this process is gone, it stops the robot in an orderly way.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RobotError, WireError
from ..policies.wire import decode, encode
from .cameras import Camera, CameraSet
from .robot import Robot
from .spec import Frame, Reading, RobotSpec

START_S = 30.0
"""How long a link may take to open [s]: importing LeRobot alone takes 13 s."""
SILENT_S = 1.0
"""A child that says nothing for so long is taken for lost, and killed [s]."""


@dataclass(frozen=True, kw_only=True)
class LinkState:
    """What a link reads.

    Attributes:
        position, velocity: float64 (j,), in the units of the spec's axes.
        timestamp: When it was measured, by this computer's `time.monotonic` [s].
        fault: Why the robot does not move; ends the link: it is opened anew, by a person, before anything moves again.
        frames: Pictures that the vendor's package delivers.
    """

    position: np.ndarray
    velocity: np.ndarray
    timestamp: float
    fault: str = ""
    frames: Mapping[str, Frame] = field(default_factory=dict)


class Link(ABC):
    """A vendor's package, seen from the child; every method is called by one thread. Made in the child."""

    @abstractmethod
    def open(self) -> None:
        """Connect, without moving anything.

        Raises:
            RobotError: With what to do about it.
        """

    @abstractmethod
    def read(self) -> LinkState:
        """What is measured now.

        Raises:
            RobotError: The link is lost.
        """

    @abstractmethod
    def move(self, position: np.ndarray) -> None:
        """Move towards finite targets float64 (j,); `read` was called just before and found no fault.

        Raises:
            RobotError: The robot refuses, or the link is lost.
        """

    @abstractmethod
    def stop(self) -> None:
        """Bring the robot to rest; the link is whole."""

    @abstractmethod
    def close(self) -> None:
        """Disconnect; the robot is at rest, the link is whole. A broken one is left to the end of the process."""


class ProcessRobot(Robot):
    """A driver whose `Link` lives in a process of its own.

    Args:
        spec: What the robot is; ``watchdog_s`` is what the child keeps.
        link: Makes the link, in the child; a class or a `functools.partial` of one.
        cameras: Cameras beside the robot; read in the child too.
        rate_hz: Rate of the child's loop [Hz].
        start_s: How long it may take to open [s].
    """

    def __init__(
        self,
        spec: RobotSpec,
        link: Callable[[], Link],
        *,
        cameras: Mapping[str, Camera] | None = None,
        rate_hz: float | None = None,
        start_s: float = START_S,
    ) -> None:
        if spec.watchdog_s is None:
            raise RobotError(f"robot {spec.name!r}: expected watchdog_s, which this driver keeps")
        self.spec = spec
        self._link, self._cameras = link, dict(cameras or {})
        self._rate_hz, self._start_s = rate_hz or max(spec.state_hz, spec.command_hz), start_s
        self._process: Any = None
        self._connection: Connection | None = None
        self._log: Path | None = None
        self._news = threading.Condition()
        self._sending = threading.Lock()
        self._reading: Reading | None = None
        self._frames: dict[str, Frame] = {}
        self._lost = ""

    def connect(self) -> None:
        """Start the child, and wait for its first reading with a frame of every camera."""
        if self._connection is not None:
            return
        self._reading, self._frames, self._lost = None, {}, ""
        handle, name = tempfile.mkstemp(prefix=f"brachium-{self.spec.name}-", suffix=".log")
        os.close(handle)
        self._log = Path(name)
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        options = (self._link, self._cameras, self._rate_hz, self.spec.watchdog_s, self.spec.dof, name)
        self._process = context.Process(target=_child, args=(theirs, *options), daemon=True)
        self._process.start()
        theirs.close()
        self._connection = mine
        threading.Thread(target=self._listen, args=(mine,), daemon=True).start()
        names = set(self.spec.camera_names)
        with self._news:
            self._news.wait_for(
                lambda: bool(self._lost) or (self._reading is not None and self._ready(names)), self._start_s
            )
            why, reading, frames = self._lost, self._reading, set(self._frames)
            if not why and reading is not None and not frames >= names:
                why = reading.fault
        if why or reading is None or not frames >= names:
            said = self._said()
            self.disconnect()
            if not why:
                lacking = f"no frame of {', '.join(sorted(names - frames))}" if reading is not None else "no reading"
                why = f"{lacking} within {self._start_s:g} s"
            raise RobotError(f"robot {self.spec.name!r}: {why}{said}")
        shapes = {c.name: c.shape for c in self.spec.cameras}
        got = {name: frame.image.shape for name, frame in self._frames.items()}
        if reading.position.shape != (self.spec.dof,) or any(got[name] != shapes[name] for name in shapes):
            self.disconnect()
            raise RobotError(
                f"robot {self.spec.name!r} is not what its YAML says: expected {self.spec.dof} axes and cameras "
                f"{shapes}, got {len(reading.position)} axes and {got}"
            )

    def _ready(self, names: set[str]) -> bool:
        """Whether all cameras have shown something, or one says why it never will."""
        return set(self._frames) >= names or bool(self._reading and "camera" in self._reading.fault)

    def read(self) -> Reading:
        """The newest reading."""
        with self._news:
            if self._reading is None or (self._lost and not self._reading.fault):
                raise RobotError(f"robot {self.spec.name!r}: the link is lost: {self._lost or 'not connected'}")
            return self._reading

    def apply(self, position: np.ndarray) -> None:
        """Hand targets to the child."""
        self._tell({"type": "move", "position": np.asarray(position, np.float64)})

    def halt(self, why: str) -> None:
        """The child stops the robot; where it is gone, the robot's own watchdog is what is left."""
        with contextlib.suppress(RobotError):
            self._tell({"type": "halt", "why": why})

    def rest(self) -> None:
        """The robot holds, and the child's watchdog waits for the next run."""
        self._tell({"type": "rest"})

    def disconnect(self) -> None:
        """Stop the robot, close the link, end the child."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError, ValueError), self._sending:
                connection.send_bytes(encode({"type": "close"}))
        process, self._process = self._process, None
        if process is not None:
            process.join(4.0)
            if process.is_alive():
                process.kill()
                process.join(2.0)
        if connection is not None:
            connection.close()
        if self._log is not None:
            self._log.unlink(missing_ok=True)
            self._log = None
        with self._news:
            self._reading, self._frames = None, {}

    @property
    def process_id(self) -> int | None:
        """Of the child."""
        return None if self._process is None else self._process.pid

    def _said(self) -> str:
        """The end of what the vendor's package printed."""
        text = self._log.read_text(errors="replace").strip() if self._log is not None and self._log.exists() else ""
        return "\n" + "\n".join(text.splitlines()[-8:]) if text else ""

    def _tell(self, message: dict[str, Any]) -> None:
        connection = self._connection
        if connection is None or self._lost:
            raise RobotError(f"robot {self.spec.name!r}: the link is lost: {self._lost or 'not connected'}")
        try:
            with self._sending:
                connection.send_bytes(encode(message))
        except (OSError, ValueError) as error:
            with self._news:
                self._news.wait_for(lambda: bool(self._lost), 0.1)  # the child's last word says more than a broken pipe
            raise RobotError(f"robot {self.spec.name!r}: the link is lost: {self._lost or error}") from error

    def _listen(self, connection: Connection) -> None:
        why = ""
        while not why:
            try:
                if not connection.poll(SILENT_S if self._reading is not None else self._start_s + 1.0):
                    why = "its process says nothing"
                    break
                message = decode(connection.recv_bytes())
            except WireError:
                continue
            except (OSError, EOFError, TypeError, ValueError):  # the last two: closed meanwhile by this process
                why = "its process ended"
                break
            with self._news:
                if self._connection is not connection:
                    return  # disconnected, perhaps connected anew: this child is no news any more
                if message["type"] == "lost":
                    why = message["why"]
                else:
                    for name, (image, stamp) in message["frames"].items():
                        self._frames[name] = Frame(image=image, timestamp=stamp)
                    self._reading = Reading(
                        position=message["position"],
                        velocity=message["velocity"],
                        timestamp=message["time"],
                        frames=dict(self._frames),
                        fault=message["fault"],
                    )
                self._news.notify_all()
        with self._news:
            if self._connection is not connection:
                return
            self._lost = why
            self._news.notify_all()
            process = self._process
        if process is not None and process.is_alive():
            process.join(0.5)
            process.kill()  # packages have been seen to go on by themselves after a lost link


def _child(
    connection: Connection,
    make: Callable[[], Link],
    cameras: Mapping[str, Camera],
    rate_hz: float,
    watchdog_s: float,
    dof: int,
    log: str,
) -> None:
    """Entry of the child's process."""
    import signal

    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C, a closed terminal and Ctrl-Z are for the control loop; this goes on, and sees it end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    sys.stdout.flush()
    for stream in (1, 2):  # also what is printed by C++
        os.dup2(output, stream)
    speaker = _Speaker(connection)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))  # an orderly end, also then
    try:
        worker = _Worker(connection, speaker, cameras, watchdog_s, dof, asked)  # it holds the link
        worker.run(make, 1.0 / rate_hz)
    except RobotError as error:
        speaker.last(str(error))
        os._exit(1)  # no destructors: on a lost link they wait, abort, or connect again
    except BaseException as error:
        speaker.last(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


class _Speaker:
    """Sends the newest reading from a thread: a parent that stands still never keeps the child from its watchdog."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock, self._news = connection, threading.Lock(), threading.Condition()
        self._state: dict[str, Any] | None = None
        self._frames: dict[str, Frame] = {}
        self._sent: dict[str, float] = {}
        threading.Thread(target=self._work, name="speaker", daemon=True).start()

    def say(self, state: dict[str, Any], frames: Mapping[str, Frame]) -> None:
        """A reading, and the newest pictures."""
        with self._news:
            self._state = state
            self._frames.update(frames)
            self._news.notify()

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._state is not None)
                state, self._state = self._state, None
                new = {name: f for name, f in self._frames.items() if f.timestamp != self._sent.get(name)}
            assert state is not None
            self._sent.update({name: frame.timestamp for name, frame in new.items()})
            frames = {name: [frame.image, frame.timestamp] for name, frame in new.items()}
            with self._lock, contextlib.suppress(OSError, ValueError):  # the next look at the pipe finds out
                self._connection.send_bytes(encode({"type": "state", **state, "frames": frames}))

    def last(self, why: str) -> None:
        """The last word."""
        if self._lock.acquire(timeout=0.5):
            with contextlib.suppress(OSError, WireError, ValueError):
                self._connection.send_bytes(encode({"type": "lost", "why": why}))


class _Worker:
    """The child's loop."""

    def __init__(
        self,
        connection: Connection,
        speaker: _Speaker,
        cameras: Mapping[str, Camera],
        watchdog_s: float,
        dof: int,
        asked: list[int],
    ) -> None:
        self._connection, self._speaker, self._asked = connection, speaker, asked
        self._watchdog_s, self._dof = watchdog_s, dof
        self._cameras = CameraSet(cameras)
        self._fault, self._heard, self._engaged = "", 0.0, False
        self._link: Link | None = None

    def run(self, make: Callable[[], Link], period: float) -> None:
        """Until told to close, or the link is lost."""
        self._cameras.open()
        self._link = link = make()
        link.open()
        deadline = time.monotonic()
        while True:
            target, told = self._hear()
            state = link.read()
            now = time.monotonic()
            if state.fault and not self._fault:
                self._fault = state.fault
            elif not self._fault and (broken := self._cameras.broken()):
                self._fault = "; ".join(f"camera {name}: {why}" for name, why in broken.items())
                if self._engaged:
                    link.stop()
            elif self._engaged and not self._fault and now - self._heard > self._watchdog_s:
                self._fault = f"watchdog: no command for {(now - self._heard) * 1e3:.0f} ms"
                link.stop()
            if told and not self._fault:
                self._fault = "" if told == "close" else told
                link.stop()
            self._say(state)
            if told == "close":
                link.close()
                self._cameras.close()
                return
            if target is not None and not self._fault:
                link.move(target)
            deadline = max(deadline + period, now)  # a slow package makes a slower loop, not a hurried one
            time.sleep(max(0.0, deadline - time.monotonic()))

    def _hear(self) -> tuple[np.ndarray | None, str]:
        """The newest targets, and ``close`` or why to halt."""
        target, told = None, ""
        if self._asked:
            return None, "close"
        while self._connection.poll(0):
            try:
                message = decode(self._connection.recv_bytes())
            except (EOFError, OSError):
                return None, "close"  # who commanded is gone
            if message["type"] == "move":
                position = np.array(message["position"], np.float64)
                if position.shape == (self._dof,) and np.isfinite(position).all():
                    target, self._heard, self._engaged = position, time.monotonic(), True
            elif message["type"] == "rest":
                self._engaged = False  # it holds where it is: stopping it would let it sink to where it was measured
            elif message["type"] == "halt":
                told = told or f"halted: {message['why']}"
            else:
                return None, "close"
        return target, told

    def _say(self, state: LinkState) -> None:
        reading = {
            "position": np.asarray(state.position, np.float64),
            "velocity": np.asarray(state.velocity, np.float64),
            "time": float(state.timestamp),
            "fault": self._fault,
        }
        self._speaker.say(reading, {**self._cameras.frames(), **state.frames})
