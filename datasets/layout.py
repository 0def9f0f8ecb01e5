"""Where things lie in a store, the zarr v3 metadata of its arrays, and durable file operations.

A store is a plain zarr v3 hierarchy plus a commit log::

    zarr.json                            group; attributes.brachium = {format, id}
    _log/00000000000000000012.json       one commit; never rewritten
    _log/00000000000000000064.ckpt.parquet
    segments/<ulid>/zarr.json            immutable group; attributes: embodiment, digest, episodes, source
        images/<camera>/c/<k>/0/0/0      shard of JPEG (or raw) frames with its index at the end
        lowdim/<field>/c/<k>/0           rows of one field, then a crc32c
    staging/<ulid>/                      a segment that is being recorded, with journal.bin
    cache/                               may be deleted at any time

Source: the zarr v3 core specification and its ``sharding_indexed`` and ``crc32c`` codecs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from ..errors import DiskSpaceError, StoreError

FORMAT = "1"
KEY = "brachium"
LOG, SEGMENTS, STAGING, CACHE = "_log", "segments", "staging", "cache"
JOURNAL = "journal.bin"
CHUNK_BYTES = 4 << 20
SHARD_FRAMES = 1024


def crc32c(data: Any) -> int:
    """Castagnoli CRC of any read-only buffer."""
    return int(google_crc32c.value(data))


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn 'no space left' and 'quota exceeded' into DiskSpaceError."""
    try:
        yield
    except DiskSpaceError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(f"no space left for {where}: free some space, then go on") from error
        raise


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data` to `fd`; a short write is continued."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]


def write_file(path: Path, data: bytes, *, fsync: bool) -> None:
    """Write a new file, through to the disk when `fsync`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(fd, data)
        if fsync:
            os.fsync(fd)
    finally:
        os.close(fd)


def fsync_dir(path: Path) -> None:
    """Make the names in folder `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON type")


def dump_json(data: Any, *, indent: int | None = None) -> bytes:
    """Canonical JSON: sorted keys, no NaN; numpy numbers and arrays become plain ones.

    Raises:
        StoreError: A value that JSON cannot hold.
    """
    separators = None if indent else (",", ":")
    try:
        return json.dumps(
            data, sort_keys=True, allow_nan=False, separators=separators, indent=indent, default=_plain
        ).encode()
    except (TypeError, ValueError) as error:
        raise StoreError(f"expected values that JSON can hold, got {data!r:.200}: {error}") from error


def group_json(attributes: dict[str, Any]) -> bytes:
    """The zarr.json of a group."""
    return dump_json({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1)


def _array_json(
    shape: tuple[int, ...],
    dtype: np.dtype,
    chunk: tuple[int, ...],
    codecs: list[dict[str, Any]],
    names: tuple[str, ...],
) -> bytes:
    fill: Any = False if dtype.kind == "b" else 0.0 if dtype.kind == "f" else 0
    return dump_json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill,
            "codecs": codecs,
            "dimension_names": list(names),
            "attributes": {},
        },
        indent=1,
    )


def bytes_codec(dtype: np.dtype) -> dict[str, Any]:
    """The `bytes` codec; one-byte types state no byte order."""
    if dtype.itemsize == 1:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}


def image_array_json(
    frames: int, shape: tuple[int, ...], shard: int, dtype: np.dtype, codecs: list[dict[str, Any]], group: int = 1
) -> bytes:
    """zarr.json of images (frames, H, W, C): `group` frames an inner chunk, `shard` frames a file, index at its end."""
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [group, *shape],
            "codecs": [*codecs, {"name": "crc32c"}],
            "index_codecs": [bytes_codec(np.dtype("<u8")), {"name": "crc32c"}],
            "index_location": "end",
        },
    }
    names = ("frame", "height", "width", "channel")
    return _array_json((frames, *shape), dtype, (shard, *shape), [sharding], names)


def lowdim_array_json(frames: int, columns: int, rows: int, dtype: np.dtype) -> bytes:
    """zarr.json of a low-dimensional array (frames, columns) in chunks of `rows` rows."""
    codecs = [bytes_codec(dtype), {"name": "crc32c"}]
    return _array_json((frames, columns), dtype, (rows, columns), codecs, ("frame", "column"))


def write_lowdim(folder: Path, values: np.ndarray, *, fsync: bool) -> None:
    """Write `values` (N, D) as a zarr array in `folder`."""
    dtype = values.dtype.newbyteorder("<")
    frames, columns = values.shape
    rows = max(1, min(frames, CHUNK_BYTES // max(1, columns * dtype.itemsize)))
    for k in range(-(-frames // rows)):
        chunk = values[k * rows : (k + 1) * rows].astype(dtype, copy=False)
        if len(chunk) < rows:  # zarr chunks at the edge are full size
            chunk = np.concatenate([chunk, np.zeros((rows - len(chunk), columns), dtype)])
        data = np.ascontiguousarray(chunk).tobytes()
        target = folder / "c" / str(k)
        target.mkdir(parents=True, exist_ok=True)
        write_file(target / "0", data + crc32c(data).to_bytes(4, "little"), fsync=fsync)
        if fsync:
            fsync_dir(target)
    if fsync and frames:
        fsync_dir(folder / "c")
    write_file(folder / "zarr.json", lowdim_array_json(frames, columns, rows, dtype), fsync=fsync)


def read_lowdim(folder: Path, frames: int, columns: int, dtype: np.dtype) -> np.ndarray:
    """Read a low-dimensional array (N, D) written by `write_lowdim`, checking every crc.

    Raises:
        StoreError: A chunk that is absent, short, or does not fit its crc, or an array of another shape.
    """
    little = dtype.newbyteorder("<")
    meta = read_json(folder / "zarr.json", "array metadata")
    try:
        rows = int(meta["chunk_grid"]["configuration"]["chunk_shape"][0])
        found = (tuple(meta["shape"]), meta["data_type"], [codec["name"] for codec in meta["codecs"]])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise StoreError(f"damaged store: {folder / 'zarr.json'} lacks {error}") from error
    expected = ((frames, columns), dtype.name, ["bytes", "crc32c"])
    if found != expected or rows < 1:
        raise StoreError(f"damaged store: {folder} holds {found}, expected {expected}")
    size = rows * columns * little.itemsize
    parts = []
    for k in range(-(-frames // rows)):
        path = folder / "c" / str(k) / "0"
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise StoreError(f"damaged store: {path} is missing") from error
        if len(data) != size + 4 or crc32c(data[:size]) != int.from_bytes(data[size:], "little"):
            raise StoreError(f"damaged store: {path} does not fit its checksum")
        parts.append(np.frombuffer(data, little, count=rows * columns).reshape(rows, columns))
    joined = np.concatenate(parts)[:frames] if parts else np.zeros((0, columns), little)
    return np.ascontiguousarray(joined.astype(dtype, copy=False))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object, or raise StoreError that names `what` it was to be."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StoreError(f"damaged store: {what} {path} is missing") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise StoreError(f"damaged store: {what} {path} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise StoreError(f"damaged store: {what} {path} holds {type(data).__name__}, expected an object")
    return data
