"""Reads one segment straight from its files, without zarr: metadata, shard indices, mapped files."""

from __future__ import annotations

import mmap
import os
import resource
import struct
import threading
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BrachiumError, StoreError, did_you_mean
from . import image
from .image import ImageProfile, image_profile
from .layout import KEY, crc32c, read_json, read_lowdim
from .schema import StoreSchema

_CRC = struct.Struct("<I")


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
    """The frames of one camera or map in one segment.

    Attributes:
        frames: Number of frames N.
        shape: Shape of a frame, (H, W, C).
        dtype: Of the pixels.
        shard: Frames a file.
        kind: How a frame is decoded, as `image.decode_into` takes it.
        group: Frames a chunk; 1 but for videos.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = read_json(folder / "zarr.json", "array metadata")
        try:
            self.frames, *rest = meta["shape"]
            self.shape: tuple[int, ...] = tuple(rest)
            self.dtype = np.dtype(meta["data_type"])
            self.shard = int(meta["chunk_grid"]["configuration"]["chunk_shape"][0])
            sharding = meta["codecs"][0]
            *codecs, last = [codec["name"] for codec in sharding["configuration"]["codecs"]]
            chunk = tuple(sharding["configuration"]["chunk_shape"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise StoreError(f"damaged store: {folder / 'zarr.json'} lacks {error}") from error
        kind = image.decoder(codecs)
        self.group = int(chunk[0]) if chunk else 0
        grouped = self.group == 1 or (kind == "video" and self.group > 1 and self.shard % self.group == 0)
        if sharding["name"] != "sharding_indexed" or last != "crc32c" or kind is None or not grouped:
            raise StoreError(
                f"{folder} is encoded as {sharding['name']}{[*codecs, last]} in chunks {chunk}, which the direct "
                "reader does not know; zarr.open reads it"
            )
        self.kind = kind

    def path(self, shard: int) -> str:
        """The file of shard number `shard`."""
        return shard_path(self.folder, shard)

    def load_index(self) -> np.ndarray:
        """Return uint64 (N, 2): (offset, length with crc) of each frame in its shard; `image.MISSING` where absent.

        Raises:
            StoreError: A file that is missing, short, or whose index does not fit its crc.
        """
        parts = []
        chunks = self.shard // self.group
        for k in range(-(-self.frames // self.shard)):
            path, size = self.path(k), 16 * chunks + 4
            try:
                with open(path, "rb") as file:
                    file.seek(max(0, file.seek(0, os.SEEK_END) - size))
                    tail = file.read(size)
            except OSError as error:
                raise StoreError(f"damaged store: {path}: {error}") from error
            parts.append(np.repeat(image.decode_index(tail, chunks, path), self.group, axis=0))
        return np.concatenate(parts)[: self.frames] if parts else np.zeros((0, 2), np.uint64)


def shard_path(folder: Path | str, shard: int) -> str:
    """The file of shard number `shard` of the image array in `folder`."""
    return f"{folder}/c/{shard}/0/0/0"


def checked_frame(mapped: np.ndarray, offset: int, length: int) -> np.ndarray:
    """The stored bytes of a frame in its shard without their crc, uint8 (n,).

    Raises:
        StoreError: Bytes that are not there, or do not fit their crc.
    """
    end = offset + length - 4
    data = mapped[offset:end]
    if end < offset or end + 4 > len(mapped) or crc32c(data) != _CRC.unpack_from(mapped, end)[0]:
        raise StoreError("does not fit its checksum")
    return data


class SegmentReader:
    """One immutable segment: its attributes, its schema and its arrays.

    Attributes:
        path: Folder of the segment.
        attributes: What the writer recorded: schema, digest, episodes with their meta.
        frames: Number of steps N.

    Raises:
        StoreError: A segment that is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        group = read_json(path / "zarr.json", "segment metadata")
        try:
            self.attributes: dict[str, Any] = group["attributes"][KEY]
            self.frames = int(self.attributes["frames"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"damaged store: segment {path} lacks {error}") from error

    @property
    def schema(self) -> StoreSchema:
        """Fields of its steps."""
        try:
            return StoreSchema.from_dict(self.attributes)
        except (KeyError, TypeError) as error:
            raise StoreError(f"damaged store: segment {self.path} lacks {error}") from error

    @property
    def profile(self) -> ImageProfile:
        """How the cameras' frames were encoded (those that came as JPEG streams kept their own quality)."""
        noted = self.attributes.get("profile")
        try:
            name, quality, subsampling = noted if isinstance(noted, list) else (noted, None, "")
            known = image_profile(str(name))
            return known if quality is None else replace(known, quality=quality, subsampling=subsampling)
        except (BrachiumError, ValueError) as error:
            raise StoreError(f"damaged store: segment {self.path} has the profile {noted!r}") from error

    def has(self, kind: str, name: str) -> bool:
        """Whether there is an array `name` of `kind`: ``images`` or ``lowdim``."""
        return (self.path / kind / name).is_dir()

    def image(self, name: str) -> ImageArray:
        """Return the frames of camera or map `name`."""
        if not self.has("images", name):
            there = [p.name for p in (self.path / "images").glob("*") if p.is_dir()]
            raise StoreError(f"segment {self.path} has no camera or map {name!r}. {did_you_mean(name, there)}")
        array = ImageArray(self.path / "images" / name)
        if array.frames != self.frames:
            raise StoreError(f"damaged store: {array.folder} has {array.frames} frames, expected {self.frames}")
        return array

    def lowdim(self, field: str, columns: int, dtype: np.dtype) -> np.ndarray:
        """Return the array (N, D) of `field`."""
        return read_lowdim(self.path / "lowdim" / field, self.frames, columns, dtype)

    def metas(self) -> dict[str, dict[str, Any]]:
        """Episode id -> what the recorder noted."""
        return {e["id"]: dict(e.get("meta") or {}) for e in self.attributes.get("episodes", ())}
