"""LeRobot data sets in and out, against LeRobotDataset itself."""

import errno
import json
import shutil
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brachium.__main__ import main
from brachium.datasets.convert import _locked, convert
from brachium.datasets.formats.lerobot import LerobotImporter
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.errors import ConfigError, DiskSpaceError, NotFoundError, SpecMismatchError, StoreError
from brachium.spec import EmbodimentSpec, FeatureSpec

from .conftest import make_embodiment, make_schema

LENGTHS = (7, 3, 5)
SIZE = (32, 48)
SPEC = EmbodimentSpec(
    name="lab_arm",
    robot="koch",
    control_hz=10.0,
    cameras=(FeatureSpec(name="front", shape=(*SIZE, 3), dtype="uint8"),),
    state=FeatureSpec(name="state", shape=(3,), names=("x", "y", "g"), units=("m", "m", "1")),
    action=FeatureSpec(name="action", shape=(2,), names=("dx", "g"), units=("m", "1")),
)
FEATURES = {
    "observation.images.front": {"dtype": "video", "shape": [*SIZE, 3], "names": ["height", "width", "channels"]},
    "observation.state": {"dtype": "float32", "shape": [3], "names": ["x", "y", "g"]},
    "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["dx", "g"]}},
}


def picture(episode, step):
    image = np.zeros((*SIZE, 3), np.uint8)
    image[:] = np.linspace(0, 255, SIZE[1])[None, :, None]
    image[8:20, 4 + 5 * step : 14 + 5 * step] = (255, 20 * step, 80 * episode)
    return image


def vectors():
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((n, 3), np.float32), rng.standard_normal((n, 2), np.float32)) for n in LENGTHS]


@pytest.fixture(scope="module")
def lerobot_class():
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    module = pytest.importorskip("lerobot.datasets.lerobot_dataset", reason="type: uv pip install 'lerobot[dataset]'")
    yield module.LeRobotDataset
    patch.undo()


def make_theirs(lerobot_class, root, kind):
    """A data set that LeRobot itself wrote."""
    features = {name: {**f, "dtype": kind if f["dtype"] == "video" else f["dtype"]} for name, f in FEATURES.items()}
    features["action"] = {**features["action"], "names": ["dx", "g"]}
    made = lerobot_class.create("me/x", fps=10, features=features, root=root, use_videos=kind == "video")
    for episode, (states, actions) in enumerate(vectors()):
        for t in range(len(states)):
            values = {"observation.state": states[t], "action": actions[t]}
            made.add_frame({"observation.images.front": picture(episode, t), **values, "task": f"task {episode % 2}"})
        made.save_episode()
    made.finalize()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["video", "image"])
def test_what_lerobot_writes_comes_in_as_it_reads_it(lerobot_class, tmp_path, kind):
    make_theirs(lerobot_class, tmp_path / "theirs", kind)
    importer = LerobotImporter(embodiment=SPEC, tags=("lerobot",))
    frames = [
        step.images["front"]
        for episode in importer.read(tmp_path / "theirs")
        for step in episode.steps  # before our own JPEG
    ]
    theirs = lerobot_class("me/x", root=tmp_path / "theirs", video_backend="pyav")
    for k in range(len(theirs)):
        wanted = theirs[k]["observation.images.front"].permute(1, 2, 0).numpy() * 255
        np.testing.assert_array_equal(frames[k], wanted.round().astype(np.uint8))
    convert(source=str(tmp_path / "theirs"), out=str(tmp_path / "out"), data=importer)
    store = EpisodeStore.open(tmp_path / "out")
    assert [(e.length, e.instruction, e.tags) for e in store.episodes] == [
        (n, f"task {k % 2}", ("lerobot",)) for k, n in enumerate(LENGTHS)
    ]
    for index, (states, actions) in enumerate(vectors()):
        episode = store.episode(index)
        np.testing.assert_array_equal(episode.state, states)
        np.testing.assert_array_equal(episode.action, actions)
        np.testing.assert_allclose(episode.timestamp, np.arange(len(states)) / 10, atol=1e-6)


def encode(path, images):
    import av

    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(10), options={"crf": "0", "g": "2"})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv444p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def older(tmp_path):
    """A data set of version 2.1, written by hand from its description: a file an episode."""
    root = tmp_path / "older"
    (root / "meta").mkdir(parents=True)
    info = {
        "codebase_version": "v2.1",
        "robot_type": "koch",
        "fps": 10,
        "total_episodes": len(LENGTHS),
        "chunks_size": 2,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": FEATURES,
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    tasks = [{"task_index": k, "task": f"task {k}"} for k in range(2)]
    (root / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)) + "\n")
    rows = [{"episode_index": k, "tasks": [f"task {k % 2}"], "length": n} for k, n in enumerate(LENGTHS)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))) + "\n")
    for k, (states, actions) in enumerate(vectors()):
        n = len(states)
        columns = {"observation.state": states.tolist(), "action": actions.tolist()}
        columns |= {"timestamp": np.arange(n, dtype=np.float32) / 10, "frame_index": np.arange(n)}
        columns |= {"episode_index": np.full(n, k), "index": np.arange(n), "task_index": np.full(n, k % 2)}
        path = root / f"data/chunk-{k // 2:03d}/episode_{k:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        video = root / f"videos/chunk-{k // 2:03d}/observation.images.front/episode_{k:06d}.mp4"
        if video.parent.exists():
            (tmp_path / "x").mkdir(exist_ok=True)
            encode(tmp_path / "x" / "y" / "v.mp4", [picture(k, t) for t in range(n)])
            shutil.move(tmp_path / "x" / "y" / "v.mp4", video)
            shutil.rmtree(tmp_path / "x")
        else:
            encode(video, [picture(k, t) for t in range(n)])
    return root


def test_version_2_1(older, tmp_path):
    importer = LerobotImporter(embodiment=SPEC)
    assert importer.count(older) == 3
    for k, episode in enumerate(importer.read(older)):
        steps = list(episode.steps)
        assert (episode.instruction, len(steps)) == (f"task {k % 2}", LENGTHS[k])
        np.testing.assert_array_equal([s.state for s in steps], vectors()[k][0])
        for t, step in enumerate(steps):
            assert np.abs(step.images["front"].astype(int) - picture(k, t)).max() <= 3  # to YUV and back
    assert [e.meta["episode_index"] for e in importer.read(older, 2)] == [2]


def test_numbers_with_gaps_are_gone_through_by_position(older):
    rows = [json.loads(line) for line in (older / "meta/episodes.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["episode_index"] != 1]
    (older / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, kept)) + "\n")
    importer = LerobotImporter(embodiment=SPEC)
    assert [e.meta["episode_index"] for e in importer.read(older)] == [0, 2]
    assert [e.meta["episode_index"] for e in importer.read(older, 1)] == [2]


def test_what_is_converted_survives_a_full_disk_and_a_second_try(older, tmp_path, monkeypatch):
    real = LerobotImporter._episode

    def stopping(self, source, info, about, *rest):
        if about["episode_index"] == 2:
            raise KeyboardInterrupt
        return real(self, source, info, about, *rest)

    arguments = {"source": str(older), "out": str(tmp_path / "o"), "data": LerobotImporter(embodiment=SPEC)}
    with monkeypatch.context() as patch:
        patch.setattr(LerobotImporter, "_episode", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert(**arguments)
        patch.setattr("brachium.datasets.recovery.recover", _full)
        with pytest.raises(DiskSpaceError):
            convert(**arguments)
    assert EpisodeStore.open(tmp_path / ".o.converting").num_episodes == 2
    assert convert(**arguments)["episodes"] == 3


def _full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_two_conversions_to_one_place(older, tmp_path):
    arguments = {"source": str(older), "out": str(tmp_path / "o"), "data": LerobotImporter(embodiment=SPEC)}
    with _locked(tmp_path / ".o.converting"):
        for _ in range(2):  # who is refused takes nothing away from who is at work
            with pytest.raises(StoreError, match="another conversion"):
                convert(**arguments)
    assert convert(**arguments)["episodes"] == 3


@pytest.mark.parametrize("how", ["language", "index"])
def test_subtasks_are_kept(older, how):
    path = next(older.glob("data/*/*000000.parquet"))
    table = pq.read_table(path)
    if how == "language":
        rows = [("subtask", 0.4, "lift it"), ("plan", 0.0, "all of it"), ("subtask", 0.0, "grasp it")]
        rows = [{"role": "assistant", "style": s, "timestamp": t, "content": c} for s, t, c in rows]
        table = table.append_column("language_persistent", pa.array([rows] * table.num_rows))
    else:
        table = table.append_column("subtask_index", pa.array([1] * 4 + [0] * 3))
        pq.write_table(
            pa.table({"subtask_index": [0, 1], "subtask": ["lift it", "grasp it"]}), older / "meta/subtasks.parquet"
        )
    pq.write_table(table, path)
    first, second, _ = LerobotImporter(embodiment=SPEC).read(older)
    assert first.meta["subtasks"] == [[0.0, "grasp it"], [0.4, "lift it"]]
    assert "subtasks" not in second.meta


def test_nothing_is_guessed(older, tmp_path, capsys):
    """The error is a file to fill in, and filled in it works."""
    words = ["convert", f"source={older}", f"out={tmp_path / 'out'}"]
    assert main([*words, "data=lerobot"]) == 2
    draft = "defaults:" + capsys.readouterr().err.partition("\ndefaults:")[2]
    assert "names: [dx, g]" in draft
    assert "control_hz: 10.0" in draft
    folder = tmp_path / "my_conf" / "data"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# Mine.\n" + draft)
    assert main([*words, "data=mine", f"--config-dir={folder.parent}"]) == 2
    assert "embodiment.state.units" in capsys.readouterr().err
    filled = {"name: ???": "name: mine", "units: ???      # 3": 'units: [m, m, "1"] # 3'}
    filled |= {"units: ???      # 2": 'units: [m, "1"] # 2', "reference: ???": "reference: absolute"}
    filled |= {"rotation: ???": "rotation: none", "gripper: ???": "gripper: open_is_1"}
    for old, new in filled.items():
        draft = draft.replace(old, new)
    (folder / "mine.yaml").write_text("# Mine.\n" + draft)
    assert main([*words, "data=mine", f"--config-dir={folder.parent}"]) == 0, capsys.readouterr().err
    store = EpisodeStore.open(tmp_path / "out")
    assert (store.embodiment.robot, store.embodiment.action.units, store.num_episodes) == ("koch", ("m", "1"), 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": "observation.stat"}, "Did you mean 'observation.state'"),
        ({"embodiment": replace(SPEC, control_hz=30.0)}, "recorded at 10 Hz"),
        ({"embodiment": replace(SPEC, cameras=())}, "has cameras"),
        ({"embodiment": replace(SPEC, action=replace(SPEC.state, name="action"))}, r"'action' has shape \[2\]"),
    ],
)
def test_what_does_not_fit(older, tmp_path, change, words):
    data = LerobotImporter(**{"embodiment": SPEC, **change})
    with pytest.raises(SpecMismatchError, match=words):
        convert(source=str(older), out=str(tmp_path / "o"), data=data)
    assert not (tmp_path / "o").exists()


def test_a_rate_that_the_data_set_has_wrong_can_be_put_right(older, tmp_path):
    spec = replace(SPEC, control_hz=20.0)
    with pytest.raises(SpecMismatchError, match=r"type: data.recorded_hz=20"):
        convert(source=str(older), out=str(tmp_path / "o"), data=LerobotImporter(embodiment=spec))
    convert(source=str(older), out=str(tmp_path / "o"), data=LerobotImporter(embodiment=spec, recorded_hz=20.0))
    store = EpisodeStore.open(tmp_path / "o")
    plain = tmp_path / "plain"
    convert(source=str(older), out=str(plain), data=LerobotImporter(embodiment=SPEC))
    for index in range(store.num_episodes):
        episode = store.episode(index)
        np.testing.assert_allclose(episode.timestamp, np.arange(len(episode.state)) / 20, atol=1e-6)
        old = EpisodeStore.open(plain).episode(index)
        np.testing.assert_array_equal(old.state, episode.state)


def test_units_must_be_said(older, tmp_path):
    dumb = replace(SPEC, action=replace(SPEC.action, units=()))
    with pytest.raises(SpecMismatchError, match=r"nothing is guessed.*embodiment\.action\.units"):
        convert(source=str(older), out=str(tmp_path / "o"), data=LerobotImporter(embodiment=dumb))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: (r / "meta/info.json").unlink(), "no LeRobot data set"),
        (lambda r: (r / "meta/info.json").write_text("{"), "damaged"),
        (lambda r: _edit_info(r, codebase_version="v9"), "version 'v9'"),
        (lambda r: next(r.glob("data/*/*1.parquet")).unlink(), "missing, or no parquet"),
        (lambda r: next(r.glob("videos/*/*/*1.mp4")).write_bytes(b"x"), "no video"),
        (lambda r: shutil.copy(next(r.glob("videos/*/*/*1.mp4")), next(r.glob("videos/*/*/*0.mp4"))), "no frame 3"),
        (lambda r: shutil.copy(next(r.glob("data/*/*1.parquet")), next(r.glob("data/*/*0.parquet"))), "0 steps of"),
    ],
)
def test_damaged_data(older, tmp_path, damage, words):
    damage(older)
    with pytest.raises((StoreError, NotFoundError), match=words):
        convert(source=str(older), out=str(tmp_path / "o"), data=LerobotImporter(embodiment=SPEC))
    assert [p.name for p in tmp_path.iterdir()] == ["older"]


def _edit_info(root, **changes):
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps({**info, **changes}))


def test_an_interrupted_conversion_goes_on(older, tmp_path, monkeypatch, capsys):
    real = LerobotImporter._episode
    asked = []

    def stopping(self, source, info, about, *rest):
        asked.append(about["episode_index"])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(self, source, info, about, *rest)

    arguments = {"source": str(older), "out": str(tmp_path / "o"), "data": LerobotImporter(embodiment=SPEC)}
    monkeypatch.setattr(LerobotImporter, "_episode", stopping)
    with pytest.raises(KeyboardInterrupt):
        convert(**arguments)
    assert not (tmp_path / "o").exists()
    assert convert(**arguments)["episodes"] == 3
    assert asked == [0, 1, 2, 2]
    assert "2 episodes are there" in capsys.readouterr().err
    assert [e.length for e in EpisodeStore.open(tmp_path / "o").episodes] == list(LENGTHS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "older"]


@pytest.fixture
def store(tmp_path):
    schema = replace(make_schema(), embodiment=make_embodiment(cameras=("front", "wrist"), size=SIZE))
    store = EpisodeStore.create(tmp_path / "s", schema)
    with EpisodeWriter(store, fsync=False) as writer:
        for episode, (states, actions) in enumerate(vectors()):
            writer.begin(f"task {episode % 2}", tags=("lab",), meta={"seed": episode})
            for t in range(len(states)):
                images = {"front": picture(episode, t), "wrist": picture(episode, t)[:, ::-1]}
                writer.step(images=images, state=states[t], action=actions[t])
            writer.end([True, False, None][episode])
    return store.refresh()


@pytest.mark.slow
@pytest.mark.parametrize("video", ["av1", "h264", "none"])
def test_lerobot_opens_what_is_exported(lerobot_class, store, tmp_path, capsys, video):
    out = tmp_path / "theirs"
    assert main(["export", f"store={store.path}", f"out={out}", f"format.video={video}", "where.episodes=[0,2]"]) == 0
    theirs = lerobot_class("me/x", root=out, video_backend="pyav")
    frames = store.episode_frames([0, 2])
    assert (len(theirs), theirs.num_episodes, theirs.fps) == (len(frames), 2, 10)
    for k, frame in enumerate(frames.tolist()):
        item = theirs[k]
        index, _ = store.locate([frame])
        np.testing.assert_array_equal(item["action"], store.lowdim("action")[frame])
        np.testing.assert_array_equal(item["observation.state"], store.lowdim("state")[frame])
        assert item["task"] == store.episodes[int(index[0])].instruction
        assert float(item["timestamp"]) == pytest.approx((frame - store.offsets[int(index[0])]) / 10)
        for camera in ("front", "wrist"):
            image = item[f"observation.images.{camera}"].permute(1, 2, 0).numpy() * 255
            error = np.abs(image - store.read_images(camera, [frame])[0]).mean()
            assert error < (1e-3 if video == "none" else 8)
    rows = store.lowdim("action")[frames].astype(np.float64)
    stats = theirs.meta.stats["action"]
    np.testing.assert_allclose(stats["mean"], rows.mean(0), atol=1e-12)
    np.testing.assert_allclose(stats["std"], rows.std(0), atol=1e-12)
    pixels = store.read_images("front", frames) / 255
    np.testing.assert_allclose(np.ravel(theirs.meta.stats["observation.images.front"]["mean"]), pixels.mean((0, 1, 2)))
    # and back: labels, words and streams
    assert main(["convert", f"source={out}", "data=lerobot", f"out={tmp_path / 'back'}"]) == 0
    back = EpisodeStore.open(tmp_path / "back")
    assert back.embodiment == store.embodiment
    assert [(e.success, e.tags, e.meta["seed"]) for e in back.episodes] == [(True, ("lab",), 0), (None, ("lab",), 2)]
    if video == "none":
        ours = [store.jpeg_bytes("wrist", f) for f in frames.tolist()]
        assert [back.jpeg_bytes("wrist", k) for k in range(len(frames))] == ours


def test_exports_that_cannot_be(store, tmp_path, capsys):
    words = ["export", f"store={store.path}", f"out={tmp_path / 'e'}"]
    for more, hint in ((["format.video=mp3"], "no video='mp3'"), (["where.tags=[x]"], "tags")):
        assert main([*words, *more]) == 2
        assert hint in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 0
    assert not (tmp_path / "e").exists()
    (tmp_path / "e").mkdir()
    assert main(words) == 2
    assert "overwrite=true" in capsys.readouterr().err
    odd = EpisodeStore.create(tmp_path / "odd", make_schema(size=(9, 8)))
    with EpisodeWriter(odd, fsync=False) as writer:
        writer.begin("x")
        writer.step({c: np.zeros((9, 8, 3), np.uint8) for c in ("front", "wrist")}, np.zeros(3), np.zeros(2))
        writer.end(True)
    assert main(["export", f"store={odd.path}", f"out={tmp_path / 'f'}"]) == 2
    assert "even heights" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*exporting*"))
    with pytest.raises(ConfigError):
        convert(source=str(tmp_path), out=str(tmp_path / "o"), data=LerobotImporter(), unlabelled="drop")
