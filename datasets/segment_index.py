"""Where every step of a store lies: its segments' arrays end to end, from a cache where reading them again is dear.

Rows follow the log: segment after segment, step after step, whether an episode was removed or not. A store of ten
million frames has tens of thousands of segments; one file a column, mapped into memory, opens in no time and is shared
by all processes. What the cache holds can be made again from the segments at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ulid import ULID

from ..errors import StoreError
from .image import MISSING
from .layout import CACHE, SEGMENTS
from .reader import SegmentReader
from .schema import PRESENT, StoreSchema

ABSENT = np.uint32(0xFFFF_FFFF)
"""Length of a frame that is not there."""
CACHE_BYTES, CACHE_SEGMENTS = 64 << 20, 64
"""A column that is larger, or comes from more segments, is kept in the cache."""
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Column:
    """One field of all segments.

    Attributes:
        arrays: ``values`` (N, *shape) of a low-dimensional field; ``offset`` uint64 (N,) and ``length`` uint32 (N,) of
            the frames of a camera or map, and ``layout`` int32 (S, 2): code in `kinds` and frames a shard.
        kinds: How frames are decoded.
        broken: Number of a segment -> what is wrong with it. Its rows mean nothing.
    """

    arrays: Arrays
    kinds: tuple[str, ...]
    broken: dict[int, str]


class SegmentIndex:
    """Columns over the segments of one embodiment.

    Args:
        root: Folder of the store.
        schema: What each segment must be readable as.
        segments: (id, number of steps) in log order.

    Attributes:
        keep: Keep every column in the cache, however small.
    """

    def __init__(self, root: Path, schema: StoreSchema, segments: Sequence[tuple[str, int]]) -> None:
        self.root, self.schema = root, schema
        self.keep = False
        self.ids = tuple(segment for segment, _ in segments)
        self.starts = np.zeros(len(segments) + 1, np.int64)
        np.cumsum([frames for _, frames in segments], out=self.starts[1:])
        self._columns: dict[str, Column] = {}
        self._checked: set[int] = set()
        self._lock = threading.RLock()

    def path(self, segment: int) -> Path:
        """Folder of a segment, by number."""
        return self.root / SEGMENTS / self.ids[segment]

    def folder_of(self, column: str) -> str:
        """Where the cache keeps a column, below the store."""
        if column == PRESENT:  # its meaning hangs on which fields are optional, and in which order
            column = f"{PRESENT}-{_digest(self.schema.optional)[:8]}"
        return f"{CACHE}/{self.schema.embodiment.digest}/{column}"

    def lowdim(self, field: str) -> Column:
        """Return the column of a low-dimensional field: ``values`` (N, *shape); ``timestamp`` (N,)."""
        spec = self.schema.field(field)
        shape = () if field == "timestamp" else spec.shape
        empty: Arrays = {"values": np.empty((0, *shape), spec.dtype)}
        return self._column(field, empty, lambda reader: ({"values": self._values(reader, field)}, ""))

    def images(self, name: str) -> Column:
        """Return the column of a camera or map: where its frames are."""
        self.schema.image(name)
        empty: Arrays = {"offset": np.empty(0, np.uint64), "length": np.empty(0, np.uint32)}
        return self._column(name, empty, lambda reader: self._places(reader, name))

    def _values(self, reader: SegmentReader, field: str) -> np.ndarray:
        """The values of `field` in one segment, filled up where an older segment lacks an optional field."""
        spec = self.schema.field(field)
        shape, dtype = () if field == "timestamp" else spec.shape, np.dtype(spec.dtype)
        if field == PRESENT:
            return self._presence(reader)
        if field in self.schema.optional and not reader.has("lowdim", field):
            return np.full((reader.frames, *shape), np.nan if dtype.kind == "f" else 0, dtype)
        return reader.lowdim(field, self.schema.columns(field), dtype).reshape(-1, *shape)

    def _presence(self, reader: SegmentReader) -> np.ndarray:
        theirs = reader.schema
        noted = np.zeros((reader.frames, 0), bool)
        if theirs.optional:
            noted = reader.lowdim(PRESENT, theirs.columns(PRESENT), np.dtype(bool))
        columns = []
        for name in self.schema.optional:
            if name in theirs.optional:
                columns.append(noted[:, theirs.optional.index(name)])
            else:
                columns.append(np.full(reader.frames, reader.has("images", name) or reader.has("lowdim", name)))
        return np.stack(columns, axis=1)

    def _places(self, reader: SegmentReader, name: str) -> tuple[Arrays, str]:
        if name in self.schema.optional and not reader.has("images", name):
            nothing = np.full(reader.frames, ABSENT, np.uint32)
            return {"offset": np.zeros(reader.frames, np.uint64), "length": nothing}, "raw 1"
        array, spec = reader.image(name), self.schema.image(name)
        if (array.shape, array.dtype) != (spec.shape, np.dtype(spec.dtype)):
            raise StoreError(
                f"damaged store: {array.folder} holds {array.shape} {array.dtype}, expected {spec.shape} {spec.dtype}"
            )
        index = array.load_index()
        length = np.where(index[:, 0] == MISSING, np.uint64(ABSENT), index[:, 1]).astype(np.uint32)
        return {"offset": index[:, 0].copy(), "length": length}, f"{array.kind} {array.shard}"

    def _column(self, name: str, empty: Arrays, read: Callable[[SegmentReader], tuple[Arrays, str]]) -> Column:
        with self._lock:
            if name not in self._columns:
                cache = _ColumnCache(self.root / self.folder_of(name), self.ids)
                arrays, layouts = cache.load(empty)
                known = len(layouts)
                if known < len(self.ids):
                    parts, more, broken = self._read(range(known, len(self.ids)), empty, read)
                    arrays = {key: np.concatenate([arrays[key], *parts[key]]) for key in empty}
                    layouts += more
                    large = sum(a.nbytes for a in arrays.values()) > CACHE_BYTES or len(self.ids) > CACHE_SEGMENTS
                    if (large or self.keep) and not broken:
                        arrays = cache.save(arrays, layouts)
                else:
                    broken = {}
                self._columns[name] = _with_layouts(arrays, layouts, broken)
            return self._columns[name]

    def _read(
        self, segments: Iterable[int], empty: Arrays, read: Callable[[SegmentReader], tuple[Arrays, str]]
    ) -> tuple[dict[str, list[np.ndarray]], list[str], dict[int, str]]:
        """Read some segments; one that cannot be read leaves rows of nothing and a word on what is wrong."""
        parts: dict[str, list[np.ndarray]] = {key: [] for key in empty}
        layouts: list[str] = []
        broken: dict[int, str] = {}
        for number in segments:
            frames = int(self.starts[number + 1] - self.starts[number])
            try:
                found, layout = read(self._open(number, frames))
            except StoreError as error:
                broken[number] = str(error)
                found, layout = {k: np.zeros((frames, *v.shape[1:]), v.dtype) for k, v in empty.items()}, "raw 1"
            for key, value in found.items():
                parts[key].append(value)
            layouts.append(layout)
        return parts, layouts, broken

    def _open(self, number: int, frames: int) -> SegmentReader:
        """Open a segment, and make sure once that it fits log and schema."""
        reader = SegmentReader(self.path(number))
        if number not in self._checked:
            if reader.frames != frames:
                raise StoreError(f"damaged store: segment {reader.path} has {reader.frames} steps, expected {frames}")
            mine = self.schema.to_dict()
            if any(reader.attributes.get(key) != mine.get(key) for key in ("embodiment", "extras", "maps", "optional")):
                self.schema.require_reads(reader.schema, f"store {self.root}", f"segment {self.ids[number]}")
            self._checked.add(number)
        return reader


def _with_layouts(arrays: Arrays, layouts: Sequence[str], broken: dict[int, str]) -> Column:
    """Code layouts such as ``jpeg 1024`` as numbers."""
    pairs = [layout.partition(" ")[::2] for layout in layouts]
    kinds = sorted({kind for kind, _ in pairs})
    coded = np.array([[kinds.index(kind), int(shard or 0)] for kind, shard in pairs], np.int32).reshape(-1, 2)
    for array in arrays.values():
        array.flags.writeable = False
    return Column({**arrays, "layout": coded}, tuple(kinds), broken)


class _ColumnCache:
    """One column in ``cache/``: ``.npy`` files and a note of the segments that they hold, in a folder of its own."""

    def __init__(self, path: Path, ids: Sequence[str]) -> None:
        self.path, self.ids = path, ids

    def load(self, empty: Arrays) -> tuple[Arrays, list[str]]:
        """What is kept of the first of our segments: arrays mapped into memory, and layouts; nothing where none is."""
        for folder in sorted(self.path.glob("[0-9]*"), key=lambda p: int(p.name.partition("-")[0]), reverse=True):
            try:
                note: dict[str, Any] = json.loads((folder / "note.json").read_bytes())
                layouts = list(note["layouts"])
                if len(layouts) > len(self.ids) or note["segments"] != _digest(self.ids[: len(layouts)]):
                    continue
                arrays = {key: np.load(folder / f"{key}.npy", mmap_mode="r") for key in empty}
                if all(
                    a.dtype == empty[k].dtype and a.shape == (note["rows"], *empty[k].shape[1:])
                    for k, a in arrays.items()
                ):
                    return arrays, layouts
            except (OSError, EOFError, ValueError, KeyError, TypeError):  # torn or foreign: it can be made again
                continue
        return dict(empty), []

    def save(self, arrays: Arrays, layouts: Sequence[str]) -> Arrays:
        """Keep a column in place of what was kept; returns it mapped, or as it is where nothing can be written."""
        target = self.path / _column_name(self.ids)
        temporary = self.path / f".tmp-{ULID()}"
        try:
            temporary.mkdir(parents=True)
            for key, array in arrays.items():
                np.save(temporary / f"{key}.npy", array)
            rows = len(next(iter(arrays.values())))
            note = {"segments": _digest(self.ids), "rows": rows, "layouts": list(layouts)}
            (temporary / "note.json").write_text(json.dumps(note))
            shutil.rmtree(target, ignore_errors=True)  # torn, or it would have been loaded
            os.rename(temporary, target)
            for folder in self.path.glob("*"):
                if folder != target:  # who reads from it keeps the files that are open
                    shutil.rmtree(folder, ignore_errors=True)
            return {key: np.load(target / f"{key}.npy", mmap_mode="r") for key in arrays}
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            return arrays


def column_files(ids: Sequence[str], arrays: Sequence[str]) -> list[str]:
    """Files, below a column's folder, that keep it for just these segments."""
    return [f"{_column_name(ids)}/{name}" for name in ("note.json", *(f"{key}.npy" for key in arrays))]


def _column_name(ids: Sequence[str]) -> str:
    return f"{len(ids)}-{_digest(ids)[:8]}"


def _digest(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:32]
