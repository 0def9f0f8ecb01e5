"""What is looked at before a robot may move."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ..console import table
from ..errors import BrachiumError, RobotError
from ..policies.base import ChunkPolicy
from .body import Body
from .eyes import Eyes, Freshness
from .robot import Robot
from .safety.guard import SafetyGuard

OK, WARN, FAIL = "ok", "warn", "FAIL"
PROBES = 8


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the preflight: what, how it went (`OK`, `WARN` or `FAIL`), and what was found."""

    what: str
    verdict: str
    found: str


def preflight(
    robot: Robot,
    body: Body,
    policy: ChunkPolicy | None,
    guard: SafetyGuard,
    *,
    control_hz: float,
    delay_s: float = 0.0,
    freshness: Freshness | None = None,
    instruction: str = "",
    seconds: float = 1.0,
) -> list[Check]:
    """Look at a connected robot for `seconds`, and at the policy's answers; nothing moves.

    Returns:
        Every check, in order; the run may start when none failed.
    """
    checks = [_limits(guard), *_watching(robot, guard)]
    eyes, seen = Eyes(body, freshness), _Cameras()
    begin = time.monotonic()
    ages, stamps = [], set()
    while time.monotonic() - begin < seconds:
        try:
            reading = robot.read()
        except RobotError as error:
            return [*checks, Check(what="readings", verdict=FAIL, found=str(error))]
        eyes.look(reading)
        seen.look(reading.frames)
        ages.append(time.monotonic() - reading.timestamp)
        stamps.add(reading.timestamp)
        time.sleep(0.002)
    rate, oldest = len(stamps) / seconds, max(ages)
    fresh = min(ages) >= -0.05 and oldest <= guard.rules.reading_age_s
    checks.append(
        Check(what="readings", verdict=OK if fresh else FAIL, found=f"{rate:.0f} Hz, at most {oldest * 1e3:.0f} ms old")
    )
    checks += [seen.check(name, robot.spec.camera_hz) for name in body.embodiment.camera_names]
    if problem := eyes.problem(time.monotonic()):
        checks.append(Check(what="observation", verdict=FAIL, found=problem))
    try:
        guard.start(robot.read(), time.monotonic())
        checks.append(Check(what="position", verdict=OK, found="inside all limits and zones, at rest"))
    except BrachiumError as error:
        checks.append(Check(what="position", verdict=FAIL, found=str(error)))
    if policy is not None and all(check.verdict != FAIL for check in checks):
        checks.append(_latency(robot, eyes, policy, delay_s, instruction))
    return checks


def _limits(guard: SafetyGuard) -> Check:
    limits, names = guard.limits, guard.spec.axes.names
    fastest = ", ".join(f"{name} {value:.2g}" for name, value in zip(names, limits.velocity))
    return Check(what="limits", verdict=OK, found=f"position, velocity, acceleration, jerk; velocity {fastest}")


def _watching(robot: Robot, guard: SafetyGuard) -> list[Check]:
    watchdog = robot.spec.watchdog_s
    zones = guard.check is not None
    return [
        Check(
            what="watchdog",
            verdict=OK if watchdog else WARN,
            found=f"the robot stops by itself after {watchdog * 1e3:.0f} ms" if watchdog else "the robot has none",
        ),
        Check(
            what="zones",
            verdict=OK if zones else WARN,
            found="table, itself, workspace and keep-out zones are checked on a model"
            if zones
            else "no model of this robot: it is not checked against the table, zones or itself",
        ),
    ]


class _Cameras:
    """What was seen of every camera."""

    def __init__(self) -> None:
        self._stamps: dict[str, list[float]] = {}
        self._bright: dict[str, float] = {}
        self._pictures: dict[str, set[int]] = {}

    def look(self, frames: object) -> None:
        for name, frame in dict(frames).items():  # type: ignore[call-overload]
            stamps = self._stamps.setdefault(name, [])
            if not stamps or frame.timestamp != stamps[-1]:
                stamps.append(frame.timestamp)
                self._bright[name] = float(frame.image.std())
                self._pictures.setdefault(name, set()).add(hash(frame.image.tobytes()))

    def check(self, name: str, camera_hz: float) -> Check:
        stamps = self._stamps.get(name, [])
        if len(stamps) < 2:
            return Check(what=f"camera {name}", verdict=FAIL, found="no new frame comes: unplugged, or stuck")
        rate = (len(stamps) - 1) / max(stamps[-1] - stamps[0], 1e-9)
        found, verdict = f"{rate:.0f} Hz", OK
        if rate < 0.5 * camera_hz:
            found, verdict = f"{rate:.0f} Hz of {camera_hz:.0f} Hz", WARN
        if self._bright[name] < 1.0:
            return Check(what=f"camera {name}", verdict=FAIL, found="its picture is one colour: covered, or dark")
        if len(self._pictures[name]) == 1 and len(stamps) > 5:
            found += ", always the same picture: fine in simulation, frozen on a real camera"
        return Check(what=f"camera {name}", verdict=verdict, found=found)


def _latency(robot: Robot, eyes: Eyes, policy: ChunkPolicy, delay_s: float, instruction: str) -> Check:
    """Ask for a few chunks and hold the time against what a chunk covers."""
    rng, spent = np.random.default_rng(0), []
    spec = policy.embodiment
    for _ in range(PROBES):
        eyes.look(robot.read())
        observation = eyes.observe(instruction)
        noise = rng.standard_normal((1, policy.action_horizon, policy.noise_dim), np.float32)
        begin = time.monotonic()
        try:
            policy.predict([observation], noise)
        except BrachiumError as error:
            return Check(what="policy", verdict=FAIL, found=str(error))
        spent.append(time.monotonic() - observation.timestamp)
        time.sleep(0.02)
    del begin
    typical, worst = float(np.median(spent)) + delay_s, max(spent) + delay_s
    step = 1.0 / spec.control_hz
    budget = (policy.action_horizon - 1) * step
    found = (
        f"an action is {typical * 1e3:.0f} ms old (at most {worst * 1e3:.0f}) when its chunk arrives, "
        f"{typical / step:.1f} steps of {spec.control_hz:g} Hz; chunks of {policy.action_horizon} allow "
        f"{budget * 1e3:.0f} ms"
    )
    return Check(what="policy", verdict=OK if worst < 0.7 * budget else WARN if worst < budget else FAIL, found=found)


def show(checks: list[Check]) -> None:
    """Print the checks; raise RobotError where one failed."""
    table("preflight", ["check", "", "found"], [(c.what, c.verdict, c.found) for c in checks])
    failed = [c for c in checks if c.verdict == FAIL]
    if failed:
        lines = "\n".join(f"  {c.what}: {c.found}" for c in failed)
        raise RobotError(f"the robot was not touched: the preflight failed:\n{lines}")
