"""Wilson's interval against SciPy's, means of groups' rates against what intervals must do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from brachium.policies.intervals import mean_of_rates, rate, wilson


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_scipys(counts):
    successes, episodes = counts
    low, high = wilson(successes, episodes)
    expected = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    assert low == pytest.approx(expected.low, abs=1e-9)
    assert high == pytest.approx(expected.high, abs=1e-9)
    assert 0.0 <= low <= high <= 1.0
    assert low - 1e-12 <= successes / episodes <= high + 1e-12


def test_nothing_is_known_without_episodes():
    assert wilson(0, 0) == (0.0, 1.0)
    assert rate(0, 0) == {"episodes": 0, "success": 0, "success_rate": 0.0, "ci95": [0.0, 1.0]}


def test_another_confidence():
    expected = binomtest(7, 20).proportion_ci(0.99, method="wilson")
    assert wilson(7, 20, z=2.5758293035489004) == pytest.approx((expected.low, expected.high))


def test_a_rate_carries_its_interval():
    assert rate(9, 10) == {"episodes": 10, "success": 9, "success_rate": 0.9, "ci95": [0.5958, 0.9821]}


def test_the_mean_of_one_group_is_its_rate():
    assert mean_of_rates([(7, 20)]) == pytest.approx((0.35, *wilson(7, 20)))


def test_every_group_counts_as_much_and_likes_share_their_doubt():
    mean, low, high = mean_of_rates([(280, 280), (0, 5)])
    assert mean == 0.5
    assert 0.0 < low < 0.5 < high < 1.0
    one, four = wilson(30, 60), mean_of_rates([(30, 60)] * 4)
    assert four[2] - four[1] == pytest.approx((one[1] - one[0]) / 2)


def test_the_truth_is_inside_as_often_as_promised():
    """Four groups like those of Meta-World's MT50, drawn 4000 times."""
    rng = np.random.default_rng(0)
    sizes, rates = (280, 110, 60, 50), (0.9, 0.75, 0.6, 0.3)
    draws = np.stack([rng.binomial(n, p, 4000) for n, p in zip(sizes, rates)], axis=1)
    found = [mean_of_rates(list(zip(draw.tolist(), sizes))) for draw in draws]
    inside = np.mean([low <= np.mean(rates) <= high for _, low, high in found])
    assert 0.94 < inside < 0.96
