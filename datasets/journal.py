"""The journal of a recording: what the bytes of a torn segment mean, so that they can be saved.

After the magic come records of ``u32 length, u32 crc32c, payload``, where the first byte of a payload is its kind:

- ``H`` header, JSON: host, pid, schema, profile, layout of the steps
- ``B`` begin of an episode, JSON: id, instruction, tags, meta
- ``S`` step: (offset u64, length u32, crc32c u32) a camera or map, then the low-dimensional fields, little-endian;
  the offset of a frame that is not there is all ones
- ``E`` end of an episode, JSON: success

A discarded episode is cut off again, which works on a full disk too.

While its writer lives it holds an exclusive ``flock`` on the journal; the kernel lets go of it however the writer dies.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .layout import crc32c, dump_json, write_all

MAGIC = b"BRCHJRN1"
PLACE = struct.Struct("<QII")
_HEAD = struct.Struct("<II")


class Journal:
    """The journal of one staging folder, open for appending and locked."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._size = 0
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self._write(MAGIC)
        self.append(b"H", dump_json(header))

    def append(self, kind: bytes, payload: bytes = b"") -> None:
        """Append one record; a record that cannot be written whole is taken back."""
        body = kind + payload
        self._write(_HEAD.pack(len(body), crc32c(body)) + body)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._size

    def truncate(self, size: int) -> None:
        """Forget every record after the first `size` bytes."""
        os.ftruncate(self._fd, size)
        self._size = size

    def _write(self, data: bytes) -> None:
        try:
            write_all(self._fd, data)
        except BaseException:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    def close(self) -> None:
        """Close the file and let go of its lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True)
class Step:
    """One recorded step.

    Attributes:
        places: Camera or map -> (offset, length with crc, crc32c of the frame) in its shard.
        values: Field -> its columns (D,).
    """

    places: dict[str, tuple[int, int, int]]
    values: dict[str, np.ndarray]


@dataclass
class JournalEpisode:
    """One episode that was begun.

    Attributes:
        about: What `begin` was told: id, instruction, tags, meta.
        steps: Its whole steps.
        ended: Whether it was finished; `success` means nothing before.
        success: What `end` was told.
    """

    about: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    ended: bool = False
    success: bool | None = None


def read_header(path: Path) -> dict[str, Any] | None:
    """Return the header of a journal, or None when it is not there or not whole."""
    try:
        for kind, payload in _records(path):
            return json.loads(payload) if kind == b"H" else None  # type: ignore[no-any-return]
    except (OSError, ValueError):
        pass
    return None


def read_journal(path: Path) -> tuple[dict[str, Any], list[JournalEpisode]] | None:
    """Return header and episodes up to the last whole record, or None when there is no header."""
    header: dict[str, Any] | None = None
    episodes: list[JournalEpisode] = []
    try:
        for kind, payload in _records(path):
            if kind == b"H":
                header = json.loads(payload)
            elif header is None:
                return None
            elif kind == b"B":
                episodes.append(JournalEpisode(json.loads(payload)))
            elif kind == b"S":
                episodes[-1].steps.append(_step(header, payload))
            elif kind == b"E":
                episodes[-1].ended, episodes[-1].success = True, json.loads(payload)["success"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return None if header is None else (header, episodes)


def _records(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield (kind, payload) until the end, or a record that is torn."""
    data = path.read_bytes()
    if data[: len(MAGIC)] != MAGIC:
        return
    position = len(MAGIC)
    while position + _HEAD.size < len(data):
        length, checksum = _HEAD.unpack_from(data, position)
        body = data[position + _HEAD.size : position + _HEAD.size + length]
        if len(body) != length or not length or crc32c(body) != checksum:
            return
        yield body[:1], body[1:]
        position += _HEAD.size + length


def _step(header: Mapping[str, Any], payload: bytes) -> Step:
    places, position = {}, 0
    for name in header["images"]:
        places[name] = PLACE.unpack_from(payload, position)
        position += PLACE.size
    values = {}
    for name, dtype, columns in header["fields"]:
        values[name] = np.frombuffer(payload, dtype, columns, position)
        position += values[name].nbytes
    if position != len(payload):
        raise ValueError(f"a step of {len(payload)} bytes, expected {position}")
    return Step(places, values)
