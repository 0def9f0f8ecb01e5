"""The mixture against counting: shares, epochs without repetition, and one order for everybody."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from brachium.datasets.mixture import MixtureSampler, WindowMixture
from brachium.datasets.store import EpisodeStore
from brachium.datasets.window import WindowDataset, WindowSpec
from brachium.errors import ConfigError

from .conftest import fill, make_schema

SOURCES = st.lists(st.tuples(st.integers(1, 3000), st.floats(0.1, 50)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(sources=SOURCES, seed=st.integers(0, 2**40), data=st.data())
def test_shares_epochs_and_order(sources, seed, data):
    sizes, weights = zip(*sources)
    sampler = MixtureSampler(sizes, weights, seed)
    total = data.draw(st.integers(1, 2 * sampler.block + 99))
    source, window = sampler.draws(0, total)
    shares = np.array(weights) / sum(weights)
    for s, size in enumerate(sizes):
        # whole blocks hold the share to within a draw at each end; a begun one is shuffled
        whole = total // sampler.block * sampler.block
        assert abs((source[:whole] == s).sum() - shares[s] * whole) <= 2
        # no epoch has a window twice; epochs follow each other inside blocks that are shuffled
        drawn = Counter(window[:whole][source[:whole] == s].tolist())
        if drawn:
            assert set(drawn) <= set(range(size))
            assert max(drawn.values()) - min(drawn[k] for k in range(size)) <= 1
    # any way to cut the sequence gives the sequence
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=6))})
    again = MixtureSampler(sizes, weights, seed)
    parts = [again.draws(a, b - a) for a, b in reversed(list(pairwise(cuts)))][::-1]
    np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), source)
    np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), window)


def test_shares_within_a_thousandth():
    sampler = MixtureSampler([50_000, 70_000, 900], [0.5, 0.4, 0.1], seed=3)
    source, _ = sampler.draws(123_456, 200_000)
    np.testing.assert_allclose(np.bincount(source) / 200_000, [0.5, 0.4, 0.1], rtol=1e-3)


def test_a_source_of_no_weight_is_never_drawn():
    sampler = MixtureSampler([5, 4, 5], [0, 1, 0], 0)
    source, window = sampler.draws(0, sampler.block)
    assert set(source) == {1}
    assert Counter(window.tolist()) == dict.fromkeys(range(4), sampler.block // 4)


def test_the_order_is_random():
    """Of one source: no correlation of places, uniform neighbours, other orders in other epochs and for other seeds."""
    size = 10_000
    orders = [MixtureSampler([size], [1.0], seed).draws(start, size)[1] for seed in (0, 1) for start in (0, size)]
    for order in orders:
        assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.04
        steps = np.diff(order) % size
        assert stats.kstest(steps / size, "uniform").pvalue > 1e-4
    for a in range(4):
        for b in range(a):
            assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 0.04


@pytest.mark.parametrize(
    ("sizes", "weights", "seed"),
    [
        ([], [], 0),
        ([3], [1, 1], 0),
        ([0], [1], 0),
        ([3], [0], 0),
        ([3], [-1], 0),
        ([3], [float("nan")], 0),
        ([3], [1], -1),
    ],
)
def test_mixtures_of_nothing(sizes, weights, seed):
    with pytest.raises(ConfigError):
        MixtureSampler(sizes, weights, seed)
    with pytest.raises(ConfigError):
        MixtureSampler([1], [1], 0).draws(-1, 2)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    datasets = {}
    for number, (name, lengths) in enumerate({"lab": (7, 9), "home": (5,)}.items()):
        store = EpisodeStore.create(folder / name, make_schema(size=(8, 8)))
        fill(store, lengths, seed=number, profile="raw")
        datasets[name] = WindowDataset(store.refresh(), WindowSpec(action_horizon=2))
    return datasets


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ranks_together_have_the_batch(mixed, world_size):
    mixture = WindowMixture(mixed, {"lab": 1, "home": 3}, batch_size=8, seed=5)
    for step in (0, 1, 700):
        source, window = mixture.sampler.draws(8 * step, 8)
        parts = [mixture.batch(step, rank, world_size) for rank in range(world_size)]
        for number, (name, dataset) in enumerate(mixed.items()):
            frames = [p[name].frame[:, 0] for p in parts if name in p]
            wanted = dataset._frames[window[source == number]]
            np.testing.assert_array_equal(np.concatenate([np.zeros(0, int), *frames]), wanted)
            for part in parts:
                if name in part:
                    got = part[name]
                    np.testing.assert_array_equal(got.state[:, 0], dataset.store.lowdim("state")[got.frame[:, 0]])


def test_without_weights_every_window_counts_the_same(mixed):
    mixture = WindowMixture(mixed, batch_size=7)
    assert mixture.sampler.shares == (16 / 21, 5 / 21)
    for options, words in (({"weights": {"lab": 1}}, "a weight for each"), ({"batch_size": 0}, "batch_size")):
        with pytest.raises(ConfigError, match=words):
            WindowMixture(mixed, **{"batch_size": 7, **options})
    with pytest.raises(ConfigError, match="divides"):
        mixture.batch(0, 0, 2)
