"""Messages as bytes: msgpack with numpy arrays, in openpi's format.

An array is the map ``{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [..]}``, a numpy scalar
``{b"__npgeneric__": True, b"data": value, b"dtype": ...}``, with keys of bytes. Nothing else has a meaning of its own:
no pickle, no classes, no code. Imports numpy and msgpack only, for it belongs to the client on the robot.
"""

from __future__ import annotations

import math
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
    reader = _Reader()
    try:
        return msgpack.unpackb(
            data,
            object_hook=reader.map,
            list_hook=reader.list,
            max_str_len=MAX_TEXT,
            max_bin_len=limit,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except WireError:
        raise
    except Exception as error:  # msgpack raises classes of its own, ValueError, UnicodeDecodeError, RecursionError ...
        raise WireError(f"expected a msgpack message, got {len(data)} bytes that are none: {error}") from error


class _Reader:
    """Counts while a message is unpacked: many small parts cost far more memory than bytes."""

    def __init__(self) -> None:
        self.items = 0

    def list(self, value: list[Any]) -> list[Any]:
        self._count(len(value))
        return value

    def map(self, value: dict[Any, Any]) -> Any:
        self._count(len(value))
        return _unpack(value)

    def _count(self, parts: int) -> None:
        self.items += parts
        if self.items > MAX_ITEMS:
            raise WireError(f"expected a message of at most {MAX_ITEMS} parts")


def _pack(value: Any) -> Any:
    """Maps for what msgpack does not know."""
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind not in _KINDS:
        raise TypeError(f"expected arrays of numbers, got dtype {value.dtype}")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"expected maps, lists, texts, numbers and arrays, got {type(value).__name__}")


def _unpack(value: dict[Any, Any]) -> Any:
    """Arrays for maps that mean one."""
    if b"__ndarray__" in value:
        return _array(value)
    if b"__npgeneric__" in value:
        data = value.get(b"data")
        if not isinstance(data, (bool, int, float)):
            raise WireError(f"expected a number for a scalar, got {type(data).__name__}")
        try:
            return _dtype(value).type(data)
        except (OverflowError, ValueError) as error:
            raise WireError(f"a scalar does not fit its dtype: {error}") from error
    return value


def _array(value: dict[Any, Any]) -> np.ndarray:
    data, shape = value.get(b"data"), value.get(b"shape")
    dtype = _dtype(value)
    if not isinstance(data, bytes):
        raise WireError(f"expected the bytes of an array, got {type(data).__name__}")
    # bool is an int: type() is meant
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or any(type(n) is not int or n < 0 for n in shape):
        raise WireError(f"expected a shape of at most {MAX_DIMS} sizes, got {str(shape)[:80]}")
    if math.prod(shape) * dtype.itemsize != len(data) or max(shape, default=0) > max(len(data), MAX_ITEMS):
        raise WireError(f"an array of shape {shape} and dtype {dtype} does not have {len(data)} bytes")
    return np.ndarray(buffer=data, dtype=dtype, shape=tuple(shape))


def _dtype(value: dict[Any, Any]) -> np.dtype[Any]:
    name = value.get(b"dtype")
    try:
        dtype = np.dtype(name) if isinstance(name, str) and len(name) <= 16 else None
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.kind not in _KINDS or dtype.itemsize > 8 or dtype.shape:
        raise WireError(f"expected a dtype of numbers, got {str(name)[:40]!r}")
    return dtype
