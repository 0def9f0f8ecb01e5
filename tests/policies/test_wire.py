"""The wire format against bytes that openpi's published client made, and against hostile bytes."""

import contextlib
import gc
import itertools
import json
import sys
import tracemalloc
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from brachium.errors import WireError
from brachium.policies.wire import MAX_ITEMS, decode, encode

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "openpi.json").read_text())
IMAGE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
MEANING = {
    "empty metadata": {},
    "reset pose": {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]},
    "int": 1,
    "float": 1.5,
    "bool": True,
    "text": "hi",
    "bytes": b"\x00\x01",
    "none": None,
    "tuple": (1, 2),
    "np.bool": np.bool_(True),
    "np.int64": np.int64(7),
    "np.float32": np.float32(1.5),
    "np.float16": np.float16(0.5),
    "np.float64": np.float64(1.5),
    "uint16 scalar of big-endian": np.array([258], ">u2")[0],
    "float32": np.array([1, -2, 0.5], np.float32),
    "float32 2d": np.array([[1, 2], [3, 4]], np.float32),
    "int64": np.array([1, -2], np.int64),
    "bool array": np.array([True, False]),
    "image": IMAGE,
    "image channels first": IMAGE.transpose(2, 0, 1),
    "fortran order": np.asfortranarray(np.array([[1, 2], [3, 4]], np.int16)),
    "0-d": np.array(1.0),
    "empty": np.zeros(0, np.float32),
    "empty 2d": np.zeros((0, 7), np.float32),
    "big-endian": np.array([1, 2], ">f4"),
    "request": {
        "state": np.array([1.0], np.float32),
        "images": {"cam_high": np.zeros((3, 1, 1), np.uint8)},
        "prompt": "go",
    },
    "reply": {
        "actions": np.zeros((2, 1), np.float32),
        "policy_timing": {"infer_ms": 1.0},
        "server_timing": {"infer_ms": 2.0, "prev_total_ms": 3.0},
    },
}


def same(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b and type(a) is type(b)


@pytest.mark.parametrize("name", MEANING)
def test_bytes_are_those_of_the_published_client_both_ways(name):
    data, value = bytes.fromhex(GOLDENS["valid"][name]), MEANING[name]
    assert encode(value) == data
    if isinstance(value, np.float64):
        value = float(value)  # goes out as a plain float
    assert same(value, decode(data))


def test_every_golden_is_used():
    assert set(MEANING) == set(GOLDENS["valid"])


@pytest.mark.parametrize("name", [*GOLDENS["malformed"], *GOLDENS["texts"]])
def test_arrays_that_are_none_are_refused(name):
    """The published decoder takes some of these, arrays of objects among them."""
    data = bytes.fromhex({**GOLDENS["malformed"], **GOLDENS["texts"]}[name])
    if name == "str-keyed marker":
        assert isinstance(decode(data), dict)
        return
    with pytest.raises(WireError):
        decode(data)


messages = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(allow_nan=False),
        st.text(max_size=20),
        st.binary(max_size=20),
        hnp.arrays(
            st.sampled_from(["<f4", ">f8", "|u1", "<i8", "|b1", "<f2"]),
            hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
        ),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)


@given(messages)
def test_what_is_sent_is_what_arrives(message):
    assert same(message, decode(encode(message)))


@settings(max_examples=400)
@given(messages, st.data())
def test_damaged_messages_are_refused_or_are_messages(message, data):
    """Truncated, extended or with bytes changed: a WireError or another message, nothing else."""
    good = bytearray(encode({"x": message}))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(good) - 1))
        good[where] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    for bad in (bytes(good), bytes(good[:cut]), bytes(good) + b"\x00"):
        with contextlib.suppress(WireError):
            decode(bad)


@settings(max_examples=400)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_are_messages(data):
    with contextlib.suppress(WireError):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of four thousand million
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 200_000,  # nested without end
        b"\x81\xa1x" * 100_000,
        msgpack.packb([[1] * 4000] * 4000),  # sixteen million small parts
        msgpack.packb(msgpack.ExtType(4, b"x" * 20)),
        msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [0, 2**40]}),
        msgpack.packb({b"__ndarray__": True, b"data": b"ab", b"dtype": "<f4,<f4", b"shape": [1]}),
        msgpack.packb({b"__ndarray__": True, b"data": b"ab", b"dtype": "O" * 10**4, b"shape": [1]}),
        msgpack.packb({b"__npgeneric__": True, b"data": 2**63, b"dtype": "|i1"}),
        msgpack.packb({b"__npgeneric__": True, b"data": [1], b"dtype": "<f4"}),
        msgpack.packb({1: 2}),
        msgpack.packb("x" * 100_000),
    ],
    ids=lambda data: f"{data[:6].hex()}-{len(data)}",
)
def test_bombs_cost_no_memory(data):
    tracemalloc.start()
    with pytest.raises(WireError):
        decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


def test_limits_are_told():
    with pytest.raises(WireError, match="at most 10 bytes, got 11"):
        decode(b"x" * 11, limit=10)
    with pytest.raises(WireError, match=f"at most {MAX_ITEMS} parts"):
        decode(msgpack.packb([[1] * 4000] * 4))
    with pytest.raises(WireError, match="binary"):
        decode("text")


@pytest.mark.parametrize("value", [object(), np.array(["a"]), np.array([object()]), {1j}, np.complex64(1), 2**70])
def test_what_cannot_be_sent_says_so(value):
    with pytest.raises(WireError, match="cannot send"):
        encode({"x": value})


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.floats(allow_nan=False, width=32)
    | st.text(max_size=40)
    | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=8) | st.binary(max_size=8), inner, max_size=20)
    ),
    max_leaves=40,
)


def theirs(data):
    return msgpack.unpackb(data, max_ext_len=0, strict_map_key=True)


@given(plain, st.booleans())
def test_it_reads_what_the_package_reads(value, single):
    try:
        data = msgpack.packb(value, use_single_float=single)
    except OverflowError:  # a float that single precision does not hold
        reject()
    assert same_exactly(decode(data), theirs(data))


@pytest.mark.parametrize("size", [0, 15, 16, 31, 32, 255, 256, 4000])
def test_lengths_of_every_form_are_read(size):
    value = {"text": "ä" * size, "bytes": b"x" * size, "list": [-k for k in range(size)], "long": b"y" * (20 * size)}
    assert decode(msgpack.packb(value)) == value
    keys = {f"{k}": k << 20 for k in range(size)}
    assert decode(msgpack.packb(keys)) == keys


@settings(max_examples=400)
@given(plain, st.data())
def test_it_refuses_what_the_package_refuses_and_reads_the_rest_alike(value, data):
    raw = bytearray(msgpack.packb(value))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    raw = bytes(raw[: data.draw(st.integers(1, len(raw)))])
    if b"__n" in raw:
        return
    try:
        expected = theirs(raw)
    except Exception:
        with pytest.raises(WireError):
            decode(raw)
    else:
        assert same_exactly(decode(raw), expected)


def same_exactly(a, b):
    """Equal, types and not-a-number included; -0.0 is not 0.0."""
    return repr(a) == repr(b)


def test_keys_are_not_kept():
    """The package interns keys, which before Python 3.13 are then never freed: 20 000 of them here."""
    decode(msgpack.packb({"warm": 1}))
    gc.collect()
    before = sys.getallocatedblocks()
    for k in range(20_000):
        decode(msgpack.packb({f"a key that nobody knows {k}": 1}))
    gc.collect()
    assert sys.getallocatedblocks() - before < 2_000


def test_pictures_are_views_of_the_message_that_cannot_be_written():
    message = encode({"image": np.arange(300_000, dtype=np.uint8)})
    tracemalloc.start()
    image = decode(message)["image"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000, "it was copied"
    np.testing.assert_array_equal(image, np.arange(300_000, dtype=np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        image[0] = 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x81\x01\x02", "texts as keys"),
        (b"\x81\xc0\x02", "texts as keys"),
        (b"\xc7\x01\x05x", "extensions"),
        (b"\xd4\x05x", "extensions"),
        (b"\x01\x02", "behind"),
        (b"\xc4\x05ab", "cut off"),
        (b"\x91" * 40 + b"\x01", "levels"),
        (b"\xc1", "extensions"),
        (b"", "none"),
    ],
)
def test_what_is_wrong_is_said(data, said):
    with pytest.raises(WireError, match=said):
        decode(data)


@pytest.mark.parametrize("size", [0, 1, 300, 70_000])
def test_arrays_are_read_in_whatever_order_their_keys_stand(size):
    array = np.arange(size, dtype=np.uint8).reshape(1, size, 1)
    parts = {
        b"__ndarray__": True,
        b"data": array.tobytes(),
        b"dtype": array.dtype.str,
        b"shape": array.shape,
    }
    for order in itertools.permutations(parts):
        found = decode(msgpack.packb({"a": {key: parts[key] for key in order}, "b": 1}))
        assert found["b"] == 1
        np.testing.assert_array_equal(found["a"], array)


@pytest.mark.parametrize("shape", [[[2]], ["2"], [2.0], [-2], [True, 2], {"a": 2}, 2, None, [1] * 9, [2**64 - 1]])
def test_shapes_that_are_none_are_refused(shape):
    part = {b"__ndarray__": True, b"data": b"ab", b"dtype": "|u1", b"shape": shape}
    with pytest.raises(WireError):
        decode(msgpack.packb(part))


def test_an_array_cut_off_anywhere_is_refused():
    whole = encode({"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    for end in range(len(whole)):
        with pytest.raises(WireError):
            decode(whole[:end])
