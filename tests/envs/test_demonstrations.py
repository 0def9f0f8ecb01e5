"""What comes between an expert and its arm: how large, how long, and nothing where nothing is asked for."""

from itertools import pairwise

import numpy as np
import pytest

from brachium.envs.demonstrations import Disturbable, Disturbances

STEPS = 400
UNIT = np.array([0.2, 0.1, 0.0])


def difference(seed, *, pace=1, noise=0.0, drop=0.0, stumble=0.0):
    """Executed less asked for (steps, 3), of an expert that never moves and keeps its gripper closed."""
    what = Disturbable(unit=UNIT, absolute=True, opened=1.0, closed=0.0, pace=pace)
    found = Disturbances(what, np.random.default_rng(seed), noise, 1.0, drop, stumble)
    return np.stack([found.executed(t, np.zeros(3)) for t in range(STEPS)])


def runs(mask):
    """(begin, length) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("pace", [1, 5])
def test_nothing_disturbs_where_nothing_is_asked_for(pace):
    assert not difference(0, pace=pace).any()


@pytest.mark.parametrize("pace", [1, 5])
def test_noise_has_its_size_and_is_held_for_one_pace(pace):
    found = difference(1, pace=pace, noise=0.5)
    assert not found[:, 2].any()
    drawn = found[::pace]
    np.testing.assert_array_equal(np.repeat(drawn, pace, axis=0), found)
    assert all((a[:2] != b[:2]).all() for a, b in pairwise(drawn))
    many = np.concatenate([difference(k, pace=pace, noise=0.5) for k in range(20)])
    np.testing.assert_allclose(many.std(0), 0.5 * UNIT, rtol=0.1, atol=0)


@pytest.mark.parametrize("pace", [1, 5])
@pytest.mark.parametrize("seed", range(5))
def test_the_gripper_opens_once_for_two_tenths_of_a_second(pace, seed):
    ((begin, length),) = runs(difference(seed, pace=pace, drop=1.0)[:, 2] == 1.0)
    assert length == 2 * pace
    assert 4 * pace <= begin < 20 * pace


@pytest.mark.parametrize("seed", range(5))
def test_an_arm_goes_astray_as_far_at_every_pace_and_as_long_in_seconds(seed):
    fast, slow = difference(seed, stumble=1.0), difference(seed, pace=5, stumble=1.0)
    np.testing.assert_array_equal(np.repeat(fast, 5, axis=0)[:STEPS], slow)
    found = runs((slow[:, :2] != 0.0).any(1))
    assert found
    assert all(10 <= begin < 150 + 30 and 10 <= length <= 50 and length % 5 == 0 for begin, length in found)
    assert (np.abs(slow[:, :2]) <= UNIT[:2] + 1e-7).all()
