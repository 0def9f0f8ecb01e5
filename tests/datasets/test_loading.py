"""The stateless sampler and the prefetching loader."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.datasets.batch_reader import BatchReader, PixelScale
from brachium.datasets.loader import BatchLoader
from brachium.datasets.sampler import ShuffledSampler
from brachium.datasets.store import EpisodeStore
from brachium.datasets.window import WindowDataset, WindowSpec
from brachium.datasets.writer import EpisodeWriter
from brachium.errors import ConfigError, SpecMismatchError
from brachium.spec import FeatureSpec

from .conftest import make_schema, random_step


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 200), data=st.data(), seed=st.integers(0, 2**40))
def test_an_epoch_repeats_nothing_and_resumes(size, data, seed):
    batch_size = data.draw(st.integers(1, size))
    sampler = ShuffledSampler(size, batch_size, seed)
    steps = sampler.steps_per_epoch
    assert steps == size // batch_size
    for epoch in range(2):
        drawn = np.concatenate([sampler.batch(epoch * steps + i) for i in range(steps)])
        assert drawn.dtype == np.int64
        assert len(np.unique(drawn)) == len(drawn) == steps * batch_size
        assert drawn.min() >= 0
        assert drawn.max() < size
    step = data.draw(st.integers(0, 5 * steps))
    np.testing.assert_array_equal(ShuffledSampler(size, batch_size, seed).batch(step), sampler.batch(step))
    assert sampler.epoch(step) == step // steps


def test_seeds_and_epochs_differ():
    a, b = ShuffledSampler(1000, 1000, 0), ShuffledSampler(1000, 1000, 1)
    assert not np.array_equal(a.batch(0), b.batch(0))
    assert not np.array_equal(a.batch(0), a.batch(1))
    first = a.batch(0)
    first[:] = 0
    assert a.batch(0).any()


def test_the_dropped_rest_changes():
    sampler = ShuffledSampler(10, 4, 0)
    rests = [set(range(10)) - set(np.concatenate([sampler.batch(2 * e), sampler.batch(2 * e + 1)])) for e in range(6)]
    assert len({tuple(sorted(r)) for r in rests}) > 1


@pytest.mark.parametrize(("size", "batch", "seed"), [(3, 4, 0), (0, 1, 0), (3, 0, 0), (3, 1, -1)])
def test_sampler_refusals(size, batch, seed):
    with pytest.raises(ConfigError):
        ShuffledSampler(size, batch, seed)
    with pytest.raises(ConfigError, match="step from 0"):
        ShuffledSampler(3, 1, 0).batch(-1)


@pytest.mark.parametrize("threads", [1, 3])
def test_loader_keeps_the_order(threads):
    def fn(step):
        time.sleep(0.001 * (step % 3))
        return step

    with BatchLoader(fn, 5, 20, threads=threads) as loader:
        assert list(loader) == list(range(5, 25))
        assert loader.wait_s >= 0
        assert list(loader) == []


def test_loader_computes_ahead_but_not_too_far():
    called = []
    release = threading.Event()

    def fn(step):
        called.append(step)
        release.wait(5)
        return step

    with BatchLoader(fn, 0, None, threads=2, prefetch=3) as loader:
        time.sleep(0.05)
        assert len(called) == 2
        release.set()
        assert next(loader) == 0
        time.sleep(0.05)
        assert max(called) <= 3


def test_wait_counts_a_slow_producer_and_not_the_first_batch():
    with BatchLoader(lambda step: time.sleep(0.03), 0, 4, prefetch=1) as loader:
        next(loader)
        assert loader.wait_s == 0.0
        list(loader)
    assert 0.06 < loader.wait_s < 1.0


def test_an_error_in_a_worker_arrives_and_closes():
    def fn(step):
        if step == 3:
            raise ValueError("bad frame")
        return step

    before = threading.active_count()
    loader = BatchLoader(fn, 0, 100, threads=2)
    with pytest.raises(ValueError, match="bad frame"):
        list(loader)
    assert threading.active_count() == before
    assert list(loader) == []


def test_leaving_early_stops_the_threads():
    before = threading.active_count()

    def run():
        with BatchLoader(lambda step: step, 0, None, threads=2) as loader:
            for step in loader:
                if step == 4:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert threading.active_count() == before


def test_loader_refusals():
    for bad in ({"threads": 0}, {"prefetch": 0}, {"start_step": -1}, {"num_steps": -1}):
        with pytest.raises(ConfigError):
            BatchLoader(**{"fn": int, "start_step": 0, "num_steps": 1, **bad})


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (2, 3), (3, 1)])
def test_batches_in_buffers_that_are_used_again(tmp_path, threads, prefetch):
    depth = FeatureSpec(name="depth", shape=(4, 4, 1), dtype="uint16")
    schema = replace(make_schema(size=(8, 8)), maps=(depth,))
    store = EpisodeStore.create(tmp_path / "s", schema)
    rng = np.random.default_rng(0)
    with EpisodeWriter(store, fsync=False) as writer:
        writer.begin("x")
        for _ in range(23):
            step = random_step(schema, rng)
            step["images"]["depth"] = rng.integers(0, 99, (4, 4, 1), dtype=np.uint16)
            writer.step(**step)
        writer.end(True)
    spec = WindowSpec(obs_horizon=2, maps=("depth",), offsets={"wrist": (0,)})
    windows = WindowDataset(store.refresh(), spec)
    sampler = ShuffledSampler(len(windows), 5, seed=0)
    addresses = set()
    with BatchReader(windows, sampler.batch, start=3, steps=20, threads=threads, prefetch=prefetch) as reader:
        for step, batch in enumerate(reader, start=3):
            wanted = windows.batch(sampler.batch(step))
            np.testing.assert_array_equal(batch.frame, wanted.frame)
            for name, value in wanted.images.items():
                np.testing.assert_array_equal(batch.images[name], value)
            addresses.add(batch.images["front"].ctypes.data)
    assert step == 22
    assert len(addresses) == max(threads, prefetch) + 1
    assert reader.wait_s >= 0
    with pytest.raises(ConfigError, match="at least 1"):
        BatchReader(windows, sampler.batch, threads=0)
    with pytest.raises(SpecMismatchError, match="out: expected"):
        windows.batch([0, 1], out={name: np.empty(*about) for name, about in windows.buffers(1).items()})


@pytest.mark.parametrize(
    ("mean", "std"), [(0.5, 0.25), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (0.1, (1, 2, 3))]
)
def test_pixels_become_floats(mean, std):
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 6, 3), dtype=np.uint8)
    out = np.full(images.shape, np.nan, np.float32)
    assert PixelScale(mean, std)(images, out) is out
    np.testing.assert_allclose(out, (images / 255 - np.array(mean)) / np.array(std), rtol=1e-6, atol=1e-6)
    with pytest.raises(ConfigError, match="above 0"):
        PixelScale(0, 0)


def test_batches_of_floats(tmp_path):
    depth = FeatureSpec(name="depth", shape=(4, 4, 1), dtype="uint16")
    schema = replace(make_schema(size=(8, 8)), maps=(depth,))
    store = EpisodeStore.create(tmp_path / "s", schema)
    with EpisodeWriter(store, fsync=False) as writer:
        writer.begin("x")
        for t in range(9):
            step = random_step(schema, np.random.default_rng(t))
            step["images"]["depth"] = np.full((4, 4, 1), t, np.uint16)
            writer.step(**step)
        writer.end(True)
    windows = WindowDataset(store.refresh(), WindowSpec(maps=("depth",)))
    sampler = ShuffledSampler(9, 3, seed=0)
    with BatchReader(windows, sampler.batch, steps=6, scale=PixelScale(0.5, 0.5), threads=2) as reader:
        for step, batch in enumerate(reader):
            wanted = windows.batch(sampler.batch(step))
            assert batch.images["front"].dtype == np.float32
            np.testing.assert_allclose(batch.images["front"], wanted.images["front"] / 127.5 - 1, atol=1e-6)
            np.testing.assert_array_equal(batch.images["depth"], wanted.images["depth"])
