"""A simulated robot in real time, in a process of its own: what the driver `mujoco_twin` connects to.

It behaves as a robot does: it streams readings and frames at its own rates, takes position targets, holds and reports a
fault when its watchdog hears nothing, and goes on whatever becomes of who controls it. Faults can be injected while it
runs. It also keeps a journal of what it was told and what it did, as evidence that does not come from the controller.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import Any

import mujoco
import numpy as np

from ..envs.tabletop import TabletopEnv
from ..errors import RobotError, WireError
from ..policies.wire import decode, encode

KEY_VARIABLE = "BRACHIUM_TWIN_KEY"
STATE_HZ = 125.0
BACKLOG = 64
"""Messages that may wait to be sent; older ones are dropped."""
JOURNAL = 200_000
STRANGERS, PATIENCE_S = 16, 5.0
"""How many may be about to prove that they know the key, and for how long each [s]."""


@dataclass(kw_only=True)
class Faults:
    """What is wrong with the twin; all of it can change while it runs.

    Attributes:
        latency_s: Everything it says comes so much later [s].
        jitter_s: And up to so much more, evenly distributed [s].
        drop: Share of the camera frames that are lost.
        frozen: Cameras that go on sending the picture they show now, with new timestamps.
        stalled: Cameras that send nothing.
        not_finite: Readings are NaN.
        clock_s: Its timestamps are off by so much [s].
        deaf: Commands are lost.
        mute: It says nothing, and the connection stays open.
        blocked: It does not follow its commands.
        fault: It reports this and holds.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    drop: float = 0.0
    frozen: tuple[str, ...] = ()
    stalled: tuple[str, ...] = ()
    not_finite: bool = False
    clock_s: float = 0.0
    deaf: bool = False
    mute: bool = False
    blocked: bool = False
    fault: str = ""

    def __post_init__(self) -> None:
        self.frozen, self.stalled = tuple(self.frozen), tuple(self.stalled)
        if min(self.latency_s, self.jitter_s) < 0 or not 0.0 <= self.drop <= 1.0:
            raise RobotError("twin faults: expected latency_s and jitter_s of at least 0 and drop from 0 to 1")

    @classmethod
    def names(cls) -> set[str]:
        """What can be wrong."""
        return {f.name for f in fields(cls)}


class Twin:
    """The simulated robot.

    Args:
        env: Makes the table-top environment whose robot this is.
        address: Where to listen: (host, port) or the path of a Unix socket.
        key: What a client must know.
        watchdog_s: Hold when no command came for so long [s].
        camera_hz: Rate of frames [Hz].
        faults: What is wrong from the start.
        seed: Of the faults' draws.
    """

    def __init__(
        self,
        env: Callable[..., TabletopEnv],
        address: Any,
        *,
        key: bytes,
        watchdog_s: float = 0.15,
        camera_hz: float = 31.25,
        faults: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.env = env()
        self.faults = Faults(**dict(faults or {}))
        self._watchdog_s, self._every = watchdog_s, max(1, round(STATE_HZ / camera_hz))
        self._rng = np.random.default_rng(seed)
        self._listener, self._key = Listener(address), key
        self._strangers = threading.BoundedSemaphore(STRANGERS)
        self._incoming: collections.deque[tuple[Connection, dict[str, Any]]] = collections.deque()
        self._outbox: list[tuple[float, int, bytes]] = []
        self._answers: collections.deque[bytes] = collections.deque()
        self._numbers = itertools.count()
        self._wake = threading.Condition()
        self._client: Connection | None = None
        self._ended = threading.Event()
        self.journal: dict[str, collections.deque[Any]] = {
            "commands": collections.deque(maxlen=JOURNAL),
            "readings": collections.deque(maxlen=JOURNAL),
        }
        self._pictures: dict[str, np.ndarray] = {}
        self._epoch, self._spoken = 0, itertools.count()
        self._reset(0, None)

    @property
    def address(self) -> Any:
        """Where it listens: (host, port), or a path."""
        return self._listener.address

    # -- the world -----------------------------------------------------------------------------------------------------

    def _reset(self, seed: int, options: dict[str, Any] | None) -> None:
        observation, _ = self.env.reset(seed=seed, options=options)
        sim = self.env.sim
        self._epoch += 1
        self._seed, self._instruction = seed, str(observation["instruction"])
        self._success, self._failure, self._elapsed = False, "", 0.0
        self._substeps = max(1, round(1.0 / (STATE_HZ * sim.model.opt.timestep)))
        self._loop_s = self._substeps * sim.model.opt.timestep
        self._stroke = sim.embodiment.robot.gripper_stroke
        self._fault, self._engaged, self._heard, self._last_number = "", False, time.monotonic(), -1
        self._task_every = max(1, round(1.0 / (sim.embodiment.control_hz * self._loop_s)))
        self._task_steps, self._judging = 0, False

    def _step(self, tick: int) -> None:
        sim = self.env.sim
        if self.faults.blocked:
            sim.data.qvel[:] = 0.0
            sim.data.time += self._loop_s
        else:
            mujoco.mj_step(sim.model, sim.data, nstep=self._substeps)
        if not self._judging or self._success or self._failure:
            return
        self._elapsed += self._loop_s
        if tick % self._task_every == 0 and self.env.episode is not None:
            self._task_steps += 1
            self._success = self.env.task.success(sim, self.env.episode)
            if not self._success:
                self._failure = self.env.task.failure(sim, self.env.episode)

    def _positions(self) -> tuple[np.ndarray, np.ndarray]:
        sim = self.env.sim
        robot = sim.embodiment.robot
        names = (*robot.joints, robot.gripper_joint)
        position = np.array([sim.data.joint(name).qpos[0] for name in names])
        velocity = np.array([sim.data.joint(name).qvel[0] for name in names])
        position[-1] /= self._stroke
        velocity[-1] /= self._stroke
        return position, velocity

    # -- what it is told -----------------------------------------------------------------------------------------------

    def _hear(self, now: float) -> None:
        while self._incoming:
            client, message = self._incoming.popleft()
            kind = message.get("type")
            if kind == "command":
                self._command(message, now)
            elif kind == "halt":
                self._fault = self._fault or f"halted: {message.get('why', '')}"
            elif kind == "rest":
                self._engaged = False
            elif kind == "release":
                self._fault, self._engaged, self._last_number = "", False, -1
            elif kind == "reset":
                self._reset(int(message["seed"]), message.get("options"))
                self._say({"type": "reset", "epoch": self._epoch}, at_once=True)
            elif kind == "judge":
                self._judging = True
            elif kind == "faults":
                self.faults = Faults(**message["faults"])
            elif kind == "journal":
                self._send_journal(client)
            elif kind == "end":
                self._ended.set()
        silent = now - self._heard
        if self._engaged and not self._fault and silent > self._watchdog_s:
            self._fault = f"watchdog: no command for {silent * 1e3:.0f} ms"
        if self.faults.fault and not self._fault:
            self._fault = self.faults.fault

    def _command(self, message: dict[str, Any], now: float) -> None:
        position = np.asarray(message["position"], np.float64)
        sim = self.env.sim
        if position.shape != (len(sim.embodiment.robot.joints) + 1,) or self.faults.deaf:
            return
        number = int(message["number"])
        self.journal["commands"].append((now, float(message["time"]), number, position, bool(self._fault)))
        self._heard, self._engaged = now, True
        if self._fault or number <= self._last_number or not np.isfinite(position).all():
            return
        self._last_number = number
        sim.data.ctrl[sim._actuators] = [*position[:-1], position[-1] * self._stroke]

    def _send_journal(self, client: Connection) -> None:
        found: dict[str, Any] = {"type": "journal"}
        for name, entries in self.journal.items():
            columns: list[Any] = list(zip(*entries)) or [[]]
            found[name] = [np.array(column, np.float64) for column in columns]
        self._say(found, at_once=True)

    # -- what it says --------------------------------------------------------------------------------------------------

    def _say(self, message: dict[str, Any], *, at_once: bool = False) -> None:
        if self.faults.mute and not at_once:
            return
        message |= {"number": next(self._spoken), "epoch": self._epoch}
        late = 0.0 if at_once else self.faults.latency_s + self.faults.jitter_s * float(self._rng.random())
        with self._wake:
            if at_once:
                self._answers.append(encode(message))  # never dropped, however much is waiting
            else:
                heapq.heappush(self._outbox, (time.monotonic() + late, next(self._numbers), encode(message)))
            while len(self._outbox) > BACKLOG + 2 * STATE_HZ * late:
                heapq.heappop(self._outbox)
            self._wake.notify()

    def _report(self, now: float) -> None:
        position, velocity = self._positions()
        self.journal["readings"].append((now, position, velocity, bool(self._fault)))
        if self.faults.not_finite:
            position = np.full_like(position, np.nan)
        self._say(
            {
                "type": "state",
                "position": position,
                "velocity": velocity,
                "time": now + self.faults.clock_s,
                "fault": self._fault,
                "status": {
                    "seed": self._seed,
                    "instruction": self._instruction,
                    "success": bool(self._success),
                    "failure": self._failure,
                    "elapsed": self._elapsed,
                    "max_s": self.env.task.max_steps / self.env.embodiment.control_hz,
                },
            }
        )

    def _look(self, now: float) -> None:
        fresh = self.env.sim.images()
        for name, image in fresh.items():
            if name not in self.faults.frozen or name not in self._pictures:
                self._pictures[name] = image
            if name in self.faults.stalled or self._rng.random() < self.faults.drop:
                continue
            stamp = now + self.faults.clock_s
            self._say({"type": "frame", "camera": name, "image": self._pictures[name], "time": stamp})

    # -- threads -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Be a robot until told to end."""
        for target in (self._accept, self._send):
            threading.Thread(target=target, daemon=True).start()
        deadline = time.monotonic()
        for tick in itertools.count():
            now = time.monotonic()
            self._hear(now)
            if self._ended.is_set():
                break
            self._step(tick)
            self._report(now)
            if tick % self._every == 0:
                self._look(now)
            deadline += self._loop_s
            late = time.monotonic() - deadline
            if late > 0.05:  # simulated time slips rather than runs after real time
                deadline += late
            time.sleep(max(0.0, -late))
        with contextlib.suppress(OSError):
            self._listener.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client: Any = self._listener.accept()
            except OSError:  # one that hung up, or the end
                continue
            if self._strangers.acquire(blocking=False):
                threading.Thread(target=self._admit, args=(client,), daemon=True).start()
            else:
                hang_up(client)

    def _admit(self, client: Connection) -> None:
        """Take who knows the key as the robot's one controller; who says nothing keeps nobody else out."""
        patience = threading.Timer(PATIENCE_S, hang_up, (client,))
        patience.start()
        try:
            deliver_challenge(client, self._key)
            answer_challenge(client, self._key)
        except Exception:  # a wrong key, none, or no connection any more
            hang_up(client)
            return
        finally:
            patience.cancel()
            self._strangers.release()
        with self._wake:
            before, self._client = self._client, client
            self._outbox.clear()
            self._answers.clear()
        if before is not None:
            hang_up(before)
        self._listen(client)

    def _listen(self, client: Connection) -> None:
        while True:
            try:
                message = decode(client.recv_bytes(2**20))
            except WireError:
                continue
            except (OSError, EOFError):
                return
            if isinstance(message, dict):
                self._incoming.append((client, message))

    def _send(self) -> None:
        while not self._ended.is_set():
            with self._wake:
                while not (self._outbox or self._answers) or self._client is None:
                    self._wake.wait(0.2)
                    if self._ended.is_set():
                        return
                client = self._client
                if self._answers:
                    data = self._answers.popleft()
                else:
                    wait = self._outbox[0][0] - time.monotonic()
                    if wait > 0:
                        self._wake.wait(wait)
                        continue
                    data = heapq.heappop(self._outbox)[2]
            try:
                client.send_bytes(data)
            except (OSError, ValueError):
                with self._wake:
                    if self._client is client:
                        self._client = None


def run_twin(
    env: Callable[..., TabletopEnv], address: Any, key: bytes, parent: int | None, options: dict[str, Any]
) -> None:
    """Entry of the twin's process; ends with `parent` where there is one."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who controls it
    twin = Twin(env, address, key=key, **options)

    def follow_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        twin._ended.set()

    if parent is not None:
        threading.Thread(target=follow_parent, daemon=True).start()
    twin.run()


def hang_up(connection: Connection) -> None:
    """End a connection that other threads may be using: they hear the end, and the last to let go of it closes it.

    If it were closed here, the next connection could get its number while such a thread still reads by that number, and
    takes what is not meant for it.
    """
    with (
        contextlib.suppress(OSError, ValueError),
        socket.socket(fileno=os.dup(connection.fileno())) as same,
    ):
        same.shutdown(socket.SHUT_RDWR)


def connect(address: Any, key: bytes, patience_s: float) -> Connection:
    """A connection to a twin.

    Raises:
        RobotError: There is none.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            return Client(address, authkey=key)
        except (OSError, EOFError) as error:
            if time.monotonic() > until:
                raise RobotError(f"no twin at {address}: {error}. Type: brachium twin env=tabletop/reach") from error
            time.sleep(0.05)
        except Exception as error:  # multiprocessing's AuthenticationError
            raise RobotError(f"the twin at {address} refuses: {error}") from error
