"""Motion within limits, judged by finite differences of the positions alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.errors import RobotError
from brachium.real_robot.safety.motion import Motion, MotionState, stopping_distance
from brachium.real_robot.spec import MotionLimits


def limits(dof, velocity=2.0, acceleration=8.0, jerk=80.0, reach=1.0):
    scale = np.linspace(0.5, 1.5, dof)
    return MotionLimits(
        low=-reach * scale,
        high=reach * scale,
        velocity=velocity * scale,
        acceleration=acceleration * scale,
        jerk=jerk * scale,
    )


def assert_within(positions, bounds, period, slack=1e-6):
    """Positions, and their first, second and third differences, respect the limits."""
    path = np.array([positions[0]] * 3 + list(positions))
    found = path
    assert (found >= bounds.low - 1e-8).all()
    assert (found <= bounds.high + 1e-8).all()
    for name in ("velocity", "acceleration", "jerk"):
        found = np.diff(found, axis=0) / period
        bound = getattr(bounds, name)
        assert (np.abs(found) <= bound * (1.0 + slack) + 1e-6).all(), (name, np.abs(found).max(0), bound)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.004, 0.01, 0.02, 0.05]), st.integers(1, 7))
def test_no_sequence_of_targets_exceeds_a_limit(seed, period, dof):
    rng = np.random.default_rng(seed)
    bounds = limits(dof, *rng.uniform([0.3, 1.0, 10.0], [4.0, 40.0, 1000.0]))
    motion = Motion(bounds, period)
    state = MotionState.rest(rng.uniform(bounds.low, bounds.high))
    seen, target = [state.position], state.position
    for _ in range(120):
        draw = rng.random()
        if draw < 0.2:
            target = rng.uniform(-3, 3, dof) * bounds.high
        elif draw < 0.25:
            target = rng.choice([-1e6, 1e6], dof)
        velocity = rng.uniform(-5, 5, dof) if rng.random() < 0.5 else None
        state = motion.brake(state) if rng.random() < 0.1 else motion.step(state, target, velocity)
        seen.append(state.position)
    assert_within(seen, bounds, period)
    while not state.is_resting:
        state = motion.brake(state)
        seen.append(state.position)
        assert len(seen) < 5000
    assert_within(seen, bounds, period)


def test_a_target_is_reached_and_kept():
    bounds = limits(3)
    motion, state = Motion(bounds, 0.02), MotionState.rest(np.zeros(3))
    target = np.array([0.3, -0.7, 1.2])
    for _ in range(150):
        state = motion.step(state, target)
    np.testing.assert_allclose(state.position, target, atol=1e-9)
    assert state.is_resting


def test_a_moving_target_is_followed_without_lag():
    """With the velocity of the target known, what is left is the start."""
    bounds = limits(1, velocity=2.0, acceleration=20.0, jerk=500.0, reach=2.0)
    motion, state, period = Motion(bounds, 0.01), MotionState.rest(np.zeros(1)), 0.01
    errors = []
    for k in range(200):
        t = (k + 1) * period
        where, speed = np.array([0.4 * np.sin(t)]), np.array([0.4 * np.cos(t)])
        state = motion.step(state, where, speed)
        errors.append(abs(state.position - where)[0])
    assert max(errors[60:]) < 4e-3


@given(st.floats(0.0, 3.0), st.floats(0.5, 50.0), st.floats(1.0, 2000.0))
def test_stopping_distance_is_that_of_the_trajectory(speed, acceleration, jerk):
    bounds = MotionLimits(
        low=np.array([-1e3]),
        high=np.array([1e3]),
        velocity=np.array([4.0]),
        acceleration=np.array([acceleration]),
        jerk=np.array([jerk]),
    )
    motion = Motion(bounds, 0.01)
    state = MotionState(position=np.zeros(1), velocity=np.array([speed]), acceleration=np.zeros(1))
    end = motion.stop(state)[-1][0]
    assert stopping_distance(np.array([speed]), bounds)[0] == pytest.approx(end, rel=1e-6, abs=1e-9)


def test_a_motion_that_begins_outside_is_led_back():
    bounds = limits(1)
    motion = Motion(bounds, 0.02)
    state = MotionState.rest(np.array([0.7]))  # the limit is 0.5
    far = state.position[0]
    for _ in range(100):
        state = motion.step(state, np.array([0.0]))
        assert state.position[0] <= far + 1e-9
        far = max(0.5, state.position[0])
    np.testing.assert_allclose(state.position, 0.0, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"velocity": [0.0, 1.0]}, "velocity limits above 0"),
        ({"jerk": [np.inf, 1.0]}, "finite jerk"),
        ({"acceleration": [np.nan, 1.0]}, "finite acceleration"),
        ({"low": [2.0, 0.0]}, "below high"),
        ({"high": [1.0]}, "finite high limit for each of 2"),
    ],
)
def test_limits_that_are_none_are_refused(change, complaint):
    good = {
        "low": [-1.0, -1.0],
        "high": [1.0, 1.0],
        "velocity": [1.0] * 2,
        "acceleration": [1.0] * 2,
        "jerk": [1.0] * 2,
    }
    with pytest.raises(RobotError, match=complaint):
        MotionLimits(**{k: np.array(v) for k, v in {**good, **change}.items()})


def test_limits_can_be_tightened_and_slowed_but_not_widened_or_written():
    own = limits(2)
    wide = MotionLimits(
        low=own.low * 9,
        high=own.high * 9,
        velocity=own.velocity * 9,
        acceleration=own.acceleration * 9,
        jerk=own.jerk * 9,
    )
    for name in ("low", "high", "velocity", "acceleration", "jerk"):
        np.testing.assert_array_equal(getattr(own.tightened(wide), name), getattr(own, name))
    half = own.scaled(0.5)
    np.testing.assert_allclose(half.velocity, own.velocity / 2)
    np.testing.assert_allclose(half.acceleration, own.acceleration / 4)
    np.testing.assert_allclose(half.jerk, own.jerk / 8)
    for speed in (0.0, 1.5, np.nan):
        with pytest.raises(RobotError, match="speed above 0"):
            own.scaled(speed)
    with pytest.raises(ValueError, match="read-only"):
        own.velocity[0] = 99.0
