"""A simulated robot in real time behind the interface of a real one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...envs.tabletop import TabletopEnv
from ...errors import RobotError, WireError
from ...policies.wire import decode, encode
from ...sim.embodiment import SimEmbodiment
from ...spec import FeatureSpec
from ..robot import Robot
from ..spec import Frame, Reading, RobotSpec
from ..twin import KEY_VARIABLE, STATE_HZ, connect, hang_up, run_twin


class MujocoTwin(Robot):
    """The arm of a table-top environment, simulated in a process of its own.

    Args:
        env: Makes the environment whose robot this is.
        velocity, acceleration, jerk: Largest values of every arm joint [rad/s, rad/s^2, rad/s^3], one or one a joint.
        gripper: The same three of the gripper's opening [1/s, ...].
        address: ``HOST:PORT`` of a twin that runs already (``brachium twin``); None starts one.
        watchdog_s, camera_hz, faults: See `Twin`; of a twin that is started here.
    """

    def __init__(
        self,
        *,
        env: Callable[..., TabletopEnv],
        velocity: float | Sequence[float] = 4.0,
        acceleration: float | Sequence[float] = 40.0,
        jerk: float | Sequence[float] = 2000.0,
        gripper: Sequence[float] = (8.0, 100.0, 4000.0),
        address: str | None = None,
        watchdog_s: float = 0.15,
        camera_hz: float = 31.25,
        faults: Mapping[str, Any] | None = None,
    ) -> None:
        made = env(images=False)
        self.body: SimEmbodiment = made.embodiment
        made.close()
        self.model = self.body.robot
        self._env, self._address = env, address
        self._options = {"watchdog_s": watchdog_s, "camera_hz": camera_hz, "faults": dict(faults or {})}
        self.spec = twin_spec(self.body, (velocity, acceleration, jerk), gripper, watchdog_s, camera_hz)
        self._connection: Any = None
        self._process: Any = None
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._news = threading.Condition(self._lock)
        self._state: dict[str, Any] | None = None
        self._frames: dict[str, Frame] = {}
        self._numbers: dict[str, tuple[int, int]] = {}
        self._replies: dict[str, dict[str, Any]] = {}
        self._lost = ""
        self._listener: threading.Thread | None = None

    # -- the robot -----------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Start the twin, or find the one that runs, and wait for its first reading."""
        if self._connection is not None:
            return
        if self._address is None:
            key, where = secrets.token_bytes(16), Path(tempfile.mkdtemp(prefix="brachium-twin-")) / "socket"
            context = multiprocessing.get_context("spawn")  # a fork with an open OpenGL context hangs
            arguments = (self._env, str(where), key, os.getpid(), self._options)
            self._process = context.Process(target=run_twin, args=arguments, daemon=True)
            self._process.start()
            address: Any = str(where)
        else:
            host, _, port = self._address.rpartition(":")
            if not port.isdigit():
                raise RobotError(f"expected the address of a twin as HOST:PORT, got {self._address!r}")
            address, key = (host, int(port)), os.environ.get(KEY_VARIABLE, "").encode()
            if not key:
                raise RobotError(f"the twin at {self._address} needs its key: set {KEY_VARIABLE} to what it printed")
        self._connection = connect(address, key, 30.0 if self._process is not None else 2.0)
        self._lost = ""
        self._listener = threading.Thread(target=self._listen, args=(self._connection,), daemon=True)
        self._listener.start()
        with self._news:
            complete = self._news.wait_for(self._complete, timeout=30.0)
        if not complete:
            lacking = sorted(set(self.spec.camera_names) - set(self._frames))
            self.disconnect()
            raise RobotError(f"the twin says nothing: no {'reading' if self._state is None else f'frame of {lacking}'}")
        self._check_fit()
        self._tell({"type": "release"})

    def _complete(self) -> bool:
        return bool(self._lost) or (self._state is not None and set(self._frames) >= set(self.spec.camera_names))

    def _check_fit(self) -> None:
        if self._lost or self._state is None:
            raise RobotError(f"the twin went away: {self._lost}")
        got = (len(self._state["position"]), {name: f.image.shape for name, f in self._frames.items()})
        wanted = (self.spec.dof, {c.name: c.shape for c in self.spec.cameras})
        if got != wanted:
            self.disconnect()
            raise RobotError(f"the twin is another robot: expected axes and cameras {wanted}, got {got}")

    def read(self) -> Reading:
        """The newest reading."""
        with self._lock:
            if self._lost or self._state is None:
                raise RobotError(f"the connection to the twin is lost: {self._lost or 'not connected'}")
            state = self._state
            return Reading(
                position=state["position"],
                velocity=state["velocity"],
                timestamp=state["time"],
                frames=dict(self._frames),
                fault=state["fault"],
            )

    def apply(self, position: np.ndarray) -> None:
        """Send targets."""
        number = self.__dict__["_sent"][0]
        self._tell({"type": "command", "position": position, "number": number, "time": time.monotonic()})

    def halt(self, why: str) -> None:
        """The twin holds and reports a fault."""
        with contextlib.suppress(RobotError):  # its watchdog does the same
            self._tell({"type": "halt", "why": why})

    def rest(self) -> None:
        """Its watchdog waits for the next run."""
        self._tell({"type": "rest"})

    def disconnect(self) -> None:
        """Hang up; a twin that was started here ends."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._process is not None:
                with contextlib.suppress(OSError, ValueError):
                    connection.send_bytes(encode({"type": "end"}))
            hang_up(connection)
        if self._listener is not None:
            self._listener.join(1.0)
            self._listener = None
        if self._process is not None:
            self._process.join(3.0)
            if self._process.is_alive():
                self._process.kill()
            self._process = None
        self._state, self._frames, self._numbers = None, {}, {}

    # -- what only a simulated robot has -------------------------------------------------------------------------------

    def reset(self, seed: int, options: Mapping[str, Any] | None = None) -> None:
        """Begin an episode: the scene of `seed`, the arm at its start."""
        epoch = self.ask({"type": "reset", "seed": seed, "options": dict(options or {}) or None}, "reset")["epoch"]
        sources = ("state", *self.spec.camera_names)

        def fresh() -> bool:
            return bool(self._lost) or all(self._numbers.get(name, (0, 0))[0] >= epoch for name in sources)

        with self._news:
            if not self._news.wait_for(fresh, timeout=5.0):
                raise RobotError("the twin did not come back after a reset")

    def judge(self) -> None:
        """From now on the twin looks whether the task is done."""
        self._tell({"type": "judge"})

    def inject(self, **faults: Any) -> None:
        """Change what is wrong with the twin; what is not named is well again."""
        self._tell({"type": "faults", "faults": faults})

    def release(self) -> None:
        """Take a fault back, as on a robot's pendant."""
        self._tell({"type": "release"})

    @property
    def status(self) -> dict[str, Any]:
        """Seed, instruction, success, failure and elapsed time [s] of the episode."""
        with self._lock:
            return dict(self._state["status"]) if self._state else {}

    def journal(self) -> dict[str, list[np.ndarray]]:
        """What the twin was told and what it did: ``commands`` (arrival, sent, number, position, refused) and
        ``readings`` (time, position, velocity, at fault)."""
        found = self.ask({"type": "journal"}, "journal")
        return {key: found[key] for key in ("commands", "readings")}

    def ask(self, message: dict[str, Any], reply: str) -> dict[str, Any]:
        """Tell the twin something and wait for its reply."""
        with self._lock:
            self._replies.pop(reply, None)
        self._tell(message)
        with self._news:
            if not self._news.wait_for(lambda: self._lost or reply in self._replies, timeout=10.0) or self._lost:
                raise RobotError(f"the twin does not answer {reply!r}: {self._lost or 'nothing for 10 s'}")
            return self._replies.pop(reply)

    @property
    def process_id(self) -> int | None:
        """Of a twin that was started here."""
        return None if self._process is None else self._process.pid

    def _tell(self, message: dict[str, Any]) -> None:
        connection = self._connection
        if connection is None or self._lost:
            raise RobotError(f"the connection to the twin is lost: {self._lost or 'not connected'}")
        try:
            with self._sending:
                connection.send_bytes(encode(message))
        except (OSError, ValueError) as error:
            raise RobotError(f"the connection to the twin is lost: {error}") from error

    def _listen(self, connection: Any) -> None:
        while True:
            try:
                message = decode(connection.recv_bytes())
            except WireError:
                continue
            except (OSError, EOFError) as error:
                with self._news:
                    if self._connection is connection:
                        self._lost = str(error) or "it hung up"
                        self._news.notify_all()
                return
            with self._news:
                kind = message["type"]
                if kind not in ("state", "frame"):
                    self._replies[kind] = message
                else:
                    source = kind if kind == "state" else message["camera"]
                    number = (message["epoch"], message["number"])
                    if number < self._numbers.get(source, (0, -1)):
                        continue  # what comes late is no news
                    self._numbers[source] = number
                    if kind == "state":
                        self._state = message
                    else:
                        self._frames[source] = Frame(image=message["image"], timestamp=message["time"])
                self._news.notify_all()


def twin_spec(
    body: SimEmbodiment,
    motion: Sequence[float | Sequence[float]],
    gripper: Sequence[float],
    watchdog_s: float,
    camera_hz: float,
) -> RobotSpec:
    """The spec of a simulated arm."""
    model = body.robot.spec().compile()
    joints = body.robot.joints
    limits = np.array([model.joint(name).range for name in joints])
    velocity, acceleration, jerk = (
        (*np.broadcast_to(np.asarray(given, float), (len(joints),)).tolist(), own)
        for given, own in zip(motion, gripper)
    )
    return RobotSpec(
        name=body.robot.name,
        axes=FeatureSpec(
            name="axes",
            shape=(len(joints) + 1,),
            names=(*joints, "gripper"),
            units=("rad",) * len(joints) + ("1",),
            low=(*limits[:, 0], 0.0),
            high=(*limits[:, 1], 1.0),
            gripper="open_is_1",
        ),
        velocity=velocity,
        acceleration=acceleration,
        jerk=jerk,
        command_hz=250.0,
        state_hz=STATE_HZ,
        cameras=body.spec.cameras,
        camera_hz=camera_hz,
        watchdog_s=watchdog_s,
    )
