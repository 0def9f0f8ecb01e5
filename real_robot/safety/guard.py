"""The safety layer: what is asked for goes in, what a robot may do comes out, and every difference is written down."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ...errors import RobotError, SafetyError
from ..spec import MotionLimits, Reading, RobotSpec, axis_text
from .command import _KEY, SafeCommand
from .motion import Motion, MotionState
from .stop import EmergencyStop
from .zones import PositionCheck

RUNNING, STOPPING, STOPPED = "running", "stopping", "stopped"
FORGIVEN = 5
"""Targets in a row that are not finite, or of another shape, before the run ends; the robot holds meanwhile."""


@dataclass
class Intervention:
    """Something the safety layer did.

    Attributes:
        kind: For counts, for example ``velocity`` or ``zone``.
        detail: For people.
        first, last: When it began and was last seen [s].
        ticks: In how many ticks.
        worst: By how much the worst request was off, in its own unit; 0 where there is no such number.
    """

    kind: str
    detail: str
    first: float
    last: float
    ticks: int = 1
    worst: float = 0.0


@dataclass
class Log:
    """Interventions in order; one that goes on is one entry."""

    entries: list[Intervention] = field(default_factory=list)
    pause: float = 0.3
    """Seconds after which the same thing is a new entry."""

    def add(self, kind: str, detail: str, now: float, worst: float = 0.0) -> None:
        """Write down one; merged with the entry that it continues."""
        for entry in reversed(self.entries[-8:]):
            if entry.kind == kind and now - entry.last <= self.pause:
                entry.last, entry.ticks = now, entry.ticks + 1
                if worst > entry.worst:
                    entry.worst, entry.detail = worst, detail
                return
        self.entries.append(Intervention(kind, detail, now, now, 1, worst))

    def counts(self) -> dict[str, int]:
        """Kind -> entries."""
        found: dict[str, int] = {}
        for entry in self.entries:
            found[entry.kind] = found.get(entry.kind, 0) + 1
        return found


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the safety layer insists on, beside the robot's limits.

    Attributes:
        speed: Share of the robot's speed, above 0 to 1; accelerations and jerks fall accordingly.
        reading_age_s: A robot that says nothing for so long is stopped [s].
        following: How far a measured position may be from what is commanded, in the axis' unit; the robot is held up by
            something, or not what it is thought to be. Grippers are left out: they are held up by what they hold.
        step: Largest distance of a target from what is commanded [unit of the axis]; the rest is cut off. None: none.
        limits: Stricter limits than the robot's: ``low``, ``high``, ``velocity``, ``acceleration``, ``jerk``.
    """

    speed: float = 1.0
    reading_age_s: float = 0.25
    following: float = 0.35
    step: float | None = None
    limits: dict[str, list[float]] | None = None

    def __post_init__(self) -> None:
        for key in ("speed", "reading_age_s", "following", *(["step"] if self.step is not None else [])):
            value = getattr(self, key)
            if not (isinstance(value, (int, float)) and np.isfinite(value) and value > 0):
                raise RobotError(f"safety rules: expected {key} above 0, got {value!r}; no rule can be switched off")
        if self.reading_age_s > 1.0 or self.following > 1.0 or self.speed > 1.0:
            raise RobotError(
                "safety rules: expected speed, reading_age_s [s] and following [rad, m] of at most 1, got "
                f"{self.speed}, {self.reading_age_s} and {self.following}"
            )

    def tighten(self, limits: MotionLimits) -> MotionLimits:
        """A robot's limits under these rules: never wider."""
        if self.limits:
            unknown = set(self.limits) - {"low", "high", "velocity", "acceleration", "jerk"}
            if unknown:
                raise RobotError(f"safety rules: there are no limits called {sorted(unknown)}")
            own = {k: getattr(limits, k) for k in ("low", "high", "velocity", "acceleration", "jerk")}
            limits = limits.tightened(MotionLimits(**{**own, **{k: np.array(v) for k, v in self.limits.items()}}))
        return limits.scaled(self.speed)


class SafetyGuard:
    """Makes every command, from targets that anything may have asked for.

    It keeps what is commanded now (`motion`), from which the robot can always be stopped within its limits, inside its
    workspace and without touching anything: a step is taken only if the way to rest after it has been checked,
    otherwise the robot brakes on the way that was checked before.

    Args:
        spec: The robot.
        period: Time between commands [s].
        rules: What is insisted on.
        check: Where the robot may be; None without a model.
        stop: The emergency stop.
    """

    def __init__(
        self,
        spec: RobotSpec,
        period: float,
        *,
        rules: Rules | None = None,
        check: PositionCheck | None = None,
        stop: EmergencyStop | None = None,
    ) -> None:
        self.spec, self.rules = spec, rules or Rules()
        self.limits = self.rules.tighten(spec.limits)
        self.emergency = stop or EmergencyStop()
        self.log = Log()
        self.state, self.kind, self.why = STOPPED, "", "not started"
        self._motion = Motion(self.limits, period)
        self.check = check
        self._bad = 0
        self.motion = MotionState.rest(np.zeros(spec.dof))

    @property
    def _still(self) -> np.ndarray:
        """Velocities (j,) below which an axis is at rest."""
        return np.maximum(0.05, 0.1 * self.limits.velocity)

    def is_still(self, reading: Reading) -> bool:
        """Whether the robot is at rest."""
        return bool(reading.velocity.shape == (self.spec.dof,) and (np.abs(reading.velocity) <= self._still).all())

    def start(self, reading: Reading, now: float) -> None:
        """Begin at rest where the robot is.

        Raises:
            SafetyError: The robot is not where it may be, at fault, moving, or its reading old; nothing has moved.
        """
        if why := self._sick(reading, now):
            raise SafetyError(f"the robot cannot start: {why}")
        outside = (reading.position < self.limits.low - 0.02) | (reading.position > self.limits.high + 0.02)
        if outside.any():
            raise SafetyError(
                f"the robot cannot start: {axis_text(self.spec.axes.names, outside)} is outside its limits: "
                f"{np.round(reading.position, 3).tolist()}; move it inside by hand or by its own pendant"
            )
        if not self.is_still(reading):
            fast = np.abs(reading.velocity) > self._still
            raise SafetyError(f"the robot cannot start: {axis_text(self.spec.axes.names, fast)} is moving")
        where = np.clip(reading.position, self.limits.low, self.limits.high)
        if self.check is not None and (why := self.check.check(where)):
            raise SafetyError(f"the robot cannot start: {why}; move it away by hand or by its own pendant")
        self.motion = MotionState.rest(where)
        self._bad = 0
        self.state, self.kind, self.why = RUNNING, "", ""

    def command(
        self,
        target: np.ndarray | None,
        reading: Reading,
        now: float,
        *,
        velocity: np.ndarray | None = None,
    ) -> SafeCommand:
        """The command of this tick.

        Args:
            target: Positions (j,) that are asked for; None to come to rest and hold.
            reading: The robot's newest.
            now: This moment [s].
            velocity: Velocity of the target (j,), where it is known.
        """
        if self.state == RUNNING:
            if why := self.emergency.poll():
                self.stop("emergency stop", why, now)
            elif why := self._sick(reading, now) or self._astray(reading):
                self.stop("robot", why, now)
        wanted = None if self.state != RUNNING else self._sound(target, now)
        following = self._motion.brake(self.motion) if wanted is None else self._advance(wanted, velocity, now)
        self.motion = following
        if self.state == STOPPING and following.is_resting:
            self.state = STOPPED
        return SafeCommand(_KEY, following.position)

    def follow(self, reading: Reading) -> None:
        """Take the robot to be commanded where it is: for a shadow, whose commands nobody executes."""
        if reading.position.shape == (self.spec.dof,) and np.isfinite(reading.position).all():
            self.motion = MotionState.rest(reading.position)

    def stop(self, kind: str, why: str, now: float) -> None:
        """Brake, and stay; the first reason is kept."""
        if self.state == RUNNING:
            self.state, self.kind, self.why = STOPPING, kind, why
            self.log.add(kind, why, now)

    # -- what is looked at ---------------------------------------------------------------------------------------------

    def _sick(self, reading: Reading, now: float) -> str:
        """What is wrong with the robot or what it says."""
        if reading.fault:
            return f"the robot reports: {reading.fault}"
        shape = (self.spec.dof,)
        if reading.position.shape != shape or reading.velocity.shape != shape:
            return f"expected readings of {self.spec.dof} axes, got {reading.position.shape}"
        if not (np.isfinite(reading.position).all() and np.isfinite(reading.velocity).all()):
            return "the robot's reading is not finite"
        age = now - reading.timestamp
        if not -0.05 <= age <= self.rules.reading_age_s:
            return (
                f"the robot's reading is {age * 1e3:.0f} ms old; 0 to {self.rules.reading_age_s * 1e3:.0f} are allowed"
            )
        return ""

    def _astray(self, reading: Reading) -> str:
        """Whether the robot is where it was commanded to be."""
        off = np.abs(reading.position - self.motion.position)
        if self.spec.has_gripper:
            off[-1] = 0.0
        if (off > self.rules.following).any():
            worst = int(off.argmax())
            return f"{self.spec.axes.names[worst]} is {off[worst]:.2f} off its command: held up, or pushed"
        return ""

    def _sound(self, target: np.ndarray | None, now: float) -> np.ndarray | None:
        """A target of numbers; None to hold."""
        if target is None:
            return None
        target = np.asarray(target, np.float64)
        fits = target.shape == (self.spec.dof,)
        if fits and np.isfinite(target).all():
            self._bad = 0
            return target
        self._bad += 1
        what = "not finite" if fits else f"of shape {target.shape}"
        self.log.add("not finite" if fits else "shape", f"a target was {what}: held", now)
        if self._bad > FORGIVEN:
            self.stop("target", f"{self._bad} targets in a row were {what}", now)
        return None

    def _advance(self, target: np.ndarray, velocity: np.ndarray | None, now: float) -> MotionState:
        """One step towards a target, as far as everything allows."""
        limits, here, names = self.limits, self.motion.position, self.spec.axes.names
        if self.rules.step is not None:
            over = np.abs(target - here) - self.rules.step
            if (over > 1e-9).any():
                self.log.add(
                    "step",
                    f"{axis_text(names, over > 1e-9)}: a target further than {self.rules.step}",
                    now,
                    float(over.max()),
                )
                target = here + np.clip(target - here, -self.rules.step, self.rules.step)
        beyond = np.maximum(limits.low - target, target - limits.high)
        if (beyond > 1e-6).any():
            self.log.add(
                "position", f"{axis_text(names, beyond > 1e-6)}: a target beyond its limits", now, float(beyond.max())
            )
        if velocity is not None:
            velocity = np.nan_to_num(np.asarray(velocity, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        following = self._motion.step(self.motion, target, velocity)
        asked = np.abs(target - here) / self._motion.period
        if self.spec.has_gripper:
            asked[-1] = 0.0  # open or closed at once is how grippers are told
        if (asked > 1.5 * limits.velocity).any():
            fast = asked > 1.5 * limits.velocity
            self.log.add(
                "velocity", f"{axis_text(names, fast)}: asked to be faster than allowed", now, float(asked.max())
            )
        if self.check is None:
            return following
        for position in self._motion.stop(following):
            if why := self.check.check(position):
                self.log.add("zone", why, now)
                return self._motion.brake(self.motion)
        return following
