"""Motion within limits of position, velocity, acceleration and jerk: one step towards a target, one step of braking.

The trajectories are Ruckig's (Berscheid and Kroeger 2021): from the present state, to a target, in the least time
under the limits. What follows from that, and is relied on: a step never exceeds a limit, and as the least-time way to a
target brakes in full where it has to turn round, a motion that could once be stopped within the position limits always
can.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ruckig import ControlInterface, InputParameter, Result, Ruckig, RuckigError, Synchronization, Trajectory

from ...errors import SafetyError
from ..spec import MotionLimits

EXACT = 1e-9
"""What rounding may add to a position [unit of the axis]."""


@dataclass(frozen=True, kw_only=True)
class MotionState:
    """Position, velocity and acceleration of what is commanded, float64 (j,) each."""

    position: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray

    @classmethod
    def rest(cls, position: np.ndarray) -> MotionState:
        """At rest."""
        position = np.array(position, np.float64)
        return cls(position=position, velocity=np.zeros_like(position), acceleration=np.zeros_like(position))

    @property
    def is_resting(self) -> bool:
        """Whether nothing moves."""
        return bool((np.abs(self.velocity) < 1e-7).all() and (np.abs(self.acceleration) < 1e-5).all())


class Motion:
    """Steps of `period` seconds under limits; holds no state of the motion, so its methods are functions.

    Args:
        limits: Of each axis.
        period: Length of a step [s].
    """

    def __init__(self, limits: MotionLimits, period: float) -> None:
        if not period > 0:
            raise SafetyError(f"expected a period above 0, got {period}")
        self.limits, self.period = limits, period
        dof = len(limits.low)
        self._ruckig = Ruckig(dof)
        self._input, self._trajectory = InputParameter(dof), Trajectory(dof)
        self._input.max_velocity = limits.velocity.tolist()
        self._input.max_acceleration = limits.acceleration.tolist()
        self._input.max_jerk = limits.jerk.tolist()
        self._input.target_acceleration = [0.0] * dof
        # Each axis for itself: if all arrived together, an arm would be as slow as its gripper is to open.
        self._input.synchronization = Synchronization.No

    def step(self, state: MotionState, target: np.ndarray, velocity: np.ndarray | None = None) -> MotionState:
        """The state one period later on the way to `target`, which is cut to the limits.

        Args:
            state: Now.
            target: float64 (j,), finite.
            velocity: Velocity to have there; left out where it could not be stopped from within the limits.
        """
        limits = self.limits
        target = np.clip(target, limits.low, limits.high)
        passing = np.zeros_like(target)
        if velocity is not None:
            passing = np.clip(velocity, -limits.velocity, limits.velocity)
            ends = target + np.sign(passing) * stopping_distance(np.abs(passing), limits)
            passing = np.where((ends < limits.low) | (ends > limits.high), 0.0, passing)
        found = self._solve(state, target, passing)
        return self.brake(state) if found is None else found

    def _solve(self, state: MotionState, target: np.ndarray, velocity: np.ndarray) -> MotionState | None:
        """One step of the least-time trajectory; None where it would leave the position limits or there is none."""
        self._load(state, ControlInterface.Position)
        self._input.target_position, self._input.target_velocity = target.tolist(), velocity.tolist()
        if not self._plans():
            return None
        following = self._at(self.period)
        extrema = self._trajectory.position_extrema
        lowest, highest = np.array([(bound.min, bound.max) for bound in extrema]).T
        low, high = self.limits.low - EXACT, self.limits.high + EXACT
        if (lowest < low).any() or (highest > high).any():
            # Only a motion that began outside, or too fast, comes here: it may go on where it leads back.
            stops = self.stop(state)
            if (lowest < np.minimum(low, stops.min(0) - EXACT)).any():
                return None
            if (highest > np.maximum(high, stops.max(0) + EXACT)).any():
                return None
        return following

    def brake(self, state: MotionState) -> MotionState:
        """The state one period later when every axis stops as quickly as it may."""
        self._brake(state)
        return self._at(self.period)

    def stop(self, state: MotionState, most: int = 24) -> np.ndarray:
        """Positions float64 (n, j) that are commanded when `state` is braked to rest; itself and the last included.

        Above `most` of them, only evenly chosen ones.
        """
        self._brake(state)
        ticks = int(np.ceil(self._trajectory.duration / self.period - 1e-6))
        chosen = np.unique(np.linspace(0, ticks, min(ticks + 1, most)).round())
        return np.array([self._trajectory.at_time(k * self.period)[0] for k in chosen])

    def _brake(self, state: MotionState) -> None:
        self._load(state, ControlInterface.Velocity)
        self._input.target_velocity = [0.0] * len(state.position)
        if not self._plans():
            raise SafetyError(f"no way to brake from {state}")

    def _plans(self) -> bool:
        """Compute the trajectory that was asked for; whether there is one."""
        try:
            return self._ruckig.calculate(self._input, self._trajectory) in (Result.Working, Result.Finished)
        except RuckigError:  # it gives up on some states
            return False

    def _load(self, state: MotionState, interface: ControlInterface) -> None:
        self._input.control_interface = interface
        self._input.current_position = state.position.tolist()
        self._input.current_velocity = state.velocity.tolist()
        self._input.current_acceleration = state.acceleration.tolist()

    def _at(self, time: float) -> MotionState:
        position, velocity, acceleration = (np.array(x) for x in self._trajectory.at_time(time))
        return MotionState(position=position, velocity=velocity, acceleration=acceleration)


def stopping_distance(speed: np.ndarray, limits: MotionLimits) -> np.ndarray:
    """Distance (j,) to rest from `speed` (j,) at acceleration 0, under limits of acceleration and jerk."""
    ramp = limits.acceleration**2 / limits.jerk  # speed that is lost while the deceleration is built up and taken back
    long = speed / 2.0 * (speed / limits.acceleration + limits.acceleration / limits.jerk)
    short = speed * np.sqrt(speed / limits.jerk)
    return np.where(speed >= ramp, long, short)
