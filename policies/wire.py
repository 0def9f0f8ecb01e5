"""Messages as bytes: msgpack with numpy arrays, in openpi's format.

An array is the map ``{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [..]}``, a numpy scalar
``{b"__npgeneric__": True, b"data": value, b"dtype": ...}``, with keys of bytes. Nothing else has a meaning of its own:
no pickle, no classes, no code. Imports numpy and msgpack only, for it belongs to the client on the robot.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import msgpack
import numpy as np

from ..errors import WireError

MAX_MESSAGE = 64 * 2**20
"""Bytes of a message, unless told otherwise: a dozen raw camera images of a megapixel."""
MAX_DIMS = 8
MAX_ITEMS = 4096
"""Entries of a list or map, and of the message in all its levels together."""
MAX_TEXT = 2**16
MAX_DEPTH = 32
"""Levels of lists and maps in each other."""
_KINDS = "biuf"


def encode(message: Any) -> bytes:
    """Pack a message of maps, lists, texts, numbers and arrays.

    Raises:
        WireError: Something that cannot be sent: an array of objects, an instance of a class.
    """
    try:
        packed: bytes = msgpack.packb(message, default=_pack)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"cannot send this message: {error}") from error
    return packed


def decode(data: bytes, *, limit: int = MAX_MESSAGE) -> Any:
    """Unpack a message; arrays are read-only views of `data`.

    Raises:
        WireError: No message, too large, or one that says what is not so about its arrays.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise WireError(f"expected a binary message, got {type(data).__name__}")
    if len(data) > limit:
        raise WireError(f"expected a message of at most {limit} bytes, got {len(data)}")
    try:
        return _Reader(bytes(data)).whole()
    except WireError:
        raise
    except Exception as error:  # of struct, of UTF-8, of nesting
        raise WireError(f"expected a msgpack message, got {len(data)} bytes that are none: {error}") from error


_LENGTH = {kind: struct.Struct(form) for kind, form in zip((0xC4, 0xC5, 0xC6), (">B", ">H", ">I"))}
_LENGTH |= {kind: struct.Struct(form) for kind, form in zip((0xD9, 0xDA, 0xDB), (">B", ">H", ">I"))}
_LENGTH |= {kind: struct.Struct(form) for kind, form in zip((0xDC, 0xDD, 0xDE, 0xDF), (">H", ">I", ">H", ">I"))}
_NUMBER = {kind: struct.Struct(form) for kind, form in zip(range(0xCA, 0xD0), (">f", ">d", ">B", ">H", ">I", ">Q"))}
_NUMBER |= {kind: struct.Struct(form) for kind, form in zip(range(0xD0, 0xD4), (">b", ">h", ">i", ">q"))}
_CONSTANT = {0xC0: None, 0xC2: False, 0xC3: True}
# The three keys of an array as openpi's package and ours write them, each with the values between them left out.
_ARRAY_DATA = b"\xc4\x0b__ndarray__\xc3\xc4\x04data"
_ARRAY_DTYPE, _ARRAY_SHAPE = b"\xc4\x05dtype", b"\xc4\x05shape"


class _Reader:
    """Reads a message of msgpack (its specification of 2017, without extensions), with limits from the first byte on.

    The package reads faster, but interns every key of a map, and before Python 3.13 an interned text is never freed:
    whoever sends new keys fills a server's memory. It also copies every picture; here they are views of the message.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.view, self.place, self.items = data, memoryview(data), 0, 0

    def whole(self) -> Any:
        """The message, which ends where the data does."""
        value = _owned(self.value(0))
        if self.place != len(self.data):
            raise WireError(f"expected a msgpack message, got {len(self.data) - self.place} bytes behind one")
        return value

    def value(self, depth: int) -> Any:
        kind = self.data[self.place]
        self.place += 1
        if kind < 0x80:
            return kind
        if kind >= 0xE0:
            return kind - 0x100
        if kind < 0x90:
            return self.map(kind & 0x0F, depth)
        if kind < 0xA0:
            return self.list(kind & 0x0F, depth)
        if kind < 0xC0:
            return self.text(kind & 0x1F)
        if kind in _CONSTANT:
            return _CONSTANT[kind]
        if kind in _NUMBER:
            return self.number(_NUMBER[kind])
        if kind not in _LENGTH:
            raise WireError(f"expected no extensions of msgpack, got type 0x{kind:02x}")
        length = self.number(_LENGTH[kind])
        if kind <= 0xC6:
            return self.take(length)
        if kind <= 0xDB:
            return self.text(length)
        return self.list(length, depth) if kind <= 0xDD else self.map(length, depth)

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self.data, self.place)
        self.place += form.size
        return value

    def take(self, length: int) -> memoryview:
        end = self.place + length
        if end > len(self.data):
            raise WireError(f"expected {length} bytes, got {len(self.data) - self.place}: the message is cut off")
        found, self.place = self.view[self.place : end], end
        return found

    def text(self, length: int) -> str:
        if length > MAX_TEXT:
            raise WireError(f"expected a text of at most {MAX_TEXT} bytes, got {length}")
        end = self.place + length
        if end > len(self.data):
            self.take(length)  # which says what is wrong
        found, self.place = self.data[self.place : end].decode(), end
        return found

    def list(self, length: int, depth: int) -> list[Any]:
        self.enter(length, depth)
        values = [self.value(depth + 1) for _ in range(length)]
        return [bytes(v) if isinstance(v, memoryview) else v for v in values]

    def map(self, length: int, depth: int) -> Any:
        self.enter(length, depth)
        if length == 4 and self.data.startswith(_ARRAY_DATA, self.place):
            array = self.array()
            if array is not None:
                return array
        found: dict[Any, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if type(key) is not str:
                if type(key) is not memoryview:
                    raise WireError(f"expected texts as keys of a map, got {type(key).__name__}")
                key = bytes(key)
            found[key] = self.value(depth + 1)
        if b"__ndarray__" in found:
            return _array(found.get(b"data"), found.get(b"dtype"), found.get(b"shape"))
        if b"__npgeneric__" in found:
            return _scalar(found.get(b"data"), found.get(b"dtype"))
        for key, value in found.items():
            if isinstance(value, memoryview):
                found[key] = bytes(value)
        return found

    def array(self) -> np.ndarray | None:
        """An array whose keys stand in their usual order, read in less time; None, and nothing read, where not."""
        data, place = self.data, self.place + len(_ARRAY_DATA)
        form = _LENGTH[data[place]] if 0xC4 <= data[place] <= 0xC6 else None
        if form is None:
            return None
        (length,) = form.unpack_from(data, place + 1)
        place += 1 + form.size
        end = place + length
        text = end + len(_ARRAY_DTYPE)
        if not data.startswith(_ARRAY_DTYPE, end) or not 0xA0 < data[text] <= 0xAF:
            return None
        after = text + data[text] - 0x9F
        size = after + len(_ARRAY_SHAPE)
        if not data.startswith(_ARRAY_SHAPE, after) or not 0x90 <= data[size] <= 0x90 + MAX_DIMS:
            return None
        self.place = size + 1
        shape = [
            self.value(MAX_DEPTH) for _ in range(data[size] - 0x90)
        ]  # numbers: a list there has one level too many
        return _array(self.view[place:end], data[text + 1 : after].decode(), shape)

    def enter(self, length: int, depth: int) -> None:
        """Count before anything is made: many small parts cost far more memory than bytes."""
        self.items += length
        if self.items > MAX_ITEMS:
            raise WireError(f"expected a message of at most {MAX_ITEMS} parts")
        if depth >= MAX_DEPTH:
            raise WireError(f"expected at most {MAX_DEPTH} levels")


def _owned(value: Any) -> Any:
    """Bytes that are no array's are given out as such."""
    return bytes(value) if isinstance(value, memoryview) else value


def _pack(value: Any) -> Any:
    """Maps for what msgpack does not know."""
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind not in _KINDS:
        raise TypeError(f"expected arrays of numbers, got dtype {value.dtype}")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"expected maps, lists, texts, numbers and arrays, got {type(value).__name__}")


def _scalar(data: Any, dtype: Any) -> Any:
    if not isinstance(data, (bool, int, float)):
        raise WireError(f"expected a number for a scalar, got {type(data).__name__}")
    try:
        return _dtype(dtype).type(data)
    except (OverflowError, ValueError) as error:
        raise WireError(f"a scalar does not fit its dtype: {error}") from error


def _array(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    kind = _dtype(dtype)
    if not isinstance(data, memoryview):
        raise WireError(f"expected the bytes of an array, got {type(data).__name__}")
    # bool is an int: type() is meant
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or any(type(n) is not int or n < 0 for n in shape):
        raise WireError(f"expected a shape of at most {MAX_DIMS} sizes, got {str(shape)[:80]}")
    if math.prod(shape) * kind.itemsize != len(data) or max(shape, default=0) > max(len(data), MAX_ITEMS):
        raise WireError(f"an array of shape {shape} and dtype {kind} does not have {len(data)} bytes")
    return np.ndarray(buffer=data, dtype=kind, shape=tuple(shape))


def _dtype(name: Any) -> np.dtype[Any]:
    """Of numbers."""
    known = _KNOWN.get(name) if isinstance(name, str) else None
    if known is not None:
        return known
    try:
        dtype = np.dtype(name) if isinstance(name, str) and len(name) <= 16 else None
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.kind not in _KINDS or dtype.itemsize > 8 or dtype.shape:
        raise WireError(f"expected a dtype of numbers, got {str(name)[:40]!r}")
    return dtype


_KNOWN: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("|u1", "<f4", "<f8", "<i4", "<i8", "|b1")}
"""Of what robots send; others are looked up."""
