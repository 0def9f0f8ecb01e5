"""The profile `video`: what comes back is close, whole, and what zarr-python reads."""

from dataclasses import replace

import numpy as np
import pytest
import zarr

from brachium.__main__ import main
from brachium.datasets import layout, recovery
from brachium.datasets.image import image_profile
from brachium.datasets.remote import RemoteStore
from brachium.datasets.store import EpisodeStore
from brachium.datasets.streamer import BlockStreamer
from brachium.datasets.video_codec import GROUP, decode_group, encode_group, groups
from brachium.datasets.window import WindowDataset, WindowSpec
from brachium.datasets.writer import EpisodeWriter
from brachium.errors import SpecMismatchError, StoreError

from .conftest import make_schema, random_step

SIZE = (32, 48)
LENGTHS = (20, 3, 30)


def picture(episode, step):
    """Something that moves, smooth enough for a video."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    wave = 127 + 100 * np.sin(x / 9 + step / 5)[..., None] * np.cos(y / 7 + episode)[..., None]
    return np.clip(wave + np.array([0, 20, -20]), 0, 255).astype(np.uint8)


def record(store, *, writer_options=None, finish=True):
    rng = np.random.default_rng(0)
    writer = EpisodeWriter(store, fsync=False, profile="video", episodes_per_segment=2, **(writer_options or {}))
    for episode, length in enumerate(LENGTHS):
        writer.begin(f"task {episode}")
        for t in range(length):
            images = {"front": picture(episode, t), "wrist": picture(episode + 5, t)}
            writer.step(**{**random_step(store.schema, rng), "images": images})
        if finish or episode < 2:
            writer.end(True)
    if finish:
        writer.close()
    return writer


@pytest.fixture(params=[1024, 32])
def store(tmp_path, monkeypatch, request):
    monkeypatch.setattr(layout, "SHARD_FRAMES", request.param)
    made = EpisodeStore.create(tmp_path / "s", make_schema(size=SIZE))
    record(made)
    return made.refresh()


def near(found, wanted):
    return np.abs(found.astype(int) - wanted).mean() < 4


def test_frames_come_back_in_any_order(store):
    frames = [(e, t) for e, n in enumerate(LENGTHS) for t in range(n)]
    order = np.random.default_rng(0).permutation(len(frames))
    front, wrist = store.read_images("front", order, threads=2), store.read_images("wrist", order)
    for k, place in enumerate(order.tolist()):
        episode, t = frames[place]
        assert near(front[k], picture(episode, t))
        assert near(wrist[k], picture(episode + 5, t))
    np.testing.assert_array_equal(store.read_images("front", np.sort(order)), front[np.argsort(order)])
    with pytest.raises(StoreError, match="not stored as JPEG"):
        store.jpeg_bytes("front", 0)
    assert not list(store.path.rglob("*.partial"))


def test_zarr_python_reads_the_same(store):
    for segment in dict.fromkeys(e.segment for e in store.episodes):
        array = zarr.open_group(store.path, mode="r")[f"segments/{segment}/images/front"]
        mine = [e for e in store.episodes if e.segment == segment]
        assert array.shape[0] == sum(e.length for e in mine)
        assert array.metadata.codecs[0].to_dict()["configuration"]["chunk_shape"][0] == GROUP
        frames = np.concatenate([np.arange(store.offsets[e.index], store.offsets[e.index + 1]) for e in mine])
        np.testing.assert_array_equal(array[:], store.read_images("front", frames))


def test_the_codec_is_its_own_inverse_and_says_what_is_broken():
    [group] = groups([picture(0, t) for t in range(5)], 8)
    assert group.shape == (8, *SIZE, 3)
    data = encode_group(group)
    assert data == encode_group(group)
    assert near(decode_group(data), group)
    np.testing.assert_array_equal(group[4], group[7])
    with pytest.raises(StoreError, match="no decodable video"):
        decode_group(b"nothing of the kind")
    with pytest.raises(SpecMismatchError, match="even"):
        encode_group(np.zeros((2, 9, 8, 3), np.uint8))


def test_odd_cameras_and_gaps(tmp_path):
    odd = EpisodeStore.create(tmp_path / "odd", make_schema(size=(9, 8)))
    with pytest.raises(SpecMismatchError, match="even heights"):
        EpisodeWriter(odd, profile="video")
    schema = replace(make_schema(size=SIZE), optional=("wrist",))
    store = EpisodeStore.create(tmp_path / "gaps", schema)
    with EpisodeWriter(store, fsync=False, profile="video") as writer:
        writer.begin("x")
        for t in range(20):
            images = {"front": picture(0, t), **({"wrist": picture(5, t)} if t % 4 == 0 else {})}
            writer.step(images=images, state=np.zeros(3), action=np.zeros(2))
        writer.end(True)
    store = store.refresh()
    assert [bool(image.any()) for image in store.read_images("wrist", range(20))] == [t % 4 == 0 for t in range(20)]
    assert store.jpeg_bytes("wrist", 4)[:2] == b"\xff\xd8"


def test_a_recording_that_broke_off_is_saved(tmp_path):
    store = EpisodeStore.create(tmp_path / "s", make_schema(size=SIZE))
    record(store, writer_options={"salvage": "torn"}, finish=False)._segment.release()
    assert recovery.recover(store.path) == 1
    now = store.refresh()
    assert [e.length for e in now.episodes] == list(LENGTHS)
    assert now.episodes[2].tags == ("torn",)
    for t, image in enumerate(now.episode(2).images["front"]):
        assert near(image, picture(2, t))


def test_verbs_on_videos(store, tmp_path, capsys):
    assert main(["verify", f"store={store.path}", "decode=true"]) == 0
    assert main(["compact", f"store={store.path}"]) == 0
    assert store.refresh().version == store.version  # groups are not cut
    words = ["resize", f"store={store.path}", f"out={tmp_path / 'jpeg'}", "sizes={}"]
    assert main(words) == 0
    back = EpisodeStore.open(tmp_path / "jpeg")
    assert back.jpeg_bytes("front", 0)[:2] == b"\xff\xd8"
    assert main([*words[:1], f"store={back.path}", f"out={tmp_path / 'video'}", "sizes={}", "profile=video"]) == 0
    small = EpisodeStore.open(tmp_path / "video")
    assert near(small.read_images("front", range(53)), store.read_images("front", range(53)))
    size = [sum(f.stat().st_size for f in (s.path / "segments").rglob("0")) for s in (small, back)]
    assert size[0] < size[1] / 2
    capsys.readouterr()


def test_videos_from_far_away(store, tmp_path):
    obstore = pytest.importorskip("obstore", reason="type: uv pip install obstore")
    remote = RemoteStore(obstore.store.LocalStore(store.path), tmp_path / "skeleton")
    windows = WindowDataset(store, WindowSpec())
    with BlockStreamer(remote, WindowSpec(), batch_size=30, block=8, buffer=20) as stream:
        for _ in range(3):
            batch = next(stream)
            wanted = store.read_images("wrist", batch.frame[:, 0])
            np.testing.assert_array_equal(batch.images["wrist"][:, 0], wanted)
    assert len(windows) == sum(LENGTHS)
    remote.close()


def test_half_a_jpeg_is_refused_before_it_is_too_late(tmp_path):
    store = EpisodeStore.create(tmp_path / "s", make_schema(size=SIZE))
    whole = image_profile("jpeg").encode(picture(0, 0))
    with EpisodeWriter(store, fsync=False, profile="video") as writer:
        writer.begin("x")
        writer.step(images={"front": whole, "wrist": whole}, state=np.zeros(3), action=np.zeros(2))
        with pytest.raises(SpecMismatchError, match="no decodable JPEG"):
            writer.step(images={"front": whole[:-40], "wrist": whole}, state=np.zeros(3), action=np.zeros(2))
        writer.end(True)
    assert store.refresh().total_frames == 1
