"""The RLDS importer against protobuf's own parser, and against damaged files."""

import contextlib
import json
import struct
from pathlib import Path

import google_crc32c
import imagecodecs
import numpy as np
import pytest
import simplejpeg
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.cli.compose import Composer
from brachium.datasets.convert import convert
from brachium.datasets.formats.rlds import RldsImporter, read_features
from brachium.datasets.formats.tfrecord import parse_example, read_records, write_records
from brachium.datasets.store import EpisodeStore
from brachium.errors import NotFoundError, SpecMismatchError, StoreError

from .conftest import make_embodiment

BRIDGE = Path(__file__).resolve().parents[3] / "shared" / "data" / "bridge"
needs_bridge = pytest.mark.skipif(not BRIDGE.is_dir(), reason="the BridgeData sample is not at ../shared/data/bridge")


def _example_class():
    """tf.train.Example as protobuf itself understands it, from a descriptor written here."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, kind in (
        ("BytesList", kinds.TYPE_BYTES),
        ("FloatList", kinds.TYPE_FLOAT),
        ("Int64List", kinds.TYPE_INT64),
    ):
        file.message_type.add(name=name).field.add(name="value", number=1, type=kind, label=kinds.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("BytesList", "FloatList", "Int64List"), 1):
        feature.field.add(
            name=name.lower(), number=number, type=kinds.TYPE_MESSAGE, type_name=f".t.{name}", label=1, oneof_index=0
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=1)
    entry.field.add(name="value", number=2, type=kinds.TYPE_MESSAGE, type_name=".t.Feature", label=1)
    features.field.add(name="feature", number=1, type=kinds.TYPE_MESSAGE, type_name=".t.Features.FeatureEntry", label=3)
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, type=kinds.TYPE_MESSAGE, type_name=".t.Features", label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


Example = _example_class()


def serialize(features):
    example = Example()
    for name, values in features.items():
        feature = example.features.feature[name]
        values = list(values)
        if values and isinstance(values[0], bytes):
            feature.byteslist.value.extend(values)
        elif np.asarray(values).dtype.kind == "f":
            feature.floatlist.value.extend(values)
        else:
            feature.int64list.value.extend(values)
    return example.SerializeToString()


FEATURES = st.dictionaries(
    st.text(min_size=1, max_size=10),
    st.one_of(
        st.lists(st.binary(max_size=20), min_size=1, max_size=4),
        st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=6),
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6),
    ),
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(features=FEATURES)
def test_examples_parse_as_protobuf_wrote_them(features):
    parsed = parse_example(serialize(features))
    assert set(parsed) == set(features)
    for name, values in features.items():
        assert list(parsed[name]) == list(values)


@settings(max_examples=300, deadline=None)
@given(features=FEATURES, data=st.data())
def test_damaged_examples_raise_nothing_else(features, data):
    raw = bytearray(serialize(features) or b"\x0a\x00")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(StoreError):
        parse_example(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


def test_a_varint_of_more_than_64_bits_keeps_the_low_ones():
    payload = b"\x0a\x0a" + b"\xff" * 9 + b"\x7f"
    feature = bytes([3 << 3 | 2, len(payload)]) + payload
    entry = b"\x0a\x01i\x12" + bytes([len(feature)]) + feature
    inner = b"\x0a" + bytes([len(entry)]) + entry
    assert parse_example(b"\x0a" + bytes([len(inner)]) + inner)["i"].tolist() == [-1]


def test_unpacked_values_parse_too():
    floats = b"".join(b"\x0d" + struct.pack("<f", x) for x in (1.5, -2.0))
    integers = b"\x08\x05\x08\x7f"
    entries = b""
    for name, number, payload in ((b"f", 2, floats), (b"i", 3, integers)):
        feature = bytes([number << 3 | 2, len(payload)]) + payload
        entry = b"\x0a" + bytes([len(name)]) + name + b"\x12" + bytes([len(feature)]) + feature
        entries += b"\x0a" + bytes([len(entry)]) + entry
    parsed = parse_example(b"\x0a" + bytes([len(entries)]) + entries)
    assert parsed["f"].tolist() == [1.5, -2.0]
    assert parsed["i"].tolist() == [5, 127]


# -- a synthetic data set ---------------------------------------------------------------------------------------------

SIZE = (24, 32, 3)


def _tensor(*shape):
    dimensions = {"dimensions": [str(n) for n in shape]} if shape else {}
    return {"tensor": {"shape": dimensions, "dtype": "float32", "encoding": "none"}}


def write_dataset(folder, episodes, *, encoding="jpeg", declared=None, change=None):
    folder.mkdir(exist_ok=True)
    image = {"image": {"shape": {"dimensions": [str(n) for n in SIZE]}, "dtype": "uint8", "encodingFormat": encoding}}
    observation = {"featuresDict": {"features": {"cam": image, "wrist": image, "state": _tensor(3)}}}
    step = {"observation": observation, "action": _tensor(2), "language_instruction": {"text": {}}}
    tree = {
        "featuresDict": {
            "features": {
                "steps": {"sequence": {"feature": {"featuresDict": {"features": step}}, "length": "-1"}},
                "episode_metadata": {"featuresDict": {"features": {"file_path": {"text": {}}}}},
            }
        }
    }
    (folder / "features.json").write_text(json.dumps(tree))
    if declared is not None:
        info = {"splits": [{"name": "train", "shardLengths": [str(declared)]}]}
        (folder / "dataset_info.json").write_text(json.dumps(info))
    rng = np.random.default_rng(0)
    encode = {
        "jpeg": lambda x: simplejpeg.encode_jpeg(x, 90, "RGB", "420"),
        "png": imagecodecs.png_encode,
        "gif": lambda x: b"GIF89a",
    }[encoding]
    records = []
    for number, length in enumerate(episodes):
        frames = rng.integers(0, 256, (2, length, *SIZE), dtype=np.uint8)
        features = {
            "steps/observation/cam": [encode(f) for f in frames[0]],
            "steps/observation/wrist": [encode(f) for f in frames[1]],
            "steps/observation/state": rng.standard_normal(3 * length).astype(np.float32).tolist(),
            "steps/action": rng.standard_normal(2 * length).astype(np.float32).tolist(),
            "steps/language_instruction": [f"do {number}".encode()] * length,
            "episode_metadata/file_path": [b"/somewhere"],
        }
        if change:
            change(features)
        records.append(features)
    write_records(folder / "toy-train.tfrecord-00000-of-00001", [serialize(f) for f in records])
    return records


def importer(**change):
    options = {
        "embodiment": make_embodiment(cameras=("front", "wrist")),
        "images": {"front": "steps/observation/cam", "wrist": "steps/observation/wrist"},
        "meta": ("episode_metadata/file_path",),
    }
    return RldsImporter(**{**options, **change})


def test_a_synthetic_data_set(tmp_path):
    records = write_dataset(tmp_path / "d", (3, 5), declared=2)
    summary = convert(source=str(tmp_path / "d"), out=str(tmp_path / "out"), data=importer(tags=("toy",), success=True))
    assert summary == {
        "store": str(tmp_path / "out"),
        "episodes": 2,
        "frames": 8,
        "instructions": {"do 0": 1, "do 1": 1},
    }
    store = EpisodeStore.open(tmp_path / "out")
    assert [(e.instruction, e.success, e.tags) for e in store.episodes] == [
        ("do 0", True, ("toy",)),
        ("do 1", True, ("toy",)),
    ]
    assert store.episodes[1].meta == {"file_path": "/somewhere", "source_index": 1}
    for camera, name in (("front", "cam"), ("wrist", "wrist")):
        streams = [s for r in records for s in r[f"steps/observation/{name}"]]
        assert [store.jpeg_bytes(camera, i) for i in range(8)] == streams
    expected = np.concatenate([np.reshape(r["steps/action"], (-1, 2)) for r in records])
    np.testing.assert_array_equal(store.lowdim("action"), expected.astype(np.float32))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_skip_first_and_png(tmp_path):
    records = write_dataset(tmp_path / "d", (3, 1), encoding="png")
    convert(source=str(tmp_path / "d"), out=str(tmp_path / "out"), data=importer(skip_first=1))
    store = EpisodeStore.open(tmp_path / "out")
    assert [e.length for e in store.episodes] == [2]  # nothing is left of the second
    first = imagecodecs.png_decode(records[0]["steps/observation/cam"][1])
    assert (
        np.corrcoef(store.read_images("front", [0])[0].ravel(), first.ravel())[0, 1] > 0.5
    )  # noise, so JPEG loses much
    np.testing.assert_array_equal(store.lowdim("state")[0], np.float32(records[0]["steps/observation/state"][3:6]))


def test_what_is_there_already(tmp_path):
    write_dataset(tmp_path / "d", (2,))
    arguments = {"source": str(tmp_path / "d"), "out": str(tmp_path / "out"), "data": importer()}
    convert(**arguments)
    with pytest.raises(StoreError, match="overwrite=true"):
        convert(**arguments)
    write_dataset(tmp_path / "d", (2, 3))
    assert convert(**arguments, overwrite=True)["episodes"] == 2
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="is no episode store"):
        convert(**{**arguments, "out": str(tmp_path / "home")}, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_places_without_data(tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(NotFoundError, match="no RLDS data at"):
        convert(source=str(tmp_path / "none"), out=out, data=importer())
    (tmp_path / "d").mkdir()
    with pytest.raises(NotFoundError, match=r"no features\.json"):
        convert(source=str(tmp_path / "d"), out=out, data=importer())
    write_dataset(tmp_path / "d" / "1.0.0", (2,))
    with pytest.raises(NotFoundError, match=r"Did you mean source=.*1\.0\.0"):
        convert(source=str(tmp_path / "d"), out=out, data=importer())
    with pytest.raises(NotFoundError, match="Did you mean 'train'"):
        convert(source=str(tmp_path / "d" / "1.0.0"), out=out, data=importer(split="trian"))
    shard = tmp_path / "d" / "1.0.0" / "toy-train.tfrecord-00000-of-00001"
    shard.rename(shard.with_name("toy-train.tfrecord-00000-of-00003"))
    with pytest.raises(StoreError, match="1 of 3 files"):
        convert(source=str(tmp_path / "d" / "1.0.0"), out=out, data=importer())
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": "steps/observation/stat"}, "Did you mean 'steps/observation/state'"),
        ({"action": "steps/observation/state"}, r"expected tensor of shape \(2,\), got tensor of \(3,\)"),
        ({"state": "steps/observation/cam"}, "expected tensor"),
        ({"instruction": "steps/action"}, "expected text"),
        ({"meta": ("episode_metadata/nothing",)}, "no feature 'episode_metadata/nothing'"),
        ({"embodiment": make_embodiment(size=(8, 8))}, r"expected image of shape \(8, 8, 3\)"),
    ],
)
def test_mappings_that_do_not_fit(tmp_path, change, words):
    write_dataset(tmp_path / "d", (2,))
    with pytest.raises(SpecMismatchError, match=words):
        convert(source=str(tmp_path / "d"), out=str(tmp_path / "out"), data=importer(**change))
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_cameras_that_are_not_mapped():
    with pytest.raises(SpecMismatchError, match="a feature for each camera"):
        importer(images={"front": "steps/observation/cam"})


def _cut(data):
    return data[: len(data) // 2]


def _flip(position):
    def change(data):
        data = bytearray(data)
        data[position] ^= 1
        return bytes(data)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_cut, "truncated"),
        (lambda data: data + b"\x01\x02", "truncated at byte"),
        (_flip(0), "length checksum"),
        (_flip(500), "does not fit its checksum"),
        (lambda data: b"PK\x03\x04" + b"zip file" * 10, "is no TFRecord file"),
        (lambda data: b"", "0 episodes, dataset_info.json says 2"),
    ],
)
def test_damaged_files(tmp_path, change, words):
    write_dataset(tmp_path / "d", (2, 2), declared=2)
    path = tmp_path / "d" / "toy-train.tfrecord-00000-of-00001"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(StoreError, match=words):
        convert(source=str(tmp_path / "d"), out=str(tmp_path / "out"), data=importer())
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("steps/action", [1.0, 2.0, 3.0], "a multiple of 2"),
        ("steps/action", [1.0, 2.0], "different numbers of steps"),
        ("steps/action", [b"words"], "expected numbers"),
        ("steps/observation/cam", [1, 2], "expected byte strings"),
        ("steps/observation/cam", [b"GIF89a", b"GIF89a"], "expected a JPEG or PNG"),
        ("steps/observation/cam", [b"\xff\xd8 cut", b"\xff\xd8 cut"], "expected a JPEG of shape"),
    ],
)
def test_records_that_do_not_fit_their_features(tmp_path, name, value, words):
    write_dataset(tmp_path / "d", (2,), change=lambda features: features.update({name: value}))
    with pytest.raises((StoreError, SpecMismatchError), match=words):
        convert(source=str(tmp_path / "d"), out=str(tmp_path / "out"), data=importer())


def test_features_json_of_something_else(tmp_path):
    for text in ("not json", "[]", "{}", '{"featuresDict": 3}', '{"tensor": {"dtype": "float32"}}'):
        (tmp_path / "features.json").write_text(text)
        with pytest.raises(StoreError, match="describes no RLDS"):
            read_features(tmp_path / "features.json")


def test_masked_crc_is_that_of_tensorflow(tmp_path):
    """A record as TensorFlow writes it: b'foo', from the crc32c alone."""
    write_records(tmp_path / "r", [b"foo"])
    data = (tmp_path / "r").read_bytes()
    crc = google_crc32c.value(b"foo")
    assert data[-4:] == struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
    summary_writer = pytest.importorskip("tensorboard.summary.writer.record_writer")
    with open(tmp_path / "theirs", "wb") as file:
        summary_writer.RecordWriter(file).write(b"foo")
    assert (tmp_path / "theirs").read_bytes() == data
    assert list(read_records(tmp_path / "theirs")) == [b"foo"]


# -- the real sample --------------------------------------------------------------------------------------------------


def bridge_importer():
    from hydra.utils import instantiate

    return instantiate(Composer().compose("convert").config.data, _convert_="all")


@needs_bridge
def test_the_bridge_sample_against_protobuf(tmp_path):
    convert(source=str(BRIDGE), out=str(tmp_path / "out"), data=bridge_importer())
    store = EpisodeStore.open(tmp_path / "out")
    assert (store.num_episodes, store.total_frames, len({e.instruction for e in store.episodes})) == (25, 250, 4)
    data, position = next(BRIDGE.glob("*.tfrecord-*")).read_bytes(), 0
    for index in range(25):
        (length,) = struct.unpack_from("<Q", data, position)
        features = Example.FromString(data[position + 12 : position + 12 + length]).features.feature
        position += length + 16
        rows = slice(10 * index, 10 * index + 10)
        for field, name in (("state", "steps/observation/state"), ("action", "steps/action")):
            expected = np.array(features[name].floatlist.value, np.float32).reshape(10, 7)
            np.testing.assert_array_equal(store.lowdim(field)[rows], expected)
        for camera in ("image_0", "image_1", "image_2"):
            streams = list(features[f"steps/observation/{camera}"].byteslist.value)
            assert [store.jpeg_bytes(camera, i) for i in range(rows.start, rows.stop)] == streams
            decoded = np.stack([imagecodecs.jpeg8_decode(s) for s in streams])
            np.testing.assert_array_equal(store.episode(index).images[camera], decoded)
        assert store.episodes[index].instruction == features["steps/language_instruction"].byteslist.value[0].decode()
        assert store.episodes[index].meta["episode_id"] == features["episode_metadata/episode_id"].int64list.value[0]
    assert position == len(data)


@needs_bridge
def test_what_the_bridge_yaml_says_of_the_data(tmp_path):
    """The facts stated in conf/data/bridge.yaml."""
    convert(source=str(BRIDGE), out=str(tmp_path / "out"), data=bridge_importer())
    store = EpisodeStore.open(tmp_path / "out")
    state, action = store.lowdim("state").reshape(25, 10, 7), store.lowdim("action").reshape(25, 10, 7)
    moved = np.diff(state, axis=1)[..., :6]
    for column in range(6):
        x, y = action[:, :-1, column].ravel(), moved[..., column].ravel()
        assert np.corrcoef(x, y)[0, 1] > 0.7
        assert 0.6 < (x * y).sum() / (x * x).sum() < 0.95
    assert np.abs(action[:, 0, :6]).max() < 1e-6
    assert np.abs(action[..., 3:6]).max() < 0.26
    assert action[..., 6].min() == 0
    assert action[..., 6].max() <= 1
    assert state[:, 1:][action[:, :-1, 6] > 0.5][:, 6].mean() > state[:, 1:][action[:, :-1, 6] < 0.5][:, 6].mean() + 0.3
