"""The store against what was recorded, against zarr-python, and against damage."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import zarr

from brachium.datasets import commitlog, layout
from brachium.datasets.image import PROFILES, image_profile
from brachium.datasets.schema import StoreSchema
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.errors import ConfigError, NotFoundError, SpecMismatchError, StoreError
from brachium.spec import FeatureSpec

from .conftest import fill, make_schema, random_step


def test_everything_recorded_comes_back(filled):
    store, given = filled
    assert [e.length for e in store.episodes] == [4, 1, 6]
    assert store.total_frames == 11
    assert store.offsets.tolist() == [0, 4, 5, 11]
    assert [e.success for e in store.episodes] == [True, False, None]
    assert [e.meta for e in store.episodes] == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    assert [e.index for e in store.episodes] == [0, 1, 2]
    assert len({e.segment for e in store.episodes}) == 2
    steps = [step for episode in given for step in episode]
    np.testing.assert_array_equal(store.lowdim("state"), [s["state"] for s in steps])
    np.testing.assert_array_equal(store.lowdim("action"), [s["action"] for s in steps])
    np.testing.assert_array_equal(store.lowdim("objects"), [s["extras"]["objects"] for s in steps])
    np.testing.assert_allclose(store.lowdim("timestamp"), [i / 10 for n in (4, 1, 6) for i in range(n)])
    assert store.lowdim("timestamp").dtype == np.float64
    np.testing.assert_array_equal(store.read_images("wrist", range(11)), [s["images"]["wrist"] for s in steps])


def test_lowdim_and_episode_of_some(filled):
    store, given = filled
    np.testing.assert_array_equal(store.lowdim("state", [2, 0])[:6], [s["state"] for s in given[2]])
    episode = store.episode(2)
    assert len(episode) == 6
    assert episode.info == store.episodes[2]
    assert episode.extras["objects"].shape == (6, 2, 3)
    np.testing.assert_array_equal(episode.images["front"], [s["images"]["front"] for s in given[2]])
    assert list(episode.images) == ["front", "wrist"]


@pytest.mark.filterwarnings("ignore:Object at .* is not recognized as a component of a Zarr hierarchy")
@pytest.mark.parametrize("profile", sorted(PROFILES))
@pytest.mark.parametrize("shard", [1024, 3])
def test_zarr_python_reads_the_same_bits(tmp_path, monkeypatch, profile, shard):
    monkeypatch.setattr(layout, "SHARD_FRAMES", shard)
    schema = make_schema()
    store = EpisodeStore.create(tmp_path / "s", schema)
    fill(store, (5, 2, 4), profile=profile, episodes_per_segment=2)
    store = store.refresh()
    group = zarr.open_group(tmp_path / "s", mode="r")
    start = 0
    for segment in dict.fromkeys(e.segment for e in store.episodes):
        images = group[f"segments/{segment}/images/front"]
        n = images.shape[0]
        np.testing.assert_array_equal(images[:], store.read_images("front", range(start, start + n)))
        for field in ("state", "action"):
            array = group[f"segments/{segment}/lowdim/{field}"][:]
            np.testing.assert_array_equal(array, store.lowdim(field)[start : start + n])
        start += n
    assert start == store.total_frames == 11
    assert {path for path, _ in group.members(max_depth=None)} >= {f"segments/{store.episodes[0].segment}/lowdim/state"}


def test_lowdim_of_several_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "CHUNK_BYTES", 32)  # 2 rows of state
    store = EpisodeStore.create(tmp_path / "s", make_schema())
    given = fill(store, (5,))
    monkeypatch.undo()  # reading goes by the metadata, not by the constant
    store = store.refresh()
    np.testing.assert_array_equal(store.lowdim("state"), [s["state"] for s in given[0]])
    array = zarr.open_group(tmp_path / "s", mode="r")[f"segments/{store.episodes[0].segment}/lowdim/state"]
    assert array.chunks == (2, 3)
    np.testing.assert_array_equal(array[:], store.lowdim("state"))


def test_jpeg_is_close_and_passes_through(tmp_path):
    store = EpisodeStore.create(tmp_path / "s", make_schema(cameras=("front",), size=(64, 64)))
    ramp = np.broadcast_to(np.linspace(0, 255, 64)[:, None, None], (64, 64, 3)).astype(np.uint8)
    encoded = image_profile("jpeg", 80).encode(ramp)
    with EpisodeWriter(store, fsync=False) as writer:
        writer.begin("x")
        writer.step(images={"front": ramp}, state=np.zeros(3), action=np.zeros(2))
        writer.step_jpeg(images={"front": encoded}, state=np.zeros(3), action=np.zeros(2))
        writer.end(None)
    store = store.refresh()
    assert np.abs(store.read_images("front", [0])[0].astype(int) - ramp).max() <= 4
    assert store.jpeg_bytes("front", 1) == encoded
    assert store.jpeg_bytes("front", 0) != encoded


@pytest.mark.parametrize("threads", [1, 3])
def test_read_images_in_any_order_into_a_buffer(filled, threads):
    store, given = filled
    frames = np.array([10, 0, 4, 4, 7, 1, 2, 3])
    out = np.zeros((8, 24, 32, 3), np.uint8)
    assert store.read_images("front", frames, out=out, threads=threads) is out
    steps = [step for episode in given for step in episode]
    np.testing.assert_array_equal(out, [steps[i]["images"]["front"] for i in frames])
    with pytest.raises(SpecMismatchError, match="out: expected"):
        store.read_images("front", frames, out=out[:2])


def test_more_shards_than_open_files(filled):
    store, _ = filled
    store._frames.files._limit = 1
    for frame in (0, 10, 1, 9):
        store.read_images("front", [frame])
        store.read_images("wrist", [frame])
    assert len(store._frames.files._files) == 1


def test_versions_and_edits(filled):
    store, _ = filled
    first = store.episodes[0].id
    actions = [
        {"action": "edit", "id": first, "instruction": "new words", "success": False, "tags": ["odd", "checked"]}
    ]
    commitlog.commit(store.path, actions, after=store.version)
    commitlog.commit(store.path, [{"action": "remove_episode", "id": store.episodes[1].id}], after=store.version)
    now = store.refresh()
    assert (now.episodes[0].instruction, now.episodes[0].success) == ("new words", False)
    assert now.episodes[0].tags == ("odd", "checked")
    assert [e.length for e in now.episodes] == [4, 6]
    np.testing.assert_array_equal(now.lowdim("state"), store.lowdim("state", [0, 2]))
    np.testing.assert_array_equal(
        now.read_images("front", range(10)), store.read_images("front", [0, 1, 2, 3, *range(5, 11)])
    )
    then = EpisodeStore.open(store.path, version=store.version)
    assert then.episodes == store.episodes
    assert then.fingerprint == store.fingerprint != now.fingerprint
    assert EpisodeStore.open(store.path, version=0).total_frames == 0
    with pytest.raises(NotFoundError, match="versions 0 to"):
        EpisodeStore.open(store.path, version=99)


def test_checkpoints_say_the_same_as_the_entries(tmp_path, filled):
    store, _ = filled
    ids = [e.id for e in store.episodes]
    for i in range(70):
        actions = [{"action": "edit", "id": ids[i % 3], "instruction": f"words {i}", "tags": [str(i)]}]
        commitlog.commit(store.path, actions, after=i, fsync=False)
    [checkpoint] = (store.path / "_log").glob("*.ckpt.parquet")
    assert checkpoint.name == f"{64:020d}.ckpt.parquet"
    with_checkpoint = store.refresh()
    (store.path / "_log" / f"{3:020d}.json").rename(tmp_path / "aside")  # a reader needs the tail only
    assert store.refresh().episodes == with_checkpoint.episodes
    (tmp_path / "aside").rename(store.path / "_log" / f"{3:020d}.json")
    checkpoint.write_bytes(b"torn")  # and falls back to the entries
    from_entries = store.refresh()
    assert from_entries.episodes == with_checkpoint.episodes
    assert from_entries.fingerprint == with_checkpoint.fingerprint


def test_replaying_a_commit_twice_changes_nothing(filled):
    store, _ = filled
    for number in (1, 2):
        entry = json.loads((store.path / "_log" / f"{number:020d}.json").read_bytes())
        commitlog.commit(store.path, entry["actions"], after=store.version)
    assert store.refresh().episodes == store.episodes


def test_opening_what_is_not_there(tmp_path):
    with pytest.raises(NotFoundError, match="brachium convert source="):
        EpisodeStore.open(tmp_path / "none")
    with pytest.raises(StoreError, match="is no episode store"):
        EpisodeStore.open(tmp_path)
    zarr.open_group(tmp_path / "z", mode="w", zarr_format=3)
    (tmp_path / "z" / "_log").mkdir()
    with pytest.raises(StoreError, match="zarr group but no episode store"):
        EpisodeStore.open(tmp_path / "z")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is no episode store"):
        EpisodeStore.open(tmp_path / "file")


def test_format_of_the_future(filled):
    store, _ = filled
    path = store.path / "zarr.json"
    path.write_bytes(path.read_bytes().replace(b'"format": "1"', b'"format": "9"'))
    with pytest.raises(StoreError, match="store format '9'"):
        EpisodeStore.open(store.path)


def test_create_twice(tmp_path, schema):
    store = EpisodeStore.create(tmp_path / "s", schema)
    with pytest.raises(StoreError, match="is a store already"):
        EpisodeStore.create(tmp_path / "s", schema)
    assert EpisodeStore.create(tmp_path / "s", schema, exist_ok=True).version == store.version
    with pytest.raises(SpecMismatchError, match="cameras"):
        EpisodeStore.create(tmp_path / "s", make_schema(cameras=("top",)), exist_ok=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="exists and is no episode store"):
        EpisodeStore.create(tmp_path / "other", schema)


def test_wrong_names_and_indices(filled):
    store, _ = filled
    with pytest.raises(SpecMismatchError, match="Did you mean 'wrist'"):
        store.read_images("wirst", [0])
    with pytest.raises(SpecMismatchError, match="Did you mean 'state'"):
        store.lowdim("stat")
    for bad in ([11], [-1]):
        with pytest.raises(StoreError, match="frame indices from 0 to 10"):
            store.read_images("front", bad)
    with pytest.raises(StoreError, match="3 episodes"):
        store.episode(3)
    with pytest.raises(StoreError, match="not stored as JPEG"):
        store.jpeg_bytes("front", 0)


def _flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("glob", "position", "words"),
    [
        ("_log/*01.json", 40, "log entry"),
        ("segments/*/images/front/c/0/0/0/0", 100, "frame 0 in .* checksum"),
        ("segments/*/images/front/c/0/0/0/0", -8, "frame index"),
        ("segments/*/lowdim/state/c/0/0", 5, "checksum"),
        ("segments/*/zarr.json", 2, "no JSON|lacks"),
    ],
)
def test_a_flipped_bit_is_found(filled, glob, position, words):
    store, _ = filled
    _flip(sorted(store.path.glob(glob))[0], position)
    with pytest.raises(StoreError, match=words):
        _read_all(EpisodeStore.open(store.path))


@pytest.mark.parametrize(
    "glob",
    [
        "_log/*01.json",
        "segments/*/images/front/c/0/0/0/0",
        "segments/*/images/front/zarr.json",
        "segments/*/lowdim/state/c/0/0",
        "segments/*/zarr.json",
    ],
)
@pytest.mark.parametrize("how", ["remove", "empty", "truncate"])
def test_a_missing_or_short_file_is_found(filled, glob, how):
    store, _ = filled
    path = sorted(store.path.glob(glob))[0]
    if how == "remove":
        path.unlink()
    else:
        os.truncate(path, 0 if how == "empty" else path.stat().st_size // 2)
    with pytest.raises(StoreError, match=r"damaged store|has no camera"):
        _read_all(EpisodeStore.open(store.path))


def _read_all(store):
    for field in store.schema.fields:
        store.lowdim(field)
    for camera in store.embodiment.camera_names:
        store.read_images(camera, range(store.total_frames))


def test_segment_of_another_embodiment_is_refused(filled):
    store, _ = filled
    path = sorted(store.path.glob("segments/*/zarr.json"))[0]
    data = json.loads(path.read_bytes())
    data["attributes"]["brachium"]["embodiment"]["control_hz"] = 3.0
    data["attributes"]["brachium"]["digest"] = "0"
    path.write_text(json.dumps(data))
    with pytest.raises(SpecMismatchError, match="control_hz"):
        _read_all(store.refresh())


def test_schema_refuses_bad_extras():
    embodiment = make_schema().embodiment
    for extra, words in (
        (FeatureSpec(name="state", shape=(1,)), "differ from each other"),
        (FeatureSpec(name="a/b", shape=(1,)), "folder on disk"),
        (FeatureSpec(name="depth", shape=(4, 4, 3), dtype="uint8"), "is an image"),
        (FeatureSpec(name="word", shape=(1,), dtype="U5"), "numeric"),
    ):
        with pytest.raises(SpecMismatchError, match=words):
            StoreSchema(embodiment=embodiment, extras=(extra,))
    schema = StoreSchema(embodiment=embodiment, extras=(FeatureSpec(name="force", shape=(6,)),))
    assert StoreSchema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


def test_image_profiles():
    with pytest.raises(ConfigError, match="Did you mean 'jpeg'"):
        image_profile("jpg")
    with pytest.raises(ConfigError, match="quality"):
        image_profile("raw", 90)
    step = random_step(make_schema(), np.random.default_rng(0))["images"]["front"]
    assert len(image_profile("jpeg", 10).encode(step)) < len(image_profile("jpeg").encode(step))


def test_a_torn_jpeg_is_named_when_read(tmp_path):
    store = EpisodeStore.create(tmp_path / "s", make_schema(cameras=("front",)))
    whole = image_profile("jpeg").encode(random_step(store.schema, np.random.default_rng(0))["images"]["front"])
    with EpisodeWriter(store, fsync=False) as writer:
        writer.begin("x")
        writer.step(images={"front": whole[: len(whole) // 2]}, state=np.zeros(3), action=np.zeros(2))
        writer.end(True)
    with pytest.raises(StoreError, match=r"frame 0 in .*front: no decodable JPEG"):
        store.refresh().read_images("front", [0])


def test_a_store_without_its_first_commit_is_said_to_be_new_and_one_without_its_log_damaged(tmp_path, filled):
    new = tmp_path / "new"
    EpisodeStore.create(new, make_schema())
    (new / layout.LOG / f"{0:020d}.json").unlink()
    with pytest.raises(StoreError, match="just being created"):
        EpisodeStore.open(new)
    EpisodeStore.create(new, make_schema())  # as the message says
    assert EpisodeStore.open(new).num_episodes == 0
    copy = tmp_path / "copy"
    shutil.copytree(filled[0].path, copy)
    for entry in (copy / layout.LOG).iterdir():
        entry.unlink()
    with pytest.raises(StoreError, match="damaged store"):
        EpisodeStore.open(copy)


def test_a_recorder_imports_no_pandas(tmp_path):
    """It takes a second, and pyarrow imports it for its own sake where it is installed."""
    code = """
import sys
from brachium.datasets import commitlog
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
store = EpisodeStore.open(sys.argv[1])
with EpisodeWriter(store, fsync=False) as writer:
    for _ in range(66):
        writer.begin("x")
        writer.step(images={}, state=[0, 0, 0], action=[0, 0])
        writer.end(True)
store = store.refresh()
store.episodes, store.instructions, store.lowdim("state")
assert list((store.path / "_log").glob("*.parquet"))
print([name for name in ("pandas", "torch", "zarr") if name in sys.modules])
"""
    EpisodeStore.create(tmp_path / "s", make_schema(cameras=()))
    words = [sys.executable, "-c", code, str(tmp_path / "s")]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == "[]"
