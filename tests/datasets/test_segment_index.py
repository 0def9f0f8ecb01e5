"""Columns of all segments, their cache, and what is left where a segment is lost."""

import json
import multiprocessing
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.datasets import commitlog, segment_index
from brachium.datasets.episode_table import COLUMNS, EpisodeRecords, EpisodeTable
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.errors import StoreError

from .conftest import fill, make_schema, random_step


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A store whose columns are all kept."""
    monkeypatch.setattr(segment_index, "CACHE_SEGMENTS", 0)
    store = EpisodeStore.create(tmp_path / "s", make_schema(size=(8, 8)))
    fill(store, (2, 3, 1), profile="raw")
    return store.refresh()


def everything(store):
    return {
        **{field: store.lowdim(field).copy() for field in store.schema.fields},
        **{c: store.read_images(c, range(store.total_frames)) for c in store.embodiment.camera_names},
    }


def same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name])


def no_reading(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a segment was opened")

    monkeypatch.setattr(segment_index, "SegmentReader", refuse)


def folders(store, name):
    return sorted(p.name.partition("-")[0] for p in store.path.glob(f"cache/*/{name}/*"))


def test_columns_come_from_the_cache_and_grow(cached, monkeypatch):
    wanted = everything(cached)
    assert folders(cached, "state") == ["3"]
    with monkeypatch.context() as patch:
        no_reading(patch)
        again = cached.refresh()
        same({f: again.lowdim(f) for f in again.schema.fields}, {f: wanted[f] for f in again.schema.fields})
        same(everything(again), wanted)
        assert isinstance(again._index.lowdim("state").arrays["values"], np.memmap)
    fill(cached, (4,), seed=3, profile="raw")
    grown = cached.refresh()
    for name, value in everything(grown).items():
        np.testing.assert_array_equal(value[:6], wanted[name])
    assert folders(cached, "state") == ["4"]
    same(everything(cached), wanted)  # an older snapshot goes on
    then = EpisodeStore.open(cached.path, version=cached.version)
    same(everything(then), wanted)


@pytest.mark.parametrize("damage", ["note", "values", "short", "other"])
def test_a_torn_cache_is_made_again(cached, damage):
    wanted = everything(cached)
    [folder] = cached.path.glob("cache/*/state/*")
    if damage == "note":
        (folder / "note.json").write_text("{")
    elif damage == "values":
        (folder / "values.npy").write_bytes(b"")
    elif damage == "short":
        np.save(folder / "values.npy", np.zeros((2, 3), np.float32))
    else:
        note = json.loads((folder / "note.json").read_text())
        (folder / "note.json").write_text(json.dumps({**note, "segments": "0" * 32}))
    same(everything(cached.refresh()), wanted)


def test_presence_is_not_taken_from_another_order(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_index, "CACHE_SEGMENTS", 0)
    schema = replace(make_schema(size=(8, 8)), optional=("front", "wrist"))
    store = EpisodeStore.create(tmp_path / "s", schema)
    with EpisodeWriter(store, fsync=False) as writer:
        writer.begin("x")
        step = random_step(schema, np.random.default_rng(0))
        del step["images"]["wrist"]
        writer.step(**step)
        writer.end(True)
    assert store.refresh().lowdim("present").tolist() == [[True, False]]
    turned = store.refresh().set_schema(replace(schema, optional=("wrist", "front")))
    assert turned.lowdim("present").tolist() == [[False, True]]


def _read_in_a_child(store, queue):
    queue.put(store.read_images("front", range(6), threads=2).sum())


def test_a_store_in_another_process(cached):
    wanted = cached.read_images("front", range(6), threads=2).sum()  # the pool is there before the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_a_child, args=(cached, queue))
    child.start()
    assert queue.get(timeout=60) == wanted
    child.join()
    again = pickle.loads(pickle.dumps(cached))  # what a spawned process gets
    assert (again.version, again.embodiments) == (cached.version, cached.embodiments)
    assert again.read_images("front", range(6)).sum() == wanted


def test_a_cache_that_cannot_be_written_is_not_needed(tmp_path, cached):
    shutil.rmtree(cached.path / "cache", ignore_errors=True)
    (cached.path / "cache").write_text("in the way")
    assert everything(cached.refresh())["state"].shape == (6, 3)


def test_where_a_segment_is_lost_the_rest_is_read(cached):
    wanted = everything(cached)
    shutil.rmtree(cached.path / "cache")
    shutil.rmtree(cached.path / "segments" / cached.episodes[1].segment)
    store = cached.refresh()
    for read in (lambda: store.lowdim("state"), lambda: store.episode(1), lambda: store.read_images("front", [0, 3])):
        with pytest.raises(StoreError, match=r"damaged store.*episode 1\b"):
            read()
    np.testing.assert_array_equal(store.lowdim("state", [0, 2]), wanted["state"][[0, 1, 5]])
    np.testing.assert_array_equal(store.read_images("wrist", [5, 0]), wanted["wrist"][[5, 0]])
    assert store.episode(2).action.shape == (1, 2)
    assert not list(store.path.glob("cache/*/state/*"))  # what is incomplete is not kept


def test_a_shard_that_is_cut_short_names_its_episode(cached):
    shutil.rmtree(cached.path / "cache", ignore_errors=True)
    path = cached.path / "segments" / cached.episodes[1].segment / "images/front/c/0/0/0/0"
    path.write_bytes(path.read_bytes()[:-30])
    store = cached.refresh()
    with pytest.raises(StoreError, match=rf"frame index of .* \(step 2 of episode 1, {store.episodes[1].id}\)"):
        store.read_images("front", [4])
    store.read_images("front", [0, 1, 5])
    store.read_images("wrist", range(6))


def test_an_unknown_codec_is_named(cached):
    shutil.rmtree(cached.path / "cache", ignore_errors=True)
    path = cached.path / "segments" / cached.episodes[2].segment / "images/front/zarr.json"
    meta = json.loads(path.read_text())
    meta["codecs"][0]["configuration"]["codecs"][0] = {"name": "imagecodecs_jpegxl"}
    path.write_text(json.dumps(meta))
    with pytest.raises(StoreError, match=r"imagecodecs_jpegxl.*the direct reader does not know; zarr.open reads it"):
        cached.refresh().read_images("front", [5])


def test_the_episode_of_a_damaged_frame_is_named(cached):
    path = cached.path / "segments" / cached.episodes[1].segment / "images/front/c/0/0/0/0"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    store = cached.refresh()
    with pytest.raises(StoreError, match=rf"frame 0 in .* \(step 0 of episode 1, {store.episodes[1].id}\)"):
        store.read_images("front", [2])
    store.read_images("front", [0, 1, 3, 4, 5])


IDS = st.sampled_from([f"id{i}" for i in range(6)])
RECORD = st.builds(
    lambda i, n, words, tags: {
        "id": i,
        "start": 0,
        "length": n,
        "instruction": words,
        "success": [None, True, False][n % 3],
        "tags": tags,
    },
    IDS,
    st.integers(1, 9),
    st.text(max_size=3),
    st.lists(st.text(max_size=2), max_size=2),
)
EDIT = st.fixed_dictionaries(
    {},
    optional={"instruction": st.text(max_size=3), "success": st.sampled_from([None, True, False]), "tags": st.just([])},
)
STEP = st.one_of(
    st.tuples(st.just("add"), RECORD), st.tuples(st.just("remove"), IDS), st.tuples(st.just("edit"), IDS, EDIT)
)


@settings(max_examples=200, deadline=None)
@given(before=st.lists(STEP, max_size=12), after=st.lists(STEP, max_size=12))
def test_columns_say_what_a_dictionary_would(before, after):
    plain: dict[str, dict] = {}
    records = EpisodeRecords()
    for part in (before, after):
        for step in part:
            if step[0] == "add":
                plain.setdefault(step[1]["id"], {**step[1], "segment": "s"})
                records.add("s", step[1])
            elif step[0] == "remove":
                plain.pop(step[1], None)
                records.remove(step[1])
            else:
                if step[1] in plain:
                    plain[step[1]].update(step[2])
                records.edit(step[1], step[2])
        table = records.table()
        records = EpisodeRecords(table)
    assert table.records() == [{key: r[key] for key in COLUMNS.names} for r in plain.values()]
    assert table.texts("instruction") == [r["instruction"] for r in plain.values()]
    assert table.numbers("length").tolist() == [r["length"] for r in plain.values()]
    assert [table.record(i) for i in range(len(table))] == table.records()


def test_a_log_whose_segment_is_missing_is_damaged(cached):
    lost = {"id": "x", "start": 0, "length": 1, "instruction": "", "success": None, "tags": []}
    actions = [{"action": "add_episodes", "segment": "nowhere", "episodes": [lost]}]
    commitlog.commit(cached.path, actions, after=cached.version)
    with pytest.raises(StoreError, match="segment nowhere"):
        cached.refresh()


def test_an_empty_table():
    table = EpisodeTable.of(())
    assert (len(table), table.records(), table.coded("segment")[1]) == (0, [], [])
