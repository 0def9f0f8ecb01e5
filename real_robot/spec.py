"""What a robot is, readable before anything is connected: axes, units, limits, rates, cameras; and what it reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import RobotError
from ..spec import FeatureSpec

UNITS = ("rad", "m", "1")


@dataclass(frozen=True, kw_only=True)
class MotionLimits:
    """What an axis may do, in its unit [rad, m or 1 for a gripper's opening] and seconds; float64 (j,) each.

    Attributes:
        low, high: Position.
        velocity, acceleration, jerk: Largest absolute values.

    Raises:
        RobotError: A limit that is missing, infinite, not above zero, or of another number of axes.
    """

    low: np.ndarray
    high: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray

    def __post_init__(self) -> None:
        for key in ("low", "high", "velocity", "acceleration", "jerk"):
            value = np.array(getattr(self, key), np.float64)  # a copy: nobody changes limits later
            value.flags.writeable = False
            object.__setattr__(self, key, value)
            if value.ndim != 1 or value.shape != self.low.shape or not np.isfinite(value).all():
                raise RobotError(
                    f"expected a finite {key} limit for each of {len(self.low)} axes, got {value.tolist()}"
                )
        if not (self.low < self.high).all():
            raise RobotError(f"expected low limits below high ones, got {self.low.tolist()} and {self.high.tolist()}")
        for key in ("velocity", "acceleration", "jerk"):
            if not (getattr(self, key) > 0).all():
                raise RobotError(f"expected {key} limits above 0, got {getattr(self, key).tolist()}")

    def tightened(self, other: MotionLimits) -> MotionLimits:
        """The stricter of both: what a config says can narrow a robot's limits, never widen them."""
        return MotionLimits(
            low=np.maximum(self.low, other.low),
            high=np.minimum(self.high, other.high),
            velocity=np.minimum(self.velocity, other.velocity),
            acceleration=np.minimum(self.acceleration, other.acceleration),
            jerk=np.minimum(self.jerk, other.jerk),
        )

    def scaled(self, speed: float) -> MotionLimits:
        """Slower by a factor in (0, 1]: time stretched, so accelerations fall with its square, jerks with its cube."""
        if not 0.0 < speed <= 1.0:
            raise RobotError(f"expected a speed above 0 and at most 1, got {speed}")
        return replace(
            self,
            velocity=self.velocity * speed,
            acceleration=self.acceleration * speed**2,
            jerk=self.jerk * speed**3,
        )


@dataclass(frozen=True, kw_only=True)
class RobotSpec:
    """A robot's interface: absolute axis targets in, positions and camera frames out.

    Attributes:
        name: For example ``arm6``.
        axes: The commanded axes with names, units and position limits; the gripper, if there is one, is the last
            (``gripper="open_is_1"``, unit 1, from 0 to 1).
        velocity, acceleration, jerk: Largest absolute values of each axis.
        command_hz: Highest rate at which targets are taken [Hz].
        state_hz: Rate of position readings [Hz].
        cameras: What its cameras deliver.
        camera_hz: Rate of frames [Hz].
        watchdog_s: The robot stops by itself when it hears nothing for so long [s]; None where it does not.

    Raises:
        RobotError: Limits, names or units are absent or do not fit.
    """

    name: str
    axes: FeatureSpec
    velocity: tuple[float, ...]
    acceleration: tuple[float, ...]
    jerk: tuple[float, ...]
    command_hz: float
    state_hz: float
    cameras: tuple[FeatureSpec, ...] = ()
    camera_hz: float = 30.0
    watchdog_s: float | None = None
    limits: MotionLimits = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def build(value: FeatureSpec | Mapping[str, Any]) -> FeatureSpec:
            return value if isinstance(value, FeatureSpec) else FeatureSpec.from_dict(value)

        object.__setattr__(self, "axes", build(self.axes))
        object.__setattr__(self, "cameras", tuple(build(c) for c in self.cameras))
        axes = self.axes
        for key in ("names", "units", "low", "high"):
            if not getattr(axes, key):
                raise RobotError(f"robot {self.name!r}: expected {key} of its axes, got none; nothing moves without")
        if unknown := sorted(set(axes.units) - set(UNITS)):
            raise RobotError(f"robot {self.name!r}: expected axes in {UNITS}, got {unknown}: convert in the driver")
        for key in ("velocity", "acceleration", "jerk"):
            values = tuple(float(x) for x in getattr(self, key) or ())
            object.__setattr__(self, key, values)
            if len(values) != axes.dim:
                raise RobotError(
                    f"robot {self.name!r}: expected a {key} limit for each of {axes.dim} axes, got {len(values)}; "
                    "nothing moves without"
                )
        if axes.gripper not in ("none", "open_is_1") or axes.reference != "absolute":
            raise RobotError(f"robot {self.name!r}: expected absolute axes, with a gripper whose open position is 1")
        for key in ("command_hz", "state_hz", "camera_hz"):
            if not (np.isfinite(getattr(self, key)) and getattr(self, key) > 0):
                raise RobotError(f"robot {self.name!r}: expected {key} above 0, got {getattr(self, key)}")
        if self.watchdog_s is not None and not self.watchdog_s > 0:
            raise RobotError(f"robot {self.name!r}: expected watchdog_s above 0 or null, got {self.watchdog_s}")
        try:
            limits = MotionLimits(
                low=np.array(axes.low),
                high=np.array(axes.high),
                velocity=np.array(self.velocity),
                acceleration=np.array(self.acceleration),
                jerk=np.array(self.jerk),
            )
        except RobotError as error:
            raise RobotError(f"robot {self.name!r}: {error}") from error
        object.__setattr__(self, "limits", limits)

    @property
    def dof(self) -> int:
        """Number of axes j, the gripper included."""
        return self.axes.dim

    @property
    def has_gripper(self) -> bool:
        """Whether the last axis is a gripper's opening."""
        return self.axes.gripper != "none"

    @property
    def camera_names(self) -> tuple[str, ...]:
        """Names of the cameras."""
        return tuple(c.name for c in self.cameras)

    def describe(self) -> list[tuple[str, ...]]:
        """Rows for people: axis, unit, range, velocity, acceleration, jerk."""
        limits = self.limits
        return [
            (
                name,
                unit,
                f"{limits.low[k]:.3g} .. {limits.high[k]:.3g}",
                f"{limits.velocity[k]:.3g}",
                f"{limits.acceleration[k]:.3g}",
                f"{limits.jerk[k]:.3g}",
            )
            for k, (name, unit) in enumerate(zip(self.axes.names, self.axes.units))
        ]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A camera's picture: uint8 (height, width, 3), and when it was taken, by this computer's `time.monotonic` [s]."""

    image: np.ndarray
    timestamp: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a robot last said of itself.

    Attributes:
        position, velocity: float64 (j,), in the units of the spec's axes.
        timestamp: When it was measured, by this computer's `time.monotonic` [s].
        frames: Camera name -> newest frame.
        fault: Why the robot does not move, in its own words; empty while it does.
    """

    position: np.ndarray
    velocity: np.ndarray
    timestamp: float
    frames: Mapping[str, Frame] = field(default_factory=dict)
    fault: str = ""


def axis_text(names: Sequence[str], which: np.ndarray) -> str:
    """The names of the axes for which `which` (j,) is true."""
    return ", ".join(name for name, one in zip(names, which) if one)
