"""What comes between an expert and its arm: how large, how long, and nothing where nothing is asked for."""

import numpy as np
import pytest

from brachium.envs.demonstrations import Disturbable, Disturbances

STEPS = 400
UNIT = np.array([0.2, 0.1, 0.0])


def difference(seed, *, noise=0.0, drop=0.0, stumble=0.0):
    """Executed less asked for (steps, 3), of an expert that never moves and keeps its gripper closed."""
    what = Disturbable(unit=UNIT, absolute=True, opened=1.0, closed=0.0)
    found = Disturbances(what, np.random.default_rng(seed), noise, 1.0, drop, stumble)
    return np.stack([found.executed(t, np.zeros(3)) for t in range(STEPS)])


def runs(mask):
    """(begin, length) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_nothing_disturbs_where_nothing_is_asked_for():
    assert not difference(0).any()


def test_noise_has_its_size_and_spares_the_gripper():
    many = np.concatenate([difference(k, noise=0.5) for k in range(20)])
    assert not many[:, 2].any()
    np.testing.assert_allclose(many.std(0), 0.5 * UNIT, rtol=0.05, atol=0)
    assert abs(np.corrcoef(many[1:, 0], many[:-1, 0])[0, 1]) < 0.05  # anew at every step


@pytest.mark.parametrize("seed", range(5))
def test_the_gripper_opens_once_for_two_steps(seed):
    ((begin, length),) = runs(difference(seed, drop=1.0)[:, 2] == 1.0)
    assert length == 2
    assert 4 <= begin < 20


@pytest.mark.parametrize("seed", range(5))
def test_an_arm_goes_astray_for_a_few_steps_and_no_farther_than_asked(seed):
    found = difference(seed, stumble=1.0)
    times = runs((found[:, :2] != 0.0).any(1))
    assert times
    assert all(2 <= begin < 30 + 5 and 2 <= length <= 10 for begin, length in times)
    assert (np.abs(found[:, :2]) <= UNIT[:2] + 1e-7).all()
