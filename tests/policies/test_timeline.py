"""Chunks on a time axis against brute force."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from brachium.policies.executor import soft_mask
from brachium.policies.timeline import Timeline

H = 5


def rows(start):
    return start * 100.0 + np.arange(H, dtype=np.float32)[:, None]


@given(st.permutations(list(range(6))), st.floats(0.0, 12.0))
def test_order_of_arrival_does_not_matter(order, moment):
    starts = [0.0, 1.5, 2.0, 3.25, 7.0, 8.0]
    timeline = Timeline()
    for k in order:
        assert timeline.add(starts[k], rows(starts[k]))
        assert not timeline.add(starts[k], rows(99.0)), "a reply that comes twice counts once"
    found = [float(row[0]) for row in timeline.at(moment)]
    expected = [s * 100.0 + np.floor(moment - s + 1e-6) for s in starts if 0 <= np.floor(moment - s + 1e-6) < H]
    assert found == expected


def test_what_is_over_is_forgotten_and_the_plan_ahead_is_the_newest():
    timeline = Timeline()
    assert timeline.end == -np.inf
    assert timeline.ahead(0.0, H) is None
    timeline.add(0.0, rows(0.0))
    timeline.add(2.0, rows(2.0))
    assert timeline.end == 7.0
    ahead, real = timeline.ahead(4.0, H)
    assert real == 3
    np.testing.assert_array_equal(ahead[:, 0], [202.0, 203.0, 204.0, 204.0, 204.0])
    assert len(timeline.at(6.5)) == 1
    assert len(timeline.chunks) == 1
    assert timeline.at(7.0) == []
    assert timeline.ahead(7.0, H) is None


@given(st.floats(3.0, 7.4))
def test_a_smooth_plan_ahead_is_where_the_robot_will_be_when_each_step_is_over(start):
    timeline, line = Timeline(), np.array([3.0, 1.0, 4.0, 1.5, 9.0])
    timeline.add(3.0, line[:, None])
    found, real = timeline.ahead(start, H, smooth=True)
    ends = start + 1.0 + np.arange(H)
    np.testing.assert_allclose(found[:, 0], np.interp(ends, 4.0 + np.arange(H), line), atol=1e-9)
    assert real == timeline.ahead(start, H)[1]


@given(st.integers(1, 20), st.data())
def test_soft_mask_is_equation_5(horizon, data):
    frozen = data.draw(st.integers(0, horizon))
    overlap = data.draw(st.integers(0, horizon))
    got = soft_mask(horizon, frozen, overlap)
    frozen = min(frozen, overlap)
    for i in range(horizon):
        if i < frozen:
            expected = 1.0
        elif i < overlap:
            c = (overlap - i) / (overlap - frozen + 1)
            expected = c * (np.exp(c) - 1) / (np.e - 1)
        else:
            expected = 0.0
        assert abs(got[i] - expected) < 1e-6
    assert (np.diff(got) <= 1e-6).all()
