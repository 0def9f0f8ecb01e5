"""The control loop's clock: our controller beside LeRobot's own record loop, while inference saturates the other core.

    python benchmarks/control_loop.py --seconds 600

The robot is the mock, which costs nothing; the policy server runs in a process of its own, whose model works all the
time. Each loop gives the times at which it sent its commands. Writes ``benchmarks/results/control_loop.json`` and a
picture beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brachium.console import log
from brachium.policies.access import Access
from brachium.policies.executor import RecedingHorizon
from brachium.policies.remote import RemotePolicy
from brachium.policies.server import PolicyServer, run
from brachium.real_robot.body import JointBody, own_embodiment
from brachium.real_robot.controller import Controller
from brachium.real_robot.drivers.mock import MockRobot
from brachium.real_robot.inference import Inference
from brachium.real_robot.pacing import Timing
from brachium.real_robot.safety.guard import SafetyGuard
from brachium.spec import ActionChunk, EmbodimentSpec, Guidance, Observation

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HORIZON = 16


class Busy:
    """A policy whose model takes a core for `seconds` an answer."""

    noise_dim, takes_guidance, action_horizon = 1, False, HORIZON

    def __init__(self, spec: EmbodimentSpec, seconds: float) -> None:
        self.embodiment, self._seconds = spec, seconds
        self._matrix = np.random.default_rng(0).standard_normal((300, 300))

    def predict(
        self,
        observations: Sequence[Observation],
        noise: np.ndarray,
        guidance: Sequence[Guidance | None] | None = None,
    ) -> ActionChunk:
        """A slow wave."""
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            self._matrix @ self._matrix
        t = observations[0].timestamp + np.arange(HORIZON)[:, None] / self.embodiment.control_hz
        wave = 0.5 * np.sin(0.5 * t + np.arange(self.embodiment.action.dim))
        wave[:, -1] = 1.0
        return ActionChunk(actions=wave[None].astype(np.float32), control_hz=self.embodiment.control_hz)


def run_server(where: Any, spec: dict[str, Any]) -> None:
    """A policy server that is never idle: its client asks again as soon as it is answered."""
    os.environ["OMP_NUM_THREADS"] = "1"
    policy = Busy(EmbodimentSpec.from_dict(spec), 0.08)
    run(PolicyServer(policy, identity={}, access=Access(port=0, rate_hz=1e9)).serve(where.put))


def run_client(address: str) -> None:
    """Keeps the server's model at work while no controller of ours does."""
    with contextlib.closing(RemotePolicy(address)) as remote:
        rng = np.random.default_rng(0)
        while True:
            remote.predict([Observation.fake(remote.embodiment, rng)], np.zeros((1, HORIZON, 1), np.float32))


@contextlib.contextmanager
def process(target: Any, *words: Any) -> Iterator[None]:
    """A process while the block runs."""
    made = multiprocessing.get_context("spawn").Process(target=target, args=words, daemon=True)
    made.start()
    try:
        yield
    finally:
        made.kill()
        made.join()


def ours(address: str, hz: float, seconds: float, realtime: bool) -> tuple[np.ndarray, int]:
    """Times of the commands [s] of a run of our controller, and how many ticks were skipped."""
    robot = MockRobot()
    spec = own_embodiment(robot, 10.0)
    with robot, contextlib.closing(RemotePolicy(address)) as remote, contextlib.closing(Inference(remote)) as inference:
        controller = Controller(
            robot,
            JointBody(spec, robot.spec),
            inference,
            RecedingHorizon(remote, execute_horizon=1),
            SafetyGuard(robot.spec, 1 / hz),
            timing=Timing(control_hz=hz, silent_s=5.0, realtime=realtime),
        )
        outcome = controller.run("go", seconds=seconds)
        if outcome.ending != "time":
            raise SystemExit(f"the run was stopped: {outcome.why}")
        return np.array(controller.telemetry.ticks["start"]), controller.telemetry.skipped


def lerobots(hz: float, seconds: float) -> np.ndarray:
    """Times of the commands [s] of LeRobot's own `record_loop`, moved by a leader that costs nothing."""
    from lerobot.processor import make_default_processors
    from lerobot.scripts.lerobot_record import record_loop
    from lerobot.teleoperators import Teleoperator

    sent: list[float] = []
    keys = ("a.pos", "b.pos", "c.pos")

    class Leader(Teleoperator):
        name, config_class = "leader", None

        def __init__(self) -> None:
            pass

        def __del__(self) -> None:
            pass

        action_features = property(lambda self: dict.fromkeys(keys, float))
        feedback_features = property(lambda self: {})
        is_connected = property(lambda self: True)
        is_calibrated = property(lambda self: True)

        def connect(self, calibrate: bool = True) -> None: ...
        def calibrate(self) -> None: ...
        def configure(self) -> None: ...
        def send_feedback(self, feedback: dict[str, Any]) -> None: ...
        def disconnect(self) -> None: ...
        def get_action(self) -> dict[str, float]:
            return dict.fromkeys(keys, 0.0)

    class Follower:
        name = "follower"

        def get_observation(self) -> dict[str, float]:
            return dict.fromkeys(keys, 0.0)

        def send_action(self, action: Any) -> Any:
            sent.append(time.monotonic())
            return action

    teleop, robot, seen = make_default_processors()
    record_loop(
        robot=Follower(),
        events={"exit_early": False},
        fps=hz,
        teleop_action_processor=teleop,
        robot_action_processor=robot,
        robot_observation_processor=seen,
        teleop=Leader(),
        control_time_s=seconds,
    )
    return np.array(sent)


def figures(times: np.ndarray, hz: float) -> dict[str, Any]:
    """What the times of commands say; the first second is left out."""
    times = times[times > times[0] + 1.0]
    periods = np.diff(times) * 1e3
    error = np.abs(periods - 1e3 / hz)
    moments = times - times[0]
    grid = np.round(moments * hz)
    span = float(moments[-1])
    return {
        "hz": hz,
        "seconds": round(span, 1),
        "commands": len(times),
        "rate_hz": round(len(periods) / span, 4),
        "period_error_ms": {f"p{q:g}": round(float(np.percentile(error, q)), 4) for q in (50, 99, 99.9)}
        | {"max": round(float(error.max()), 3)},
        "off_the_grid_ms": {
            "p99": round(float(np.percentile(np.abs(moments - grid / hz) * 1e3, 99)), 4),
            "last": round(float((moments[-1] - grid[-1] / hz) * 1e3), 4),
        },
        # how much later the last command came than that of a perfect clock that sends as many
        "drift_ms": round((span - len(periods) / hz) * 1e3, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="of our loop at 50 Hz")
    parser.add_argument("--short", type=float, default=60.0, help="of the others")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, one saturated by inference", "loops": {}}
    where: Any = multiprocessing.get_context("spawn").Queue()
    with process(run_server, where, own_embodiment(MockRobot(), 10.0).to_dict()):
        address = where.get(timeout=60)
        plans = [
            ("LeRobot's record_loop, 50 Hz", None, 50.0, options.short),
            ("ours, 50 Hz", True, 50.0, options.seconds),
            ("ours without real-time priority, 50 Hz", False, 50.0, options.short),
            ("LeRobot's record_loop, 50 Hz, again", None, 50.0, options.short),
            ("LeRobot's record_loop, 200 Hz", None, 200.0, options.short),
            ("ours, 200 Hz", True, 200.0, options.short),
        ]
        for name, realtime, hz, seconds in plans:
            skipped = 0
            if realtime is None:
                with process(run_client, address):
                    time.sleep(3.0)
                    times = lerobots(hz, seconds)
            else:
                times, skipped = ours(address, hz, seconds, realtime)
            results["loops"][name] = {**figures(times, hz), "skipped": skipped}
            log(f"{name}: {json.dumps(results['loops'][name])}")
    (RESULTS / "control_loop.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
