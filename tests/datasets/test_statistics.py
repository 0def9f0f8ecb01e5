"""Statistics against numpy on all the data, and normalizers against their inverse."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from brachium.datasets.normalize import MODES, Normalizer
from brachium.datasets.split import is_heldout, side
from brachium.datasets.statistics import FieldStatistics, Moments, Statistics, compute_statistics, field_statistics
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.errors import ConfigError, SpecMismatchError, StoreError

from .conftest import make_schema, random_step

ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 30), st.just(3)),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


def statistics_of(values):
    return field_statistics([np.asarray(values)])


def test_statistics_are_those_of_numpy(filled):
    store, _ = filled
    for episodes in (None, [2], [0, 2]):
        stats = compute_statistics(store, episodes)
        for field in ("state", "action"):
            x = store.lowdim(field, episodes).astype(np.float64)
            got = stats[field]
            assert got.count == len(x)
            np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-12)
            np.testing.assert_allclose(got.std, x.std(0), rtol=1e-12)
            np.testing.assert_array_equal(got.min, x.min(0))
            np.testing.assert_array_equal(got.max, x.max(0))
            np.testing.assert_array_equal(got.q01, np.quantile(x, 0.01, axis=0))
            np.testing.assert_array_equal(got.q99, np.quantile(x, 0.99, axis=0))
    assert compute_statistics(store, fields=["objects"])["objects"].dim == 6


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(ROWS, min_size=1, max_size=5))
def test_merged_moments_are_those_of_the_whole(parts):
    whole = np.concatenate(parts).astype(np.float64)
    merged = Moments.of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(Moments.of(part))
    np.testing.assert_allclose(merged.mean, whole.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(merged.std, whole.std(0), rtol=1e-6, atol=1e-6)
    assert merged.count == len(whole)


def test_no_cancellation_far_from_zero():
    x = 1e9 + np.random.default_rng(0).standard_normal((1000, 1))
    got = field_statistics([x[:10], x[10:500], x[500:]])
    np.testing.assert_allclose(got.std, x.std(0), rtol=1e-6)


def test_statistics_survive_json(filled):
    stats = compute_statistics(filled[0])
    again = Statistics.from_dict(json.loads(json.dumps(stats.to_dict())))
    np.testing.assert_array_equal(again["state"].q99, stats["state"].q99)
    assert again.to_dict() == stats.to_dict()
    with pytest.raises(SpecMismatchError, match="Did you mean 'action'"):
        again["acton"]
    with pytest.raises(SpecMismatchError, match=r"missing \['q01', 'q99'\]"):
        FieldStatistics.from_dict({k: v for k, v in stats["state"].to_dict().items() if k[0] != "q"})


def test_statistics_refuse_nan_and_nothing(tmp_path):
    store = EpisodeStore.create(tmp_path / "s", make_schema())
    with pytest.raises(StoreError, match="no episodes"):
        compute_statistics(store)
    with EpisodeWriter(store, fsync=False, checked=False) as writer:
        writer.begin("x")
        step = random_step(store.schema, np.random.default_rng(0))
        writer.step(**step)
        writer.step(**{**step, "state": np.array([0, np.nan, 0], np.float32)})
        writer.end(True)
    with pytest.raises(StoreError, match=r"state\[1\] is nan at step 1 of episode 0"):
        compute_statistics(store.refresh())


@settings(max_examples=100, deadline=None)
@given(data=ROWS, mode=st.sampled_from(MODES), x=ROWS)
def test_unnormalize_undoes_normalize(data, mode, x):
    normalizer = Normalizer(mode=mode, statistics=statistics_of(data))
    x = x.astype(np.float64)
    assert (normalizer.scale > 0).all()
    span = np.abs(x).max() + np.abs(data).max() + 1
    np.testing.assert_allclose(normalizer.unnormalize(normalizer.normalize(x)), x, rtol=1e-9, atol=1e-9 * span)
    np.testing.assert_allclose(normalizer.normalize(normalizer.unnormalize(x)), x, rtol=1e-6, atol=1e-5 * span)
    again = Normalizer.from_dict(json.loads(json.dumps(normalizer.to_dict())))
    np.testing.assert_array_equal(again.normalize(x), normalizer.normalize(x))


def test_what_the_modes_mean():
    x = np.random.default_rng(0).normal([0, 5, -3], [1, 0.1, 20], (5000, 3))
    stats = statistics_of(x)
    y = Normalizer(mode="mean_std", statistics=stats).normalize(x)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(y.std(0), 1)
    y = Normalizer(mode="min_max", statistics=stats).normalize(x)
    np.testing.assert_allclose([y.min(0), y.max(0)], [[-1] * 3, [1] * 3])
    y = Normalizer(mode="quantile", statistics=stats).normalize(x)
    np.testing.assert_allclose(np.quantile(y, [0.01, 0.99], axis=0), [[-1] * 3, [1] * 3], rtol=1e-6)
    assert y.max() > 1
    clipped = Normalizer(mode="quantile", statistics=stats, clip=True).normalize(x)
    np.testing.assert_allclose(clipped, np.clip(y, -1, 1))


@pytest.mark.parametrize("mode", MODES)
def test_constant_dimensions_and_grippers(mode):
    x = np.zeros((1000, 3), np.float32)
    x[:, 0] = 0.1  # constant, and no round number in float32
    x[:3, 1] = 1.0  # a gripper open in 0.3 % of the steps: both quantiles are 0
    x[:, 2] = 1e6
    normalizer = Normalizer(mode=mode, statistics=statistics_of(x))
    assert normalizer.scale[0] == normalizer.scale[2] == 1.0
    y = normalizer.normalize(x)
    np.testing.assert_allclose(y[:, [0, 2]], 0, atol=1e-6)
    assert y.dtype == np.float32
    assert np.abs(y[:, 1]).max() < 20
    if mode != "mean_std":
        assert set(y[:, 1]) == {-1.0, 1.0}
    np.testing.assert_allclose(normalizer.unnormalize(y), x, rtol=1e-6, atol=1e-6)


def test_normalizer_refusals():
    stats = statistics_of(np.eye(3))
    with pytest.raises(ConfigError, match="Did you mean 'quantile'"):
        Normalizer(mode="quantiles", statistics=stats)
    for missing in (None, {}, Statistics(fields={"state": stats})):
        with pytest.raises(SpecMismatchError, match="FieldStatistics of one field"):
            Normalizer(mode="min_max", statistics=missing)
    with pytest.raises(SpecMismatchError, match="these have none"):
        Normalizer.from_dict({"mode": "min_max"})
    for x in (np.zeros((2, 4)), np.float32(1)):
        with pytest.raises(SpecMismatchError, match=r"\(..., 3\)"):
            Normalizer(mode="min_max", statistics=stats).normalize(x)


def test_sides_are_stable_and_keep_their_shares():
    keys = [f"episode {k}" for k in range(4000)]
    shares = {"train": 0.7, "test": 0.3, "none": 0.0}
    sides = {key: side(key, shares, seed=0) for key in keys}
    assert {key: side(key, shares, seed=0) for key in reversed(keys)} == sides
    counts = Counter(sides.values())
    assert set(counts) == {"train", "test"}
    assert abs(counts["test"] - 1200) < 4 * (4000 * 0.3 * 0.7) ** 0.5
    assert [side(key, shares, seed=1) for key in keys] != list(sides.values())
    for key in keys[:200]:  # the share that is named last is the held-out one of a fraction
        assert is_heldout(key, 0.3, 5) == (side(key, {"heldout": 0.3, "train": 0.7}, 5) == "heldout")
    assert {side(key, {"all": 1.0}, 0) for key in keys} == {"all"}
