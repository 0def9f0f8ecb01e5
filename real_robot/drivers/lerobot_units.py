"""Units of LeRobot's keys: what a value of ``shoulder_pan.pos`` is in radians, metres, or a gripper's opening.

LeRobot's contract has no units. A key's value may be degrees, a share of the calibrated range (-100..100 or 0..100),
radians or metres; who says which is the YAML, and `check_mode` and `check_scale` hold it against what a robot tells.
Nothing of LeRobot is imported. Robots and leader arms use the same map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ...errors import RobotError, did_you_mean
from ...spec import FeatureSpec

KEY_UNITS: dict[str, tuple[str, float | None]] = {
    "degrees": ("rad", math.pi / 180.0),
    "radians": ("rad", 1.0),
    "metres": ("m", 1.0),
    "percent": ("rad", None),
    "normalised": ("rad", None),
}
"""Unit of a key -> unit of a joint, and its factor; a share of a calibrated range has none until the range is known."""
NORM_MODES = {"degrees": "degrees", "range_m100_100": "normalised", "range_0_100": "percent"}
"""LeRobot's ``MotorNormMode`` -> unit of a key."""
SCALE_TOLERANCE = 0.02
"""Largest relative difference of a given scale from what a calibration says: two counts in a hundred."""


@dataclass(frozen=True, kw_only=True)
class LeRobotAxis:
    """One axis of a robot, and the key that LeRobot knows it by: ``axis = scale * key + offset``.

    Attributes:
        name: Of the axis; policies' states and actions use it.
        key: Of LeRobot's observations and actions, as ``shoulder_pan.pos``.
        unit: Of the key's values: one of `KEY_UNITS`.
        low, high: Position limits [rad, m, or 1 for a gripper].
        velocity, acceleration, jerk: Largest absolute values, per second to the first, second and third power.
        gripper: Whether it is a gripper's opening, from 0 to 1.
        scale: Units of the axis per unit of the key; negative turns the direction round. Where it is not given, it
            follows from `unit`: for joints in degrees, radians or metres, and for a gripper in percent of its opening.
        offset: Axis position where the key is 0.

    Raises:
        RobotError: Something is missing or does not fit.
    """

    name: str
    key: str
    unit: str
    low: float
    high: float
    velocity: float
    acceleration: float
    jerk: float
    gripper: bool = False
    scale: float | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        where = f"axis {self.name!r}"
        if self.unit not in KEY_UNITS:
            raise RobotError(f"{where}: unit {self.unit!r} of {self.key!r}? {did_you_mean(self.unit, KEY_UNITS)}")
        usual = (0.01 if self.unit == "percent" else None) if self.gripper else KEY_UNITS[self.unit][1]
        scale = usual if self.scale is None else float(self.scale)
        if scale is None:
            unit = f"{self.axis_unit} per unit of the key"
            raise RobotError(f"{where}: expected a scale [{unit}], got none: {self._why()}")
        if not (math.isfinite(scale) and scale != 0.0 and math.isfinite(self.offset)):
            raise RobotError(f"{where}: expected a finite scale other than 0 and a finite offset, got {scale}")
        if self.gripper and (self.low, self.high) != (0.0, 1.0):
            raise RobotError(f"{where}: expected a gripper from 0 (closed) to 1 (open), got {self.low} to {self.high}")
        object.__setattr__(self, "scale", scale)

    def _why(self) -> str:
        if self.gripper:
            return f"1 / (open - closed) for a gripper in {self.unit}, and offset so that closed is 0"
        return (
            f"{self.key!r} is a share of a calibrated range, which has no unit. For -100..100 it is "
            "(range_max - range_min) / 200 * 2 pi / (resolution - 1) of the calibration file; or use degrees "
            "(use_degrees: true)"
        )

    @property
    def axis_unit(self) -> str:
        """Unit of the axis: ``rad``, ``m``, or ``1`` for a gripper."""
        return "1" if self.gripper else KEY_UNITS[self.unit][0]

    @property
    def motor(self) -> str:
        """Name of the motor in LeRobot's bus and calibration file."""
        return self.key.rpartition(".")[0] or self.key

    def from_key(self, value: float) -> float:
        """The axis position of a key's value."""
        assert self.scale is not None
        return float(value) * self.scale + self.offset

    def to_key(self, position: float) -> float:
        """The key's value for an axis position."""
        assert self.scale is not None
        return (float(position) - self.offset) / self.scale

    def check_mode(self, mode: str) -> None:
        """Hold the unit against a motor's ``norm_mode``.

        Raises:
            RobotError: It is another.
        """
        told = NORM_MODES.get(mode, mode)
        if told != self.unit:
            hint = " (or set use_degrees in config)" if "degrees" in (told, self.unit) else ""
            raise RobotError(
                f"axis {self.name!r}: the YAML says that {self.key!r} is in {self.unit}, the robot says {told} "
                f"({mode}). Set unit: {told}{hint}"
            )

    def check_calibration(self, low: float, high: float, resolution: int) -> None:
        """Hold a joint against its calibration: the scale of a normalised one, the limits of one in degrees.

        LeRobot cuts normalised values off at the calibrated range, and does not cut off degrees.

        Args:
            low, high: Calibrated range of the encoder [counts].
            resolution: Counts in a turn.

        Raises:
            RobotError: The scales differ by more than `SCALE_TOLERANCE`, or a limit is outside of the range.
        """
        assert self.scale is not None
        if self.gripper:
            return
        expected = normalised_scale(low, high, resolution)
        if self.unit == "normalised" and abs(abs(self.scale) - expected) > SCALE_TOLERANCE * expected:
            raise RobotError(
                f"axis {self.name!r}: the YAML says {abs(self.scale):.6g} rad per unit of {self.key!r}, the "
                f"calibration says {expected:.6g}. Set scale: {math.copysign(expected, self.scale):.6g}"
            )
        ends = sorted(self.from_key(side * math.degrees(100.0 * expected)) for side in (-1, 1))
        if self.unit == "degrees" and not (ends[0] - 1e-3 <= self.low and self.high <= ends[1] + 1e-3):
            raise RobotError(
                f"axis {self.name!r}: the YAML allows {self.low:.4g} .. {self.high:.4g} rad, the calibration has "
                f"{ends[0]:.4g} .. {ends[1]:.4g}. Narrow low and high, or calibrate anew"
            )


def normalised_scale(low: float, high: float, resolution: int) -> float:
    """Radians per unit of a key from -100 to 100, for a calibrated range of counts and counts in a turn."""
    return (high - low) / 200.0 * 2.0 * math.pi / (resolution - 1)


class AxisMap:
    """The axes of a robot in order, and between them and LeRobot's dictionaries.

    Args:
        axes: Axes, or mappings of their arguments; a gripper is the last.

    Raises:
        RobotError: None, one that does not fit, names or keys twice, a gripper that is not the last.
    """

    def __init__(self, axes: Sequence[LeRobotAxis | Mapping[str, Any]]) -> None:
        self.axes = tuple(axis if isinstance(axis, LeRobotAxis) else _axis(axis) for axis in axes)
        if not self.axes:
            raise RobotError("expected axes: a list of mappings with name, key, unit, low, high, ..., got none")
        for what in ("name", "key"):
            values = [getattr(axis, what) for axis in self.axes]
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise RobotError(f"axes: expected every {what} once, got {twice} more than once")
        if early := [axis.name for axis in self.axes[:-1] if axis.gripper]:
            raise RobotError(f"axes: expected one gripper, as the last axis, got {early} before the last")

    @property
    def keys(self) -> tuple[str, ...]:
        """LeRobot's keys, in the order of the axes."""
        return tuple(axis.key for axis in self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the axes."""
        return tuple(axis.name for axis in self.axes)

    def feature(self) -> FeatureSpec:
        """What a robot's spec says of its axes."""
        return FeatureSpec(
            name="axes",
            shape=(len(self.axes),),
            names=self.names,
            units=tuple(axis.axis_unit for axis in self.axes),
            low=tuple(axis.low for axis in self.axes),
            high=tuple(axis.high for axis in self.axes),
            gripper="open_is_1" if self.axes[-1].gripper else "none",
        )

    def limits(self, which: str) -> tuple[float, ...]:
        """``velocity``, ``acceleration`` or ``jerk`` of every axis."""
        return tuple(float(getattr(axis, which)) for axis in self.axes)

    def require(self, keys: Mapping[str, Any] | Sequence[str], whose: str) -> None:
        """Raise a RobotError unless every axis has its key among `keys`."""
        lacking = [key for key in self.keys if key not in keys]
        if lacking:
            raise RobotError(f"{whose}: expected the keys {lacking} of the YAML's axes, got {sorted(keys)}")

    def to_axes(self, values: Mapping[str, Any]) -> np.ndarray:
        """Axis positions float64 (j,) of an observation or a leader's action.

        Raises:
            RobotError: A key is missing, or its value is no finite number.
        """
        self.require(values, "values")
        try:
            found = np.array([axis.from_key(float(values[axis.key])) for axis in self.axes])
        except (TypeError, ValueError) as error:
            raise RobotError(f"expected a number for each of {list(self.keys)}: {error}") from error
        if not np.isfinite(found).all():
            wrong = {axis.key: values[axis.key] for axis, value in zip(self.axes, found) if not np.isfinite(value)}
            raise RobotError(f"expected finite values, got {wrong}")
        return found

    def to_keys(self, position: np.ndarray) -> dict[str, float]:
        """LeRobot's action for axis positions (j,)."""
        return {axis.key: axis.to_key(value) for axis, value in zip(self.axes, position)}


def _axis(given: Mapping[str, Any]) -> LeRobotAxis:
    """An axis from YAML."""
    known = {field.name: field for field in fields(LeRobotAxis)}
    label = f"axis {given.get('name', given)!r}"
    if unknown := [key for key in given if key not in known]:
        raise RobotError(f"{label}: no option {unknown[0]!r}. {did_you_mean(str(unknown[0]), known)}")
    optional = {"gripper", "scale", "offset"}
    if missing := [key for key in known if key not in optional and given.get(key) is None]:
        raise RobotError(f"{label}: expected {', '.join(missing)}, got none")
    numbers = {"low", "high", "velocity", "acceleration", "jerk", "offset"}
    try:
        options: dict[str, Any] = {k: float(v) if k in numbers else v for k, v in given.items()}
        return LeRobotAxis(**options)
    except (TypeError, ValueError) as error:
        if isinstance(error, RobotError):
            raise
        raise RobotError(f"{label}: {error}") from error
