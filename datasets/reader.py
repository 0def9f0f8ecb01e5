"""Reads one segment straight from its files: shard index parsed once, memory-mapped, decoded without zarr."""

from __future__ import annotations

import mmap
import resource
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StoreError, did_you_mean
from . import image
from .layout import KEY, crc32c, read_json, read_lowdim


def _default_open_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 512 if soft == resource.RLIM_INFINITY else int(min(512, max(16, soft // 4)))


class MappedFiles:
    """At most `limit` memory-mapped files; the least recently used is let go. Safe to use from several threads.

    A mapping costs a file descriptor, and a store of teleoperated episodes has thousands of shards.
    """

    def __init__(self, *, limit: int | None = None) -> None:
        self._limit = limit or _default_open_files()
        self._files: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str) -> np.ndarray:
        """Return the bytes of `path` as a read-only uint8 array; whoever holds it keeps the mapping alive.

        Raises:
            StoreError: A file that is missing or empty.
        """
        with self._lock:
            mapped = self._files.get(path)
            if mapped is not None:
                self._files.move_to_end(path)
                return mapped
            try:
                with open(path, "rb") as file:
                    mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            except (FileNotFoundError, ValueError) as error:
                raise StoreError(f"damaged store: {path}: {error}") from error
            self._files[path] = mapped
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
            return mapped


class ImageArray:
    """The frames of one camera in one segment.

    Attributes:
        frames: Number of frames N.
        shape: Shape of a frame, (H, W, 3).
        jpeg: True when frames are JPEG streams, False for raw ones.
    """

    def __init__(self, folder: Path, files: MappedFiles) -> None:
        self._folder = folder
        self._files = files
        meta = read_json(folder / "zarr.json", "array metadata")
        try:
            self.frames, *rest = meta["shape"]
            self.shape: tuple[int, ...] = tuple(rest)
            self._shard = int(meta["chunk_grid"]["configuration"]["chunk_shape"][0])
            sharding = meta["codecs"][0]
            codecs = [codec["name"] for codec in sharding["configuration"]["codecs"]]
            chunk = tuple(sharding["configuration"]["chunk_shape"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise StoreError(f"damaged store: {folder / 'zarr.json'} lacks {error}") from error
        known = (["imagecodecs_jpeg", "crc32c"], ["bytes", "crc32c"])
        if sharding["name"] != "sharding_indexed" or codecs not in known or chunk != (1, *self.shape):
            raise StoreError(
                f"{folder} is encoded as {sharding['name']}{codecs} in chunks {chunk}, which the direct reader "
                "does not know; zarr.open reads it"
            )
        self.jpeg = codecs[0] == "imagecodecs_jpeg"
        shards = range(-(-self.frames // self._shard))
        self._paths = [str(folder / "c" / str(k) / "0" / "0" / "0") for k in shards]
        self._index: np.ndarray | None = None
        self._lock = threading.Lock()

    def _load_index(self) -> np.ndarray:
        """Return uint64 (N, 2) of (offset, length) in the shard of each frame."""
        with self._lock:
            if self._index is None:
                parts = []
                for path in self._paths:
                    mapped = self._files.get(path)
                    tail = mapped[max(0, len(mapped) - 16 * self._shard - 4) :].tobytes()
                    parts.append(image.decode_index(tail, self._shard, path))
                joined = np.concatenate(parts) if parts else np.zeros((0, 2), np.uint64)
                self._index = joined[: self.frames]
            return self._index

    def encoded(self, frame: int) -> np.ndarray | None:
        """Return the stored bytes of `frame`, uint8 (n,), after checking their crc; None if absent (all zeros)."""
        index = self._index if self._index is not None else self._load_index()
        offset, length = index[frame].tolist()
        if offset == image.MISSING:
            return None
        path = self._paths[frame // self._shard]
        mapped = self._files.get(path)
        data = mapped[offset : offset + length]
        if len(data) != length or length < 4 or crc32c(data[:-4]) != int.from_bytes(data[-4:].tobytes(), "little"):
            raise StoreError(f"damaged store: frame {frame} in {path} does not fit its checksum")
        return data[:-4]

    def read_into(self, frame: int, out: np.ndarray) -> None:
        """Decode `frame` into `out` (H, W, 3) uint8."""
        data = self.encoded(frame)
        if data is None:
            out[...] = 0
        else:
            try:
                image.decode_into(data, out, jpeg=self.jpeg)
            except StoreError as error:
                raise StoreError(f"damaged store: frame {frame} in {self._folder}: {error}") from error


class SegmentReader:
    """One immutable segment: its attributes, low-dimensional arrays and images.

    Attributes:
        path: Folder of the segment.
        attributes: What the writer recorded: embodiment, digest, extras, episodes with their meta.
        frames: Number of steps N.

    Raises:
        StoreError: A segment that is missing or damaged.
    """

    def __init__(self, path: Path, *, files: MappedFiles | None = None) -> None:
        self.path = path
        self._files = files or MappedFiles()
        group = read_json(path / "zarr.json", "segment metadata")
        try:
            self.attributes: dict[str, Any] = group["attributes"][KEY]
            self.frames = int(self.attributes["frames"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"damaged store: segment {path} lacks {error}") from error
        self._cameras: dict[str, ImageArray] = {}

    def camera(self, name: str) -> ImageArray:
        """Return the images of camera `name`."""
        array = self._cameras.get(name)
        if array is None:
            folder = self.path / "images" / name
            if not folder.is_dir():
                there = [p.name for p in (self.path / "images").glob("*") if p.is_dir()]
                raise StoreError(f"segment {self.path} has no camera {name!r}. {did_you_mean(name, there)}")
            array = self._cameras.setdefault(name, ImageArray(folder, self._files))
        return array

    def lowdim(self, field: str, columns: int, dtype: np.dtype) -> np.ndarray:
        """Return the array (N, D) of `field`."""
        return read_lowdim(self.path / "lowdim" / field, self.frames, columns, dtype)

    def read_images(self, camera: str, frames: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Decode `frames` (n,) of `camera` into `out`, uint8 (n, H, W, 3)."""
        array = self.camera(camera)
        if out is None:
            out = np.empty((len(frames), *array.shape), np.uint8)
        for i, frame in enumerate(np.asarray(frames).tolist()):
            array.read_into(frame, out[i])
        return out
