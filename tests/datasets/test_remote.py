"""A store on an object store: what comes is what is there, in few requests, in a fixed order, through failures."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from brachium.datasets import remote as module
from brachium.datasets.remote import RemoteStore, object_store
from brachium.datasets.store import EpisodeStore
from brachium.datasets.streamer import BlockStreamer, _order
from brachium.datasets.window import WindowDataset, WindowSpec
from brachium.datasets.writer import EpisodeWriter
from brachium.errors import ConfigError, NotFoundError, StoreError
from brachium.spec import FeatureSpec

from .conftest import make_schema, random_step, serve

obstore = pytest.importorskip("obstore", reason="type: uv pip install obstore")
LENGTHS = (40, 3, 25, 17, 33, 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    depth = FeatureSpec(name="depth", shape=(4, 4, 1), dtype="uint16")
    schema = replace(make_schema(size=(8, 12)), maps=(depth,), optional=("depth",))
    store = EpisodeStore.create(tmp_path_factory.mktemp("remote") / "s", schema)
    rng = np.random.default_rng(0)
    with EpisodeWriter(store, fsync=False, episodes_per_segment=4) as writer:
        for number, length in enumerate(LENGTHS):
            writer.begin(f"task {number}")
            for t in range(length):
                step = random_step(schema, rng)
                if t % 3 == 0:
                    step["images"]["depth"] = rng.integers(0, 99, (4, 4, 1), dtype=np.uint16)
                writer.step(**step)
            writer.end(True)
    return store.refresh()


@pytest.fixture(scope="module")
def address(store):
    with serve(store.path) as found:
        yield found


@pytest.fixture
def memory(store):
    objects = obstore.store.MemoryStore()
    for path in store.path.rglob("*"):
        if path.is_file() and "cache" not in path.parts:
            obstore.put(objects, str(path.relative_to(store.path)), path.read_bytes())
    return objects


SPEC = WindowSpec(obs_horizon=2, action_horizon=3, maps=("depth",))


def check(batch, windows, store):
    """A streamed batch is the batch that the local store gives for the same windows."""
    chosen = [int(np.flatnonzero(windows._frames == f)[0]) for f in batch.frame[:, -1]]
    wanted = windows.batch(chosen)
    for name, value in vars(wanted).items():
        got = getattr(batch, name)
        if isinstance(value, dict):
            assert value.keys() == got.keys()
            for key in value:
                np.testing.assert_array_equal(got[key], value[key])
        else:
            np.testing.assert_array_equal(got, value)
    return chosen


@pytest.mark.parametrize("where", ["memory", "http"])
def test_what_is_streamed_is_what_is_there(store, memory, address, tmp_path, where):
    objects = memory if where == "memory" else object_store(address[0])
    remote = RemoteStore(objects, tmp_path / "skeleton")
    assert remote.store.episodes == store.episodes
    assert remote.store.fingerprint == store.fingerprint
    windows = WindowDataset(store, SPEC)
    seen: Counter = Counter()
    with BlockStreamer(remote, SPEC, batch_size=17, block=8, buffer=40, in_flight=3) as stream:
        for _ in range(2 * len(windows) // 17):
            seen.update(check(next(stream), windows, store))
    assert max(seen.values()) <= 3
    assert len(seen) > 0.9 * len(windows)  # the rest of the second epoch waits in the buffer
    remote.close()


def test_a_stream_that_begins_later_is_the_rest(store, memory, tmp_path):
    remote = RemoteStore(memory, tmp_path / "skeleton")
    options = {"batch_size": 8, "block": 4, "buffer": 30, "seed": 3}
    with BlockStreamer(remote, SPEC, **options) as stream:
        whole = [next(stream).frame for _ in range(30)]
    with BlockStreamer(remote, SPEC, **options, first=13) as stream:
        for k in range(13, 30):
            np.testing.assert_array_equal(next(stream).frame, whole[k])
    other = BlockStreamer(remote, SPEC, **{**options, "seed": 4})
    assert not np.array_equal(next(other).frame, whole[0])
    other.close()
    remote.close()


def test_the_order_has_every_window_once_an_epoch():
    sizes = [4, 1, 7, 3]
    order = _order(4, sizes, 6, seed=0)
    drawn = [next(order)[1] for _ in range(15 * 40)]
    assert len(set(drawn)) == len(drawn)
    counts = Counter((visit % 4, place) for visit, place in drawn)
    assert set(counts) == {(b, p) for b, n in enumerate(sizes) for p in range(n)}
    assert max(counts.values()) - min(counts.values()) <= 2


def test_few_requests(store, memory, tmp_path):
    """A block of sixteen steps is one range a picture."""
    remote = RemoteStore(memory, tmp_path / "skeleton")
    spec = WindowSpec(action_horizon=4)
    stream = BlockStreamer(remote, spec, batch_size=8, block=16, buffer=32)
    before, blocks = remote.requests, len(stream._blocks)
    for _ in range(40):
        next(stream)
    stream.close()
    remote.close()
    visits = 2 + -(-40 * 8 // (sum(LENGTHS) / blocks))
    assert remote.requests - before <= 2 * (visits + 32)
    assert blocks == sum(sum(some) // 16 for some in (LENGTHS[:4], LENGTHS[4:]))  # episodes share, segments do not
    sizes = [stop - start for start, stop in stream._blocks]
    assert sum(sizes) == sum(LENGTHS)
    assert all(16 <= n < 32 for n in sizes)


def test_the_skeleton_is_not_fetched_twice(memory, tmp_path):
    first = RemoteStore(memory, tmp_path / "skeleton")
    BlockStreamer(first, SPEC, batch_size=1).close()
    again = RemoteStore(memory, tmp_path / "skeleton")
    BlockStreamer(again, SPEC, batch_size=1).close()
    assert again.requests < first.requests / 2


def test_failures_that_pass_are_lived_through(address, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    url, handler = address
    handler.failing = 2
    remote = RemoteStore(object_store(url), tmp_path / "skeleton")
    assert remote.store.num_episodes == len(LENGTHS)
    remote.close()


def test_what_is_not_there_or_broken(store, memory, tmp_path):
    with pytest.raises(NotFoundError, match="no episode store there"):
        RemoteStore(obstore.store.MemoryStore(), tmp_path / "a")
    with pytest.raises(StoreError, match="cannot open nope"):
        object_store("nope://x")
    segment = store.episodes[0].segment
    path = f"segments/{segment}/images/front/c/0/0/0/0"
    data = bytearray((store.path / path).read_bytes())
    data[40] ^= 1
    obstore.put(memory, path, bytes(data))
    remote = RemoteStore(memory, tmp_path / "b")

    def all_of_it():
        with BlockStreamer(remote, WindowSpec(), batch_size=64, buffer=200) as stream:
            for _ in range(9):
                next(stream)

    with pytest.raises(StoreError, match="front, frame 0: does not fit its checksum"):
        all_of_it()
    obstore.delete(memory, path)
    with pytest.raises(StoreError, match="is missing"):
        all_of_it()
    with pytest.raises(ConfigError, match="at least 1"):
        BlockStreamer(remote, WindowSpec(), batch_size=0)
    remote.close()
