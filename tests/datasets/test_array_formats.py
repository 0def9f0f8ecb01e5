"""HDF5 of robomimic and ALOHA, replay buffers of diffusion_policy and UMI, made here as those projects make them."""

import h5py
import numpy as np
import pytest
import simplejpeg
import zarr
from imagecodecs.numcodecs import Jpegxl, register_codecs

from brachium.__main__ import main
from brachium.datasets.convert import convert
from brachium.datasets.formats.hdf5 import Hdf5Importer
from brachium.datasets.formats.replay_buffer import ReplayBufferImporter
from brachium.datasets.store import EpisodeStore
from brachium.errors import ConfigError, DiskSpaceError, NotFoundError, SpecMismatchError, StoreError
from brachium.spec import EmbodimentSpec, FeatureSpec

from .test_writer import _fill_disk

LENGTHS = (3, 5, 2)
RNG = np.random.default_rng(0)
DATA = [
    {
        "pos": RNG.standard_normal((n, 3)),
        "grip": RNG.standard_normal((n, 1)),
        "action": RNG.standard_normal((n, 2)),
        "image": RNG.integers(0, 256, (n, 8, 12, 3), dtype=np.uint8),
        "reward": np.arange(n) == (n - 1 if n > 2 else -1),
    }
    for n in LENGTHS
]


def spec(camera, state=4):
    names = ("x", "y", "z", "g")[:state]
    return EmbodimentSpec(
        name="arm",
        robot="panda",
        control_hz=20.0,
        cameras=(FeatureSpec(name=camera, shape=(8, 12, 3), dtype="uint8"),),
        state=FeatureSpec(name="state", shape=(state,), names=names, units=("m", "m", "m", "1")[:state]),
        action=FeatureSpec(name="action", shape=(2,), names=("a", "b"), units=("m", "1")),
    )


@pytest.fixture
def robomimic(tmp_path):
    path = tmp_path / "low.hdf5"
    with h5py.File(path, "w") as file:
        for k, number in enumerate((1, 10, 2)):  # not in the order of their names
            group = file.create_group(f"data/demo_{number}")
            data = DATA[(0, 2, 1)[k]]
            group["obs/eef"], group["obs/grip"] = data["pos"], data["grip"]
            group.create_dataset("obs/agentview_image", data=data["image"], compression="gzip")
            group["actions"], group["rewards"] = data["action"], data["reward"].astype(np.float64)
            group.attrs["words"] = f"do {(0, 2, 1)[k]}"
    return path


def mimic(**options):
    kept = {"group": "data/demo_*", "state": ["obs/eef", "obs/grip"], "action": "actions"}
    kept |= {"embodiment": spec("agentview_image"), "instruction_attribute": "words", "success_from": "rewards"}
    return Hdf5Importer(**{**kept, **options})


def check(store, words=True):
    assert [e.length for e in store.episodes] == list(LENGTHS)
    if words:
        assert [e.instruction for e in store.episodes] == ["do 0", "do 1", "do 2"]
    for index, data in enumerate(DATA):
        episode = store.episode(index)
        state = np.concatenate([data["pos"], data["grip"]], axis=1)
        np.testing.assert_array_equal(episode.state, state.astype(np.float32)[:, : episode.state.shape[1]])
        np.testing.assert_array_equal(episode.action, data["action"].astype(np.float32))


def test_robomimic(robomimic, tmp_path):
    convert(source=str(robomimic), out=str(tmp_path / "o"), data=mimic())
    store = EpisodeStore.open(tmp_path / "o")
    check(store)
    assert [e.success for e in store.episodes] == [True, True, False]
    assert [e.meta["episode"] for e in store.episodes] == [f"low.hdf5/data/demo_{k}" for k in (1, 2, 10)]
    images = [list(e.steps)[1].images["agentview_image"] for e in mimic().read(robomimic, 1)]
    np.testing.assert_array_equal(images, [DATA[1]["image"][1], DATA[2]["image"][1]])


def test_aloha_with_plain_and_with_padded_pictures(tmp_path):
    streams = [[simplejpeg.encode_jpeg(im, 90) for im in data["image"]] for data in DATA]
    longest = max(len(s) for some in streams for s in some) + 7
    for k, data in enumerate(DATA):
        with h5py.File(tmp_path / f"episode_{k}.hdf5", "w") as file:
            file["observations/qpos"], file["action"] = np.hstack([data["pos"], data["grip"]]), data["action"]
            file["observations/images/top"] = data["image"]
            padded = [np.frombuffer(s.ljust(longest, b"\0"), np.uint8) for s in streams[k]]
            file["observations/images/packed"] = np.stack(padded)
            file.attrs["compress"] = True
    options = {"state": ["observations/qpos"], "action": ["action"], "instruction": "fold it"}
    for camera in ("top", "packed"):
        data = Hdf5Importer(**options, images={camera: f"observations/images/{camera}"}, embodiment=spec(camera))
        convert(source=str(tmp_path), out=str(tmp_path / camera), data=data)
        store = EpisodeStore.open(tmp_path / camera)
        check(store, words=False)
        assert {e.instruction for e in store.episodes} == {"fold it"}
    flat = [s for some in streams for s in some]
    assert [store.jpeg_bytes("packed", k) for k in range(store.total_frames)] == flat
    swapped = Hdf5Importer(**options, images={"top": "observations/images/top"}, embodiment=spec("top"), bgr=True)
    reading = swapped.read(tmp_path)  # holds the file open
    [first, *_] = next(reading).steps
    np.testing.assert_array_equal(first.images["top"], DATA[0]["image"][0][..., ::-1])


def write_buffer(root, compressor=None):
    group = zarr.open_group(root, mode="w", zarr_format=2)
    joined = {key: np.concatenate([d[key] for d in DATA]) for key in ("pos", "action", "image")}
    for key, value in joined.items():
        chunk = (1, *value.shape[1:]) if key == "image" else value.shape
        codec = {"compressors": compressor} if key == "image" and compressor is not None else {}
        array = group.create_array(f"data/{key}", shape=value.shape, chunks=chunk, dtype=value.dtype, **codec)
        array[:] = value
    ends = group.create_array("meta/episode_ends", shape=(3,), dtype=np.int64)
    ends[:] = np.cumsum(LENGTHS)


def buffer(**options):
    kept = {"state": "pos", "action": "action", "embodiment": spec("image", 3), "instruction": "push the T"}
    return ReplayBufferImporter(**{**kept, **options})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("codec", ["default", "jpegxl"])
def test_replay_buffers(tmp_path, packed, codec):
    register_codecs(verbose=False)
    source = tmp_path / ("b.zarr.zip" if packed else "b.zarr")
    root = zarr.storage.ZipStore(source, mode="w") if packed else source
    write_buffer(root, Jpegxl(lossless=True) if codec == "jpegxl" else None)
    if packed:
        root.close()
    pictures = [s.images["image"] for e in buffer().read(source) for s in e.steps]
    np.testing.assert_array_equal(pictures, np.concatenate([d["image"] for d in DATA]))
    convert(source=str(source), out=str(tmp_path / "o"), data=buffer())
    check(EpisodeStore.open(tmp_path / "o"), words=False)
    assert [e.meta["episode"] for e in buffer().read(source, 2)] == ["2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": ["obs/efe"]}, "Did you mean 'obs/eef'"),
        ({"state": ["obs/eef"]}, "has 3 elements, expected"),
        ({"images": {"front": "obs/agentview_image"}}, "has cameras"),
        ({"instruction_attribute": "word"}, "Did you mean 'words'"),
        ({"embodiment": None}, "(?s)nothing is guessed.*units"),
    ],
)
def test_what_does_not_fit(robomimic, tmp_path, change, words):
    with pytest.raises(SpecMismatchError, match=words):
        convert(source=str(robomimic), out=str(tmp_path / "o"), data=mimic(**change))
    with pytest.raises(ConfigError, match="make up state"):
        mimic(state=[])


def test_words_are_not_guessed(robomimic, tmp_path):
    with pytest.raises(StoreError, match="unlabelled=keep"):
        convert(source=str(robomimic), out=str(tmp_path / "o"), data=mimic(instruction_attribute=None))
    silent = mimic(instruction_attribute=None)
    convert(source=str(robomimic), out=str(tmp_path / "o"), data=silent, unlabelled="keep")
    assert {e.instruction for e in EpisodeStore.open(tmp_path / "o").episodes} == {""}


def test_damaged_files(robomimic, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for source, data, words in (
        (tmp_path / "none", mimic(), "no HDF5 data"),
        (other, mimic(), r"no file \*.hdf5"),
        (robomimic, mimic(group="data/demos_*"), "no group 'data/demos"),
        (tmp_path / "none", buffer(), "no replay buffer"),
        (other, buffer(), "no Zarr group"),
    ):
        with pytest.raises((StoreError, NotFoundError), match=words):
            convert(source=str(source), out=str(tmp_path / "o"), data=data)
    whole = robomimic.read_bytes()
    robomimic.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match="no HDF5 file, or was not closed"):
        convert(source=str(robomimic), out=str(tmp_path / "o"), data=mimic())
    write_buffer(tmp_path / "b.zarr")
    zarr.open_group(tmp_path / "b.zarr", mode="a")["meta/episode_ends"][:] = [3, 3, 10]
    with pytest.raises(StoreError, match="do not rise"):
        convert(source=str(tmp_path / "b.zarr"), out=str(tmp_path / "o"), data=buffer())
    zarr.open_group(tmp_path / "b.zarr", mode="a")["meta/episode_ends"][:] = [3, 8, 11]
    with pytest.raises(StoreError, match="episodes end at 11"):
        convert(source=str(tmp_path / "b.zarr"), out=str(tmp_path / "o"), data=buffer())


def test_a_draft_is_typed_from_the_command(robomimic, tmp_path, capsys):
    words = ["convert", f"source={robomimic}", f"out={tmp_path / 'o'}", "data=robomimic", "data.state=[obs/eef]"]
    assert main([*words, "data.success_from=rewards"]) == 2
    said = capsys.readouterr().err
    assert "- robomimic" in said or "- hdf5" in said
    assert "agentview_image, shape: [8, 12, 3]" in said


def test_a_full_disk_stops_a_conversion_that_goes_on_later(robomimic, tmp_path, monkeypatch):
    arguments = {"source": str(robomimic), "out": str(tmp_path / "o"), "data": mimic()}
    for after in (300, 3000, 9000, 12000):
        with monkeypatch.context() as patch:
            _fill_disk(patch, after)
            with pytest.raises(DiskSpaceError, match="no space left"):
                convert(**arguments)
        assert not (tmp_path / "o").exists()
    convert(**arguments)
    check(EpisodeStore.open(tmp_path / "o"))
    assert not list(tmp_path.glob(".*"))
