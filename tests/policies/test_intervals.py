"""Wilson's interval against SciPy's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from brachium.policies.intervals import rate, wilson


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
