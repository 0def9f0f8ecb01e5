"""Everything that can break between a policy and a robot, injected many times; was a limit ever exceeded?

    python benchmarks/faults.py --times 50

The policy server, a proxy that does to its messages what networks do, and the simulated robot run in processes of their
own. The verdict is the robot's: its journal of the commands it received and of where it was. Writes
``benchmarks/results/faults.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("MUJOCO_GL", "egl")

import numpy as np
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

from brachium.cli.compose import load
from brachium.console import progress
from brachium.errors import RobotError
from brachium.policies.access import Access
from brachium.policies.executor import RecedingHorizon
from brachium.policies.remote import RemotePolicy
from brachium.policies.server import PolicyServer, run
from brachium.real_robot.body import ArmBody
from brachium.real_robot.controller import Controller, Outcome
from brachium.real_robot.drivers.mujoco_twin import MujocoTwin
from brachium.real_robot.eyes import Freshness
from brachium.real_robot.inference import Inference
from brachium.real_robot.pacing import Timing
from brachium.real_robot.run_log import RunLog
from brachium.real_robot.safety.guard import SafetyGuard
from brachium.real_robot.safety.zones import ModelCheck
from brachium.real_robot.twin import KEY_VARIABLE
from brachium.spec import ActionChunk, EmbodimentSpec, Guidance, Observation

ROOT = Path(__file__).resolve().parent.parent
HZ, HOLD_S, HORIZON = 50.0, 0.3, 8
LOW, HIGH = 0.3, 0.7
"""When a fault begins, after the first motion [s]."""
MODES = ("well", "delayed", "duplicated", "reordered", "truncated", "cut", "half-open")


class Circle:
    """Small steps round a circle; what the instruction says is wrong with them."""

    noise_dim, takes_guidance, action_horizon = 7, True, HORIZON

    def __init__(self, spec: EmbodimentSpec) -> None:
        self.embodiment = spec

    def predict(
        self,
        observations: Sequence[Observation],
        noise: np.ndarray,
        guidance: Sequence[Guidance | None] | None = None,
    ) -> ActionChunk:
        """Chunks (n, h, a)."""
        time.sleep(0.01)
        chunks = []
        for one in observations:
            t = one.timestamp + np.arange(HORIZON) / self.embodiment.control_hz
            rows = np.zeros((HORIZON, 7), np.float32)
            rows[:, 0], rows[:, 1], rows[:, 6] = 0.03 * np.cos(4 * t), 0.03 * np.sin(4 * t), 1.0
            if one.instruction == "nan":
                rows[3:] = np.nan
            elif one.instruction == "huge":
                rows[:, :6] *= 1e9
            elif one.instruction == "wrong shape":
                rows = rows[:, :5]
            chunks.append(rows)
        return ActionChunk(actions=np.stack(chunks), control_hz=self.embodiment.control_hz)


def run_server(where: Any, spec: dict[str, Any], queue: int) -> None:
    """The policy server."""
    policy = Circle(EmbodimentSpec.from_dict(spec))
    server = PolicyServer(
        policy, identity={"name": "circle"}, access=Access(port=0, rate_hz=1e9, clients=1000), queue=queue
    )
    server.warm_up = lambda runs=2: 0.0  # type: ignore[method-assign]
    run(server.serve(where.put))


def run_proxy(where: Any, target: str, mode: Any) -> None:
    """Between client and server: passes messages on, and does to the server's what `mode` says."""

    async def pump(source: Any, sink: Any, back: bool) -> None:
        kept: Any = None
        async for message in source:
            now = MODES[mode.value] if back else ("half-open" if MODES[mode.value] == "half-open" else "well")
            if now == "cut":
                source.transport.abort()
                sink.transport.abort()
                return
            if now == "half-open":
                await asyncio.sleep(3600)
            if now == "delayed":
                await asyncio.sleep(0.25)
            if now == "reordered" and kept is None:
                kept = message
                continue
            await sink.send(message[: len(message) // 2] if now == "truncated" else message)
            if now == "duplicated":
                await sink.send(message)
            if kept is not None:
                await sink.send(kept)
                kept = None

    async def client(inner: Any) -> None:
        with contextlib.suppress(ConnectionClosed, OSError):
            async with connect(target, compression=None, max_size=None) as outer:
                ways = [asyncio.create_task(pump(inner, outer, False)), asyncio.create_task(pump(outer, inner, True))]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()

    async def main() -> None:
        async with serve(client, "127.0.0.1", 0, compression=None, max_size=None) as server:
            where.put(f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}")
            await server.serve_forever()

    asyncio.run(main())


def run_flood(target: str, stop: Any) -> None:
    """Clients that ask as fast as they can, with messages that are mostly wrong."""

    async def one(number: int) -> None:
        rng = np.random.default_rng(number)
        while not stop.is_set():
            with contextlib.suppress(ConnectionClosed, OSError):
                async with connect(target, compression=None, max_size=None) as connection:
                    await connection.recv()
                    while not stop.is_set():
                        await connection.send(rng.bytes(20_000))

    async def main() -> None:
        await asyncio.gather(*(one(k) for k in range(8)))

    asyncio.run(main())


class Processes:
    """Starts processes that tell an address, and ends them."""

    def __init__(self) -> None:
        self._context: Any = multiprocessing.get_context("spawn")
        self.value = self._context.Value("i", 0)
        # Without a lock: whoever sets it is killed at once, and would take the lock into its grave.
        self.ready: Any = self._context.RawValue("b", 0)
        self._all: list[Any] = []

    def start(self, target: Callable[..., None], *words: Any, tells: bool = True) -> tuple[str, Any]:
        """The address that it tells, and the process."""
        where = self._context.Queue()
        arguments = (where, *words) if tells else words
        process = self._context.Process(target=target, args=arguments, daemon=True)
        process.start()
        self._all.append(process)
        return (where.get(timeout=60) if tells else ""), process

    def close(self) -> None:
        """End all."""
        for process in self._all:
            process.kill()


class Rig:
    """The robot, and what a run needs."""

    def __init__(self, address: str, processes: Processes) -> None:
        self.processes = processes
        self.robot = MujocoTwin(env=load("env/tabletop/reach"), address=address)
        self.robot.connect()
        self.body = ArmBody(self.robot.body)
        self.spec = self.body.embodiment
        self.address, self.server = processes.start(run_server, self.spec.to_dict(), 64)
        self.proxy, _ = processes.start(run_proxy, self.address, processes.value)

    def run(
        self,
        address: str,
        inject: Callable[[Controller], None],
        at: float,
        *,
        log: RunLog | None = None,
        seconds: float = 2.0,
    ) -> Outcome:
        """Some seconds of the circle; the fault comes after `at` seconds."""
        self.processes.value.value = 0
        robot = self.robot
        robot.inject()
        robot.release()
        robot.reset(3)
        remote = RemotePolicy(address, timeout_s=0.5)
        inference = Inference(remote)
        guard = SafetyGuard(robot.spec, 1 / HZ, check=ModelCheck(robot.model))
        controller = Controller(
            robot,
            self.body,
            inference,
            RecedingHorizon(remote, execute_horizon=2),
            guard,
            timing=Timing(control_hz=HZ, hold_s=HOLD_S),
            freshness=Freshness(frozen_s=0.3),
            listener=log,
        )
        began: list[float] = []

        def done() -> str:
            if controller.telemetry.ticks["source"][-1] and not began:
                began.append(time.monotonic())
            if len(began) == 1 and time.monotonic() - began[0] > at:
                began.append(0.0)
                inject(controller)
            return ""

        try:
            return controller.run("go", seconds=seconds, done=done)
        finally:
            inference.close()
            remote.close()


def violations(robot: MujocoTwin, begin: float) -> list[str]:
    """What the robot's own journal says was exceeded since `begin`, and whether it came to rest."""
    journal = robot.journal()
    found, limits = [], robot.spec.limits
    received = journal["commands"]
    mine = received[1] >= begin if len(received) > 1 else np.zeros(0, bool)
    if mine.any():
        path, sent = received[3][mine], received[1][mine]
        if (path < limits.low - 1e-9).any() or (path > limits.high + 1e-9).any():
            found.append("position")
        ticks = np.maximum(1, np.round(np.diff(sent) * HZ))[:, None] / HZ
        if (np.abs(np.diff(path, axis=0)) > limits.velocity * ticks * 1.001).any():
            found.append("velocity")
        even = (np.abs(ticks[1:, 0] * HZ - 1) < 1e-6) & (np.abs(ticks[:-1, 0] * HZ - 1) < 1e-6)
        second = np.abs(np.diff(path, 2, axis=0))[even] * HZ**2
        if (second > limits.acceleration * 1.01).any():
            found.append("acceleration")
    moments, where, speed = (np.array(journal["readings"][k]) for k in (0, 1, 2))
    since = moments >= begin
    arm = slice(0, -1)
    if (where[since][:, arm] < limits.low[arm] - 0.02).any() or (where[since][:, arm] > limits.high[arm] + 0.02).any():
        found.append("measured position")
    last = speed[since][-5:, arm]
    if len(last) and np.abs(last).max() > 0.1:
        found.append("not at rest")
    return found


def controller_of_its_own(address: str, target: str, ready: Any) -> None:
    """A controller that will be killed."""
    rig = Rig.__new__(Rig)
    rig.robot = MujocoTwin(env=load("env/tabletop/reach"), address=address)
    rig.robot.connect()
    rig.body = ArmBody(rig.robot.body)
    rig.processes = Processes()
    rig.run(target, lambda controller: setattr(ready, "value", 1), 0.3)


def killed_controller(rig: Rig, address: str, rng: np.random.Generator) -> tuple[str, list[str]]:
    """SIGKILL in mid-motion: the robot's own watchdog stops it."""
    ready = rig.processes.ready
    ready.value = 0
    rig.robot.disconnect()
    begin = time.monotonic()
    _, process = rig.processes.start(controller_of_its_own, address, rig.address, ready, tells=False)
    until = time.monotonic() + 60.0
    while not ready.value:
        if time.monotonic() > until:
            raise RuntimeError("the controller did not start")
        time.sleep(0.005)
    time.sleep(float(rng.uniform(0.0, 0.3)))
    process.kill()
    process.join()
    time.sleep(0.6)
    rig.robot._connection = None
    rig.robot.__dict__.pop("_sent", None)
    watched = MujocoTwin(env=load("env/tabletop/reach"), address=address)
    _keep_fault(watched)
    fault = watched.read().fault
    found = violations(watched, begin)
    watched.disconnect()
    rig.robot.connect()
    return ("watchdog" if "watchdog" in fault else fault or "no fault"), found


def _keep_fault(robot: MujocoTwin) -> None:
    """Connect without taking the fault back: somebody looks, nobody moves."""
    tell = robot._tell
    robot._tell = lambda message: None if message["type"] == "release" else tell(message)  # type: ignore[method-assign]
    robot.connect()


Injection = Callable[[Controller], None]


def faults(rig: Rig) -> dict[str, tuple[Callable[[], Injection], set[str]]]:
    """Name -> (what makes an injection, how a run may end)."""

    def proxy(mode: str) -> Callable[[], Injection]:
        def set_mode(controller: Controller) -> None:
            rig.processes.value.value = MODES.index(mode)

        return lambda: set_mode

    def says(word: str) -> Callable[[], Injection]:
        return lambda: lambda controller: setattr(controller, "instruction", word)

    def robot(**options: Any) -> Callable[[], Injection]:
        return lambda: lambda controller: rig.robot.inject(**options)

    def kill_server() -> Injection:
        return lambda controller: rig.server.kill()

    starved, either = {"starved"}, {"starved", "time"}
    return {
        "server killed": (kill_server, starved),
        "connection cut": (proxy("cut"), either),  # the client connects again
        "connection half-open": (proxy("half-open"), starved),
        "messages delayed": (proxy("delayed"), either),
        "messages duplicated": (proxy("duplicated"), {"time"}),
        "messages reordered": (proxy("reordered"), either),
        "messages truncated": (proxy("truncated"), starved),
        "NaN actions": (says("nan"), starved),
        "huge actions": (says("huge"), {"time"}),
        "actions of a wrong shape": (says("wrong shape"), starved),
        "frozen camera": (robot(frozen=["wrist"]), starved),
        "clock stepped forward": (robot(clock_s=5.0), {"robot"}),
        "clock stepped back": (robot(clock_s=-5.0), {"robot"}),
        "readings not finite": (robot(not_finite=True), {"robot"}),
        "robot says nothing": (robot(mute=True), {"robot"}),
        "robot hears nothing": (robot(deaf=True), {"robot"}),
        # Held up where it is, its cameras may be taken for frozen first: the same stop by another reason.
        "robot blocked": (robot(blocked=True), {"robot", "time", "starved"}),
        "robot reports a fault": (robot(fault="joint 3 overheated"), {"robot"}),
    }


def measure(rig: Rig, address: str, times: int, only: Sequence[str]) -> dict[str, Any]:
    """Every fault `times` times."""
    rng, rows = np.random.default_rng(0), {}
    table = faults(rig)
    names = [*table, "slow disk", "client flood", "full queue", "controller killed"]
    chosen = [name for name in names if not only or name in only]
    with progress("injecting", total=len(chosen) * times, unit="faults") as bar:
        for name in chosen:
            endings, wrong, why = Counter[str](), Counter[str](), Counter[str]()
            for _ in range(times):
                if name == "controller killed":
                    ending, found = killed_controller(rig, address, rng)
                    allowed = {"watchdog"}
                else:
                    ending, found, allowed, said = one(rig, table, name, float(rng.uniform(LOW, HIGH)))
                    why[said[:60]] += 1
                endings[ending] += 1
                wrong.update(found)
                wrong["wrong ending"] += ending not in allowed
                bar.update()
            wrong = Counter({kind: count for kind, count in wrong.items() if count})
            rows[name] = {
                "times": times,
                "endings": dict(endings),
                "violations": dict(wrong),
                "why": dict(why.most_common(2)),
            }
            print(name, json.dumps(rows[name]), flush=True)
    return rows


def one(rig: Rig, table: Any, name: str, at: float) -> tuple[str, list[str], set[str], str]:
    """One injection: how the run ended, what was violated, how it may end, and why it ended."""
    with contextlib.ExitStack() as stack:
        address, log, allowed = rig.proxy, None, {"time"}
        inject: Injection = lambda controller: None  # noqa: E731
        if name in table:
            make, allowed = table[name]
            inject = make()
            if name == "server killed":
                address = rig.address
        elif name == "slow disk":
            log, address = slow_log(rig, stack), rig.address
        elif name == "client flood":
            address, allowed = flooded(rig, stack, rig.address), {"time", "starved"}
        elif name == "full queue":
            where, server = rig.processes.start(run_server, rig.spec.to_dict(), 1)
            stack.callback(server.kill)
            address, allowed = flooded(rig, stack, where), {"time", "starved"}
        begin = time.monotonic()
        slow = name == "frozen camera"  # noticed after 0.3 s, then the last chunk is executed to its end
        outcome = rig.run(address, inject, at, log=log, seconds=3.0 if slow else 2.0)
        rig.robot.inject()
        time.sleep(0.5)
        found = violations(rig.robot, begin)
        if name == "slow disk" and outcome.telemetry.summary()["late_ms"]["p99"] > 5.0:
            found.append("the loop waited for the disk")
    if name == "server killed":
        rig.address, rig.server = rig.processes.start(run_server, rig.spec.to_dict(), 64)
        rig.proxy, _ = rig.processes.start(run_proxy, rig.address, rig.processes.value)
    return outcome.ending, found, allowed, outcome.why


def slow_log(rig: Rig, stack: contextlib.ExitStack) -> RunLog:
    """A log whose disk takes 0.3 s a step."""
    import tempfile

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    log = RunLog(folder / "store", rig.spec, rig.robot.spec)
    write = log._writer.step

    def slowly(*words: Any, **options: Any) -> None:
        time.sleep(0.3)
        write(*words, **options)

    log._writer.step = slowly  # type: ignore[method-assign]
    log.begin("go", {})

    def end() -> None:
        log._writer.step = write  # type: ignore[method-assign]
        log.discard()
        log.close()

    stack.callback(end)
    return log


def flooded(rig: Rig, stack: contextlib.ExitStack, address: str) -> str:
    """The address of a server that others flood."""
    stop = rig.processes._context.Event()
    _, flood = rig.processes.start(run_flood, address, stop, tells=False)
    time.sleep(1.0)

    def end() -> None:
        stop.set()
        flood.kill()

    stack.callback(end)
    return address


@contextlib.contextmanager
def twin() -> Iterator[str]:
    """A simulated robot in a process of its own, as ``brachium twin`` starts it; its address."""
    os.environ[KEY_VARIABLE] = secrets.token_hex(16)
    words = [sys.executable, "-m", "brachium", "twin", "env=tabletop/reach", "port=0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "127.0.0.1:" in line:
                yield "127.0.0.1:" + line.split("127.0.0.1:")[1].split()[0].strip(".,")
                return
        raise RobotError("the twin did not start")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    processes = Processes()
    target = ROOT / "benchmarks" / "results" / "faults.json"
    try:
        with twin() as address:
            rows = measure(Rig(address, processes), address, options.times, options.only)
    finally:
        processes.close()
    before = json.loads(target.read_text())["faults"] if target.exists() and options.only else {}
    target.write_text(json.dumps({"machine": f"{os.cpu_count()} cores", "faults": {**before, **rows}}, indent=1) + "\n")
    bad = {name: row["violations"] for name, row in rows.items() if row["violations"]}
    print("violations:", bad or "none")


if __name__ == "__main__":
    main()
