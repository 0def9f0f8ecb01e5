"""Windows against a brute-force loop over recorded steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.datasets.batch import collate
from brachium.datasets.store import EpisodeStore
from brachium.datasets.window import WindowDataset, WindowSpec
from brachium.errors import ConfigError, SpecMismatchError, StoreError
from brachium.spec import FeatureSpec

from .conftest import fill, make_schema

LENGTHS = (4, 1, 6, 2, 9)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    schema = make_schema(extras=(FeatureSpec(name="objects", shape=(2, 3)),), size=(8, 8))
    store = EpisodeStore.create(tmp_path_factory.mktemp("w") / "s", schema)
    return fill(store, LENGTHS, profile="raw", episodes_per_segment=2), store.refresh()


def brute_force(episodes, chosen, obs_horizon, action_horizon):
    """One dict a window, by the words of the docstring and nothing of the implementation."""
    windows = []
    for e in chosen:
        steps = episodes[e]
        for now in range(len(steps)):
            past = [now - k for k in reversed(range(obs_horizon))]
            future = [now + k for k in range(action_horizon)]
            windows.append(
                {
                    "front": [steps[max(k, 0)]["images"]["front"] for k in past],
                    "state": [steps[max(k, 0)]["state"] for k in past],
                    "objects": [steps[max(k, 0)]["extras"]["objects"] for k in past],
                    "action": [steps[min(k, len(steps) - 1)]["action"] for k in future],
                    "obs_pad": [k < 0 for k in past],
                    "action_pad": [k >= len(steps) for k in future],
                    "frame": [sum(LENGTHS[:e]) + max(k, 0) for k in past],
                    "instruction": f"task {e % 2}",
                    "episode": e,
                }
            )
    return windows


@settings(max_examples=60, deadline=None)
@given(
    obs_horizon=st.integers(1, 5),
    action_horizon=st.integers(1, 12),
    chosen=st.one_of(st.none(), st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True)),
    data=st.data(),
)
def test_windows_are_those_of_a_plain_loop(recorded, obs_horizon, action_horizon, chosen, data):
    episodes, store = recorded
    spec = WindowSpec(obs_horizon=obs_horizon, action_horizon=action_horizon, cameras=("front",), extras=("objects",))
    dataset = WindowDataset(store, spec, chosen, threads=data.draw(st.integers(1, 2)))
    expected = brute_force(episodes, range(5) if chosen is None else chosen, obs_horizon, action_horizon)
    assert len(dataset) == len(expected)
    indices = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=8))
    batch = dataset.batch(indices)
    assert len(batch) == len(indices)
    assert list(batch.images) == ["front"]
    np.testing.assert_array_equal(batch.images["front"], [expected[i]["front"] for i in indices])
    np.testing.assert_array_equal(batch.extras["objects"], [expected[i]["objects"] for i in indices])
    for key in ("state", "action", "obs_pad", "action_pad", "frame", "episode"):
        np.testing.assert_array_equal(getattr(batch, key), [expected[i][key] for i in indices], err_msg=key)
    assert batch.instruction == tuple(expected[i]["instruction"] for i in indices)


def test_dtypes_and_batches_without_images(recorded):
    dataset = WindowDataset(recorded[1], WindowSpec())
    batch = dataset.batch(np.arange(3), images=False)
    assert batch.images == {}
    assert (batch.state.dtype, batch.action.dtype) == (np.float32, np.float32)
    assert (batch.frame.dtype, batch.episode.dtype) == (np.int64, np.int64)
    assert batch.action.shape == (3, 8, 2)
    assert set(dataset.batch([0]).images) == {"front", "wrist"}
    assert len(dataset.batch([])) == 0


def test_collate_joins(recorded):
    dataset = WindowDataset(recorded[1], WindowSpec(obs_horizon=2, extras=("objects",)))
    whole = dataset.batch([3, 1, 4, 1, 5])
    joined = collate([dataset.batch([3, 1]), dataset.batch([4, 1, 5])])
    assert joined.instruction == whole.instruction
    for key in ("state", "action", "obs_pad", "action_pad", "frame", "episode"):
        np.testing.assert_array_equal(getattr(joined, key), getattr(whole, key))
    np.testing.assert_array_equal(joined.images["wrist"], whole.images["wrist"])
    with pytest.raises(StoreError, match="at least one"):
        collate([])
    with pytest.raises(StoreError, match="different cameras"):
        collate([whole, dataset.batch([0], images=False)])
    with pytest.raises(StoreError, match="different shapes"):
        collate([whole, WindowDataset(recorded[1], WindowSpec(obs_horizon=3, extras=("objects",))).batch([0])])


def test_bad_requests(recorded, tmp_path):
    store = recorded[1]
    with pytest.raises(ConfigError, match="horizons of at least 1"):
        WindowSpec(obs_horizon=0)
    with pytest.raises(SpecMismatchError, match="Did you mean 'front'"):
        WindowDataset(store, WindowSpec(cameras=("frnt",)))
    with pytest.raises(SpecMismatchError, match="Did you mean 'objects'"):
        WindowDataset(store, WindowSpec(extras=("object",)))
    with pytest.raises(StoreError, match="5 episodes"):
        WindowDataset(store, WindowSpec(), [5])
    with pytest.raises(StoreError, match="window indices from 0 to 21"):
        WindowDataset(store, WindowSpec()).batch([22])
    with pytest.raises(StoreError, match="no steps to train on"):
        WindowDataset(EpisodeStore.create(tmp_path / "empty", make_schema()), WindowSpec())
