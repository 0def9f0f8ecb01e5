"""The control loop: a fixed rate on absolute deadlines, whatever inference takes."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..errors import ConfigError, RobotError
from ..policies.executor import ChunkExecutor
from ..policies.timeline import Planned, Timeline
from ..spec import Observation
from .body import Body
from .eyes import Eyes, Freshness
from .inference import Inference
from .pacing import Timing, undisturbed, wait_until
from .robot import Robot, Watch
from .safety.guard import RUNNING, STOPPED, Intervention, SafetyGuard
from .spec import Reading
from .telemetry import SOURCES, Telemetry

MODES = ("run", "shadow", "step")
HOLD, POLICY, HUMAN = range(len(SOURCES))
PATH_S = 2.0
"""How long it is remembered what was commanded [s]."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One action of the policy's rate, as it was executed: what a log keeps.

    Attributes:
        observation: The newest that was fresh.
        action: float32 (a,), in the embodiment's units.
        command: float64 (j,), the axes as commanded at its end.
        measured: float64 (j,).
        source: Who moved the robot: a number of `SOURCES`.
        time: When it ended [s].
    """

    observation: Observation
    action: np.ndarray
    command: np.ndarray
    measured: np.ndarray
    source: int
    time: float


class Listener(Protocol):
    """Who is told what happens; called from the control loop, so it must return at once."""

    def step(self, step: Step) -> None:
        """An action was executed."""


class Human(Protocol):
    """A person who may take over; called from the control loop, so it must return at once."""

    def takes_over(self) -> bool:
        """Whether the person moves the robot now."""

    def target(self, commanded: np.ndarray, period: float) -> np.ndarray:
        """Where the person wants the axes (j,), who are commanded to be at `commanded` (j,)."""


@dataclass
class Outcome:
    """How a run went.

    Attributes:
        ending: ``done``, ``time``, or the kind of stop.
        why: In words.
        seconds: From the first command [s].
        telemetry: What the loop measured.
        interventions: What the safety layer did.
    """

    ending: str
    why: str
    seconds: float
    telemetry: Telemetry
    interventions: list[Intervention] = field(default_factory=list)


class Controller:
    """Moves a robot by a policy's chunks.

    Every tick reads the robot, takes in the chunks that have come, asks for another where it is time, and sends one
    command through the safety layer. A chunk's rows stand on the time axis at the moment of what the policy saw, so
    however late it comes, the row that is executed is the one meant for now.

    Args:
        robot: Connected.
        body: Makes it the policy's embodiment.
        inference: Asks the policy; None to be moved by a person alone.
        executor: When to ask, and what overlapping chunks amount to.
        guard: Makes commands.
        timing: Rates and patience.
        freshness: What the policy may be shown.
        mode: ``run``; ``shadow``: everything but sending; ``step``: each chunk waits for `confirm`.
        confirm: Asked while a chunk waits; True lets it be executed.
        human: Who may take over.
        listener: Who is told.
    """

    def __init__(
        self,
        robot: Robot,
        body: Body,
        inference: Inference | None,
        executor: ChunkExecutor | None,
        guard: SafetyGuard,
        *,
        timing: Timing | None = None,
        freshness: Freshness | None = None,
        mode: str = "run",
        confirm: Callable[[], bool] | None = None,
        human: Human | None = None,
        listener: Listener | None = None,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"expected mode to be one of {MODES}, got {mode!r}")
        if mode == "step" and confirm is None:
            raise ConfigError("mode=step needs somebody who confirms")
        if (inference is None) != (executor is None) or (inference is None and human is None):
            raise ConfigError("expected a policy with an executor, or a person, or both")
        self.timing = timing or Timing()
        if self.timing.control_hz > robot.spec.command_hz:
            raise ConfigError(
                f"control_hz={self.timing.control_hz:g}: robot {robot.spec.name!r} takes at most "
                f"{robot.spec.command_hz:g} commands a second"
            )
        self.robot, self.body, self.guard, self.mode = robot, body, guard, mode
        self._inference, self._executor, self._confirm = inference, executor, confirm
        self._human, self._listener = human, listener
        self._freshness = freshness
        self.period, self.dt = 1.0 / self.timing.control_hz, 1.0 / body.embodiment.control_hz
        self.telemetry = Telemetry(self.period)
        self.instruction = ""
        self._timeline, self._begin = Timeline(), 0.0

    def run(self, instruction: str, *, seconds: float, done: Callable[[], str] | None = None, seed: int = 0) -> Outcome:
        """Follow an instruction until it is done, time is up, or something stops the robot.

        Args:
            instruction: What to do.
            seconds: Time from the first plan on [s].
            done: Asked every tick; says why the run is over, or nothing.
            seed: Of the policy's draws.

        Raises:
            SafetyError: The robot cannot start; nothing has moved.
            RobotError: The connection was lost before the start.
        """
        self.instruction = instruction
        self.telemetry = Telemetry(self.period)
        self._timeline, self._asked, self._lost = Timeline(), -np.inf, ""
        self._pending: np.ndarray | None = None
        self._sent = -np.inf
        self._eyes = Eyes(self.body, self._freshness)
        self._source, self._told = HOLD, -1
        self._followed: Planned | None = None
        self._target: np.ndarray | None = None
        self._moving: np.ndarray | None = None
        self._opened: tuple[Observation, int] | None = None
        self._path: deque[tuple[float, np.ndarray]] = deque()
        self._by_hand, self._let_go, self._logged = False, -np.inf, -np.inf
        if self._inference is not None:
            self._inference.restart(seed)
        # Garbage is collected before the first reading, not after it.
        with undisturbed(self.timing.realtime) as raise_threads:
            reading = self._first_reading()
            self.guard.start(reading, time.monotonic())
            self.body.start(self.guard.motion.position)
            with Watch(self.robot, self.timing.silent_s) as watch:
                raise_threads()
                try:
                    ending, why, spent = self._loop(seconds, done, watch)
                except BaseException as error:
                    self.robot.halt(f"{type(error).__name__}: {error}")
                    raise
        if self._lost or watch.fired:
            self.robot.halt(self._lost or watch.fired)
            ending, why = "robot", self._lost or watch.fired
        else:
            with contextlib.suppress(RobotError):  # who comes next finds out
                self.robot.rest()
        return Outcome(ending, why, spent, self.telemetry, self.guard.log.entries)

    def _first_reading(self) -> Reading:
        """A reading that is new enough to begin with, of a robot at rest: fingers rest later than commands."""
        begin = time.monotonic()
        while True:
            reading, waited = self.robot.read(), time.monotonic() - begin
            new = 0.0 <= time.monotonic() - reading.timestamp < 0.1 or waited > 1.0
            if new and (reading.fault or self.guard.is_still(reading) or waited > 2.0):
                return reading
            time.sleep(0.002)

    def _loop(self, seconds: float, done: Callable[[], str] | None, watch: Watch) -> tuple[str, str, float]:
        """Ticks until the robot rests for good."""
        begin = self._begin = self._planned = time.monotonic()
        ending, why, started, tick = "", "", None, 0
        while True:
            deadline = begin + tick * self.period
            now = wait_until(deadline)
            late = now - deadline
            if late > 0.5 * self.period or now - self._sent < 0.5 * self.period:
                # Too late for this one, or too soon after the last, which was sent late: the grid stays where it is.
                missed = max(1, round(late / self.period))
                self.telemetry.skipped += missed
                tick += missed
                watch.beat()
                continue
            self._tick(now)
            watch.beat()
            self.telemetry.tick(now, late, time.monotonic() - now, self._age(now), self._source)
            if started is None and self._source != HOLD:
                started = now
            if self.guard.state == RUNNING:
                if done is not None and (said := done()):
                    ending, why = "done", said
                elif started is not None and now - started > seconds:
                    ending, why = "time", f"{seconds:g} s are over"
                if ending:
                    self.guard.stop(ending, why, now)
            if watch.fired or self._lost or self.guard.state == STOPPED:
                break
            tick += 1
        spent = now - (started if started is not None else now)
        return self.guard.kind or "robot", why or self.guard.why, spent

    def _tick(self, now: float) -> None:
        try:
            reading = self.robot.read()
        except RobotError as error:
            self._lost = str(error)
            return
        self._eyes.look(reading)
        by_hand = self._human is not None and self.guard.state == RUNNING and self._human.takes_over()
        if self._by_hand and not by_hand:
            self._let_go = now
        self._by_hand = by_hand
        self._collect(now)
        self._ask(now)
        target, source = self._wanted(reading, now)
        moving, velocity = None, None
        if target is not None and self._target is not None and source == self._source:
            moving = (target - self._target) / self.period
            velocity = None if self._moving is None else steady(moving, self._moving)
        self._target, self._moving, self._source = target, moving, source
        if self.mode == "shadow":
            self.guard.follow(reading)
        command = self.guard.command(target, reading, now, velocity=velocity)
        self._path.append((now, command.position))
        while self._path[0][0] < now - PATH_S:
            self._path.popleft()
        if self.mode != "shadow":
            self._sent = time.monotonic()
            try:
                self.robot.send(command)
            except RobotError as error:
                self._lost = str(error)
        self._tell(reading, now)

    # -- the plan ------------------------------------------------------------------------------------------------------

    def _moment(self, now: float) -> float:
        """A time [s] in steps of the policy."""
        return (now - self._begin) / self.dt

    def _collect(self, now: float) -> None:
        """Put the chunks that have come on the time axis."""
        for reply in self._inference.replies() if self._inference is not None else ():
            if reply.actions is None:
                self.telemetry.errors.append((now, reply.error))
                self.guard.log.add("inference", reply.error, now)
                continue
            self.telemetry.request(reply.captured, reply.asked, reply.arrived)
            if self._by_hand or reply.captured < self._let_go:
                continue  # planned while the person moved the robot: when they let go, the policy looks anew
            if self.mode == "step":
                self._pending = reply.actions
            else:
                self._timeline.add(self._moment(reply.captured), reply.actions)
        if self._pending is not None and self._confirm is not None and self._confirm():
            assert self._executor is not None
            rows, self._pending = self._pending[: self._executor.replan_every], None
            self._timeline.clear()
            self._timeline.add(self._moment(now), rows)

    def _ask(self, now: float) -> None:
        """Ask for a chunk, where it is time and there is something new to show."""
        inference, executor = self._inference, self._executor
        if inference is None or executor is None or self.guard.state != RUNNING or not inference.is_free:
            return
        if now - self._asked < executor.replan_every * self.dt - 0.5 * self.period:
            return
        if self.mode == "step" and (self._pending is not None or self._timeline.end > self._moment(now)):
            return
        if why := self._eyes.problem(now):
            self.guard.log.add("observation", why, now)
            return
        if self._eyes.captured() <= self._eyes.used:
            return
        observation = self._eyes.observe(self.instruction)
        start = self._moment(observation.timestamp)
        delay = (now + inference.expected_s - observation.timestamp) / self.dt
        guidance = None if self.mode == "step" else executor.guidance(self._timeline, start, delay)
        inference.ask(observation, guidance)
        self._asked = now

    def _wanted(self, reading: Reading, now: float) -> tuple[np.ndarray | None, int]:
        """Where the axes should be at the end of this tick, and who says so."""
        if self.guard.state != RUNNING:
            return None, HOLD
        if self._by_hand and self._human is not None:
            self._timeline.clear()
            self._planned = now
            return self._human.target(self.guard.motion.position, self.period), HUMAN
        moment = self._moment(now)
        rows = self._timeline.at(moment) if self._executor is not None else []
        if not rows:
            return self._starve(now)
        assert self._executor is not None
        if self._source != POLICY:
            self.body.start(self.guard.motion.position)
        self._planned = now
        action = self._executor.merge(rows)
        newest = self._timeline.chunks[-1]
        share = self.period / self.dt
        if self._followed is not None and newest is not self._followed:
            last = self._followed.row(moment)
            if last is not None:
                self.telemetry.jumps.append(float(np.abs(action - last).max()))
        self._followed = newest
        before = after = action
        if self.body.embodiment.action.reference == "absolute":
            before, after = (self._merged(way, action) for way in self._timeline.way(moment, moment + share))
        return self.body.advance(before, after, share, reading.position), POLICY

    def _merged(self, rows: list[np.ndarray], action: np.ndarray) -> np.ndarray:
        """What chunks amount to between two rows; a gripper is as the row says, not on its way."""
        assert self._executor is not None
        found = np.array(self._executor.merge(rows))
        if self.body.embodiment.action.gripper != "none":
            found[-1] = action[-1]
        return found

    def _starve(self, now: float) -> tuple[None, int]:
        """Without a plan: hold, and after a while stop for good."""
        if self._inference is None or self.mode == "step":
            return None, HOLD
        waited, first = now - self._planned, not len(self.telemetry.requests["asked"])
        self.telemetry.starved += not first
        if waited > (self.timing.first_s if first else self.timing.hold_s):
            why = self._eyes.problem(now) or (self.telemetry.errors[-1][1] if self.telemetry.errors else "")
            self.guard.stop("starved", f"no plan for {waited:.1f} s: {why or 'inference is too slow'}", now)
        return None, HOLD

    @property
    def plan_ahead_s(self) -> float:
        """For how long there is a plan from now on [s]."""
        return (self._timeline.end - self._moment(time.monotonic())) * self.dt

    def _age(self, now: float) -> float:
        """Age of what the action being executed has seen [s]; -1 without one."""
        if self._source != POLICY or not self._timeline.chunks:
            return -1.0
        return now - (self._begin + self._timeline.chunks[-1].start * self.dt)

    def _tell(self, reading: Reading, now: float) -> None:
        """The listener hears of each step of the policy's rate in which somebody moved the robot."""
        step = int(self._moment(now))
        if self._listener is None or step == self._told:
            return
        if self._opened is not None and self._opened[1] != HOLD:
            observation, source = self._opened
            # An action belongs to the moment of its picture, as a chunk's first row does; the tick is later than that.
            before, after = (self._commanded(observation.timestamp + after) for after in (0.0, self.dt))
            self._listener.step(
                Step(
                    observation=observation,
                    action=self.body.action(before, after),
                    command=after,
                    measured=reading.position,
                    source=source,
                    time=now,
                )
            )
            self._logged = observation.timestamp
        self._told, self._opened = step, None
        if not self._eyes.problem(now) and self._eyes.captured() > self._logged:
            self._opened = (self._eyes.observe(self.instruction, note=False), self._source)

    def _commanded(self, moment: float) -> np.ndarray:
        """Where the axes (j,) were commanded to be at a moment of the last seconds."""
        times = [t for t, _ in self._path]
        return np.array([np.interp(moment, times, column) for column in np.array([p for _, p in self._path]).T])


def steady(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The velocity (j,) that two ticks agree on: the smaller, and none where they differ in sign.

    A target that jumps because another chunk took over has no velocity that the robot should pass it with.
    """
    return np.where(now * before > 0.0, np.sign(now) * np.minimum(np.abs(now), np.abs(before)), 0.0)
