"""TFRecord files and tf.train.Example messages, without TensorFlow.

A record is ``u64 length, u32 masked crc32c of the length, data, u32 masked crc32c of the data``, little-endian; the
mask is ``rotate_right(crc, 15) + 0xa282ead8`` (tensorflow/core/lib/io/record_writer.h). An Example is
``{features: {feature: map<string, bytes_list | float_list | int64_list>}}`` (tensorflow/core/example/example.proto).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...errors import NotFoundError, StoreError
from ..layout import crc32c

Value = list[bytes] | np.ndarray
"""A feature: byte strings, or float32 (n,), or int64 (n,)."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def masked_crc(data: bytes) -> int:
    """CRC of TFRecord framing."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFF_FFFF


def read_records(path: Path) -> Iterator[bytes]:
    """Yield the records of one file.

    Raises:
        NotFoundError: No such file.
        StoreError: A truncated file or a wrong checksum; the message says at which byte.
    """
    if not path.is_file():
        raise NotFoundError(f"no TFRecord file at {path}")
    size, position = path.stat().st_size, 0
    with open(path, "rb") as file:
        while position < size:
            head = file.read(12)
            if len(head) < 12:
                raise StoreError(f"{path} is truncated at byte {position}: download it again")
            length, checksum = struct.unpack("<QI", head)
            if masked_crc(head[:8]) != checksum:
                raise StoreError(f"{path} is no TFRecord file, or damaged at byte {position} (length checksum)")
            if position + 16 + length > size:
                raise StoreError(f"{path} is truncated: the record at byte {position} needs {length} bytes")
            data = file.read(length)
            (checksum,) = struct.unpack("<I", file.read(4))
            if masked_crc(data) != checksum:
                raise StoreError(f"{path} is damaged: the record at byte {position} does not fit its checksum")
            position += 16 + length
            yield data


def write_records(path: str | os.PathLike[str], records: list[bytes]) -> None:
    """Write a TFRecord file; the inverse of `read_records`."""
    with open(path, "wb") as file:
        for data in records:
            head = struct.pack("<Q", len(data))
            file.write(head + struct.pack("<I", masked_crc(head)) + data + struct.pack("<I", masked_crc(data)))


def parse_example(data: bytes) -> dict[str, Value]:
    """Parse a serialized tf.train.Example into feature name -> value. An empty feature is an empty list.

    Raises:
        StoreError: Bytes that are no such message.
    """
    found: dict[str, Value] = {}
    try:
        for features in _chunks(memoryview(data), 1):
            for entry in _chunks(features, 1):
                key, value = "", memoryview(b"")
                for number, kind, payload in _fields(entry):
                    if kind == _BYTES and number == 1:
                        key = bytes(payload).decode()
                    elif kind == _BYTES and number == 2:
                        value = payload
                found[key] = _feature(value)
    except (IndexError, ValueError, struct.error) as error:
        raise StoreError(f"record is no tf.train.Example: {error}") from error
    return found


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return (value, next position)."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position  # as protobuf does with bits beyond the 64th
        shift += 7
        if shift > 63:
            raise ValueError("varint longer than 10 bytes")


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Yield (field number, wire type, payload) of a message; a varint's payload is its own bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            stop = _varint(data, position)[1]
        elif kind == _BYTES:
            length, position = _varint(data, position)
            stop = position + length
        elif kind in (_FIXED32, _FIXED64):
            stop = position + (4 if kind == _FIXED32 else 8)
        else:
            raise ValueError(f"unknown wire type {kind}")
        if stop > len(data):
            raise ValueError("field longer than its message")
        yield number, kind, data[position:stop]
        position = stop


def _chunks(data: memoryview, wanted: int) -> Iterator[memoryview]:
    for number, kind, payload in _fields(data):
        if number == wanted and kind == _BYTES:
            yield payload


def _feature(data: memoryview) -> Value:
    """Parse a Feature: field 1 BytesList, 2 FloatList, 3 Int64List; their values packed or not."""
    for number, kind, payload in _fields(data):
        if kind != _BYTES:
            continue
        values = list(_fields(payload))
        if number == 1:
            return [bytes(v) for field, how, v in values if field == 1 and how == _BYTES]
        if number == 2:
            return np.frombuffer(b"".join(bytes(v) for field, _, v in values if field == 1), "<f4").astype(np.float32)
        if number == 3:
            return np.array([n for field, _, v in values if field == 1 for n in _varints(v)], np.int64)
    return []


def _varints(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value - (1 << 64) if value >= 1 << 63 else value
