"""The episode store: a zarr v3 hierarchy of immutable segments under a commit log."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ulid import ULID

from ..errors import NotFoundError, SpecMismatchError, StoreError, did_you_mean
from ..spec import EmbodimentSpec
from . import commitlog
from .episode import EpisodeData, EpisodeInfo, LazyImages, LazyMeta
from .episode_table import EpisodeTable
from .frame_reader import FrameReader
from .layout import (
    CACHE,
    FORMAT,
    KEY,
    LOG,
    SEGMENTS,
    STAGING,
    disk_errors,
    dump_json,
    fsync_dir,
    group_json,
    read_json,
    write_file,
)
from .reader import SegmentReader
from .schema import StoreSchema
from .segment_index import SegmentIndex

HOW_TO_MAKE = (
    "Make one with `brachium record out={path}` (demonstrations) or "
    "`brachium convert source=FOLDER out={path} data=bridge` (existing data)."
)


class EpisodeStore:
    """A snapshot of a store at one version; what others commit later is seen by `refresh` or a new `open`.

    Frames have one global order: episodes in commit order, steps in time order; frame ``offsets[i] + t`` is step t of
    episode i.
    """

    def __init__(self, *, path: Path, state: commitlog.LogState, embodiment: str | None = None) -> None:
        self._path = path
        self._state = state
        if embodiment is not None and embodiment not in state.schemas:
            raise NotFoundError(
                f"store {path} has no embodiment {embodiment!r}. {did_you_mean(embodiment, state.schemas)}"
            )
        self._chosen = embodiment
        name = embodiment or (next(iter(state.schemas)) if len(state.schemas) == 1 else None)
        self._schema = None if name is None else StoreSchema.from_dict(state.schemas[name])
        self._table = _episodes_of(state, embodiment)
        self._starts = self._table.numbers("start")
        self._offsets = np.zeros(len(self._table) + 1, np.int64)
        np.cumsum(self._table.numbers("length"), out=self._offsets[1:])
        self._index: SegmentIndex | None = None
        if self._schema is not None:
            segments = [(s, about["frames"]) for s, about in state.segments.items() if about["embodiment"] == name]
            self._index = SegmentIndex(path, self._schema, segments)
            self._segment_of = self._numbers_of_segments()
            # a frame's row in the index is its place in the store plus its episode's shift
            self._shift = self._index.starts[self._segment_of] + self._starts - self._offsets[:-1]
            self._frames = FrameReader(self._index, self._explain)
        self._metas: tuple[str, dict[str, Any]] = ("", {})
        self._gathered: dict[str, np.ndarray] = {}
        self._lock = threading.RLock()

    def _numbers_of_segments(self) -> np.ndarray:
        """Each episode's segment as its number in the index: int64 (episodes,)."""
        codes, segments = self._table.coded("segment")
        number = {segment: k for k, segment in enumerate(self.steps.ids)}
        found = np.array([number.get(segment, -1) for segment in segments], np.int64)[codes]
        if (found < 0).any():
            lost = segments[codes[int(np.argmin(found))]]
            raise StoreError(f"damaged store: the log of {self._path} has episodes of segment {lost}, but not itself")
        return found

    @classmethod
    def create(cls, path: str | os.PathLike[str], schema: StoreSchema, *, exist_ok: bool = False) -> EpisodeStore:
        """Make an empty store, or open the one that is there if `exist_ok` and its schema means the same.

        Raises:
            StoreError: Something is at `path` already.
            SpecMismatchError: The store there has another schema.
            DiskSpaceError: No space.
        """
        root = Path(path)
        if (root / LOG).is_dir() and (root / LOG / f"{0:020d}.json").exists():
            if not exist_ok:
                raise StoreError(f"{root} is a store already: choose another path, or delete it to start afresh")
            return cls.open(root)._holding(schema)
        if root.exists() and (not root.is_dir() or any(p.name not in _OWN_NAMES for p in root.iterdir())):
            raise StoreError(f"{root} exists and is no episode store: choose another path")
        with disk_errors(root):
            for folder in (root / SEGMENTS, root / STAGING, root / LOG):
                folder.mkdir(parents=True, exist_ok=True)
            write_file(root / SEGMENTS / "zarr.json", group_json({}), fsync=True)
            if not (root / "zarr.json").exists():
                identity = {"format": FORMAT, "id": str(ULID())}
                write_file(root / "zarr.json", group_json({KEY: identity}), fsync=True)
            fsync_dir(root)
        number = commitlog.commit(root, [{"action": "set_schema", "schema": schema.to_dict()}], after=-1)
        store = cls.open(root)
        if number > 0:  # another process made the same store at the same moment; its schema must mean the same
            cls.open(root, version=0)._holding(schema)
        return store

    def _holding(self, schema: StoreSchema) -> EpisodeStore:
        """This store, if it holds steps of `schema` and no others."""
        if len(self.embodiments) > 1 and schema.embodiment.name in self.embodiments:
            return self.of(schema.embodiment.name)._holding(schema)
        self.schema.require_same(schema, f"store {self._path}", "the new schema")
        return self

    def set_schema(self, schema: StoreSchema) -> EpisodeStore:
        """Let the store hold another embodiment, or more fields of one it has; return the part of that embodiment.

        What is added to an embodiment must be optional, as the steps that are there lack it.

        Raises:
            SpecMismatchError: Steps that are there cannot be read by the new schema.
            DiskSpaceError: No space.
        """
        name = schema.embodiment.name
        old = self._state.schemas.get(name)
        if old is not None:
            schema.require_reads(StoreSchema.from_dict(old), "the new schema", f"embodiment {name!r} of {self._path}")
        if old != schema.to_dict():
            commitlog.commit(self._path, [{"action": "set_schema", "schema": schema.to_dict()}], after=self.version)
        return type(self).open(self._path, embodiment=name)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], version: int | None = None, embodiment: str | None = None
    ) -> EpisodeStore:
        """Open a store as it is now, or as it was at `version`.

        Args:
            path: Folder of the store. ``PATH@NAME`` opens the part of embodiment NAME.
            version: Number of a commit; the newest by default.
            embodiment: Episodes of this embodiment only; needed to read steps where a store holds several.

        Raises:
            NotFoundError: Nothing at `path`, or no such version or embodiment.
            StoreError: A folder that is no store, a store of another format, or a damaged one.
        """
        root = Path(path)
        if embodiment is None and not root.exists() and "@" in root.name:
            folder, _, embodiment = str(root).rpartition("@")
            root = Path(folder)
        if not root.exists():
            raise NotFoundError(f"no episode store at {root}. {HOW_TO_MAKE.format(path=root)}")
        if not root.is_dir() or not (root / "zarr.json").is_file() or not (root / LOG).is_dir():
            raise StoreError(f"{root} is no episode store. {HOW_TO_MAKE.format(path='NEW_PATH')}")
        attributes = read_json(root / "zarr.json", "store metadata").get("attributes", {})
        found = attributes.get(KEY) if isinstance(attributes, dict) else None
        if not isinstance(found, dict):
            raise StoreError(f"{root} is a zarr group but no episode store. {HOW_TO_MAKE.format(path='NEW_PATH')}")
        if found.get("format") != FORMAT:
            raise StoreError(f"{root} has store format {found.get('format')!r}; this version reads {FORMAT!r}")
        return cls(path=root, state=commitlog.read_log(root, version), embodiment=embodiment)

    def refresh(self) -> EpisodeStore:
        """Return a new snapshot at the newest version; this one stays as it is."""
        return type(self).open(self._path, embodiment=self._chosen)

    def of(self, embodiment: str) -> EpisodeStore:
        """Return the part of this snapshot that belongs to one embodiment.

        Raises:
            NotFoundError: No such embodiment.
        """
        return type(self)(path=self._path, state=self._state, embodiment=embodiment)

    @property
    def is_part(self) -> bool:
        """Whether the store holds more embodiments than this snapshot shows."""
        return len(self.embodiments) < len(self._state.schemas)

    @property
    def embodiments(self) -> tuple[str, ...]:
        """Names of the embodiments whose episodes these are."""
        return tuple(self._state.schemas) if self._chosen is None else (self._chosen,)

    @property
    def path(self) -> Path:
        """Folder of the store."""
        return self._path

    @property
    def version(self) -> int:
        """Number of the last commit this snapshot holds."""
        return self._state.version

    @property
    def schema(self) -> StoreSchema:
        """Fields of every step.

        Raises:
            SpecMismatchError: The store holds several embodiments, and none was chosen.
        """
        if self._schema is None:
            raise SpecMismatchError(
                f"store {self._path} holds episodes of several embodiments. Choose one: "
                + ", ".join(f"{self._path}@{name}" for name in self.embodiments)
            )
        return self._schema

    @property
    def steps(self) -> SegmentIndex:
        """Where every step lies in the segments."""
        self.schema  # noqa: B018 (says what is wrong, if there is none)
        assert self._index is not None
        return self._index

    @property
    def embodiment(self) -> EmbodimentSpec:
        """The robot whose episodes these are."""
        return self.schema.embodiment

    @functools.cached_property
    def episodes(self) -> tuple[EpisodeInfo, ...]:
        """All episodes, in commit order."""
        return tuple(
            EpisodeInfo(
                **{**record, "tags": tuple(record["tags"])},
                index=index,
                meta=LazyMeta(functools.partial(self._meta, record["segment"], record["id"])),
            )
            for index, record in enumerate(self._table.records())
        )

    @functools.cached_property
    def instructions(self) -> tuple[str, ...]:
        """Instruction of each episode, in commit order; cheaper than ``store.episodes``."""
        return tuple(self._table.texts("instruction"))

    @property
    def segments(self) -> dict[str, dict[str, Any]]:
        """Segment id -> what the log says of it: frames, digest, embodiment."""
        mine = self.embodiments
        return {s: dict(about) for s, about in self._state.segments.items() if about["embodiment"] in mine}

    def segment(self, identity: str) -> SegmentReader:
        """Open one segment.

        Raises:
            StoreError: A segment that is missing or damaged.
        """
        return SegmentReader(self._path / SEGMENTS / identity)

    def raw_records(
        self, episodes: Sequence[int] | np.ndarray
    ) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
        """Return what the log says of some episodes, and of their segments by id."""
        records = [self._table.record(int(index)) for index in self._check_episodes(episodes)]
        return records, {record["segment"]: self._state.segments[record["segment"]] for record in records}

    def commit(self, actions: Sequence[dict[str, Any]]) -> EpisodeStore:
        """Add one entry to the log, as `commitlog` describes them; return the store after it.

        Raises:
            DiskSpaceError: No space; nothing was added.
        """
        commitlog.commit(self._path, actions, after=self.version)
        return self.refresh()

    def _meta(self, segment: str, episode: str) -> dict[str, Any]:
        with self._lock:
            if self._metas[0] != segment:
                self._metas = segment, self.segment(segment).metas()
            return self._metas[1].get(episode, {})

    @property
    def num_episodes(self) -> int:
        """Number of episodes; cheaper than ``len(store.episodes)``."""
        return len(self._table)

    @property
    def total_frames(self) -> int:
        """Number of steps of all episodes."""
        return int(self._offsets[-1])

    @property
    def offsets(self) -> np.ndarray:
        """int64 (episodes + 1,): the first global frame of each episode, then `total_frames`."""
        return self._offsets

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hex digits that change when a schema, an episode or a label changes. Segments are immutable."""
        schemas = [self._state.schemas[name] for name in self.embodiments]
        return hashlib.sha256(dump_json([schemas, self._table.records()])).hexdigest()[:32]

    def episode_frames(self, episodes: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Return int64 global frame indices of `episodes` (all by default), one episode after another."""
        if episodes is None:
            return np.arange(self.total_frames, dtype=np.int64)
        chosen = self._check_episodes(episodes)
        parts = [np.arange(self._offsets[i], self._offsets[i + 1], dtype=np.int64) for i in chosen]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def lowdim(self, field: str, episodes: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Return `field` of `episodes` (all by default), concatenated: (N, *shape); `timestamp` is (N,) float64 [s].

        The array of all episodes is read-only, and kept; `gather` takes less memory where a store is large.

        Raises:
            SpecMismatchError: No such field.
            StoreError: No such episode, or a damaged segment; the message names the episodes that are lost.
        """
        if episodes is not None:
            return self.gather(field, self.episode_frames(episodes))
        with self._lock:
            if field not in self._gathered:
                values = self.steps.lowdim(field).arrays["values"]
                if len(values) == self.total_frames and not self._shift.any():
                    self._refuse_broken(field, np.arange(self.num_episodes))
                else:
                    values = self.gather(field, np.arange(self.total_frames))
                    values.flags.writeable = False
                self._gathered[field] = values
            return self._gathered[field]

    def gather(self, field: str, frames: np.ndarray) -> np.ndarray:
        """Return `field` at global frames of any shape: (*frames.shape, *shape).

        Raises:
            SpecMismatchError: No such field.
            StoreError: No such frame, or a damaged segment.
        """
        frames = np.asarray(frames, np.int64)
        episodes, _ = self.locate(frames.reshape(-1))
        column = self.steps.lowdim(field)
        if column.broken:
            self._refuse_broken(field, np.unique(episodes))
        rows = frames + self._shift[episodes].reshape(frames.shape)
        return np.asarray(column.arrays["values"][rows])

    def _refuse_broken(self, field: str, episodes: np.ndarray) -> None:
        broken = self.steps.lowdim(field).broken
        lost = [int(i) for i in episodes if int(self._segment_of[i]) in broken]
        if lost:
            why = broken[int(self._segment_of[lost[0]])]
            shown = ", ".join(str(i) for i in lost[:8]) + (" ..." if len(lost) > 8 else "")
            raise StoreError(
                f"{why} (it holds {'episode' if len(lost) == 1 else 'episodes'} {shown}; the others can still be read)"
            )

    def _explain(self, row: int) -> str:
        """Whose step stands in a row of the index."""
        firsts = self._shift + self._offsets[:-1]
        for index in np.flatnonzero((firsts <= row) & (row < firsts + np.diff(self._offsets))):
            return f"step {row - firsts[index]} of episode {index}, {self._table.texts('id')[index]}"
        return "of an episode that was removed"

    def episode(self, index: int) -> EpisodeData:
        """Return the arrays of one episode; images are decoded when first asked for."""
        index = int(self._check_episodes([index])[0])
        frames = np.arange(self._offsets[index], self._offsets[index + 1], dtype=np.int64)
        names = tuple(spec.name for spec in self.schema.images)
        return EpisodeData(
            info=self.episodes[index],
            images=LazyImages(names, lambda name: self.read_images(name, frames)),
            state=self.gather("state", frames),
            action=self.gather("action", frames),
            timestamp=self.gather("timestamp", frames),
            extras={name: self.gather(name, frames) for name in self.schema.fields[3:]},
        )

    def locate(self, frames: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (episode index, step in the segment), both int64 (n,), of global frame indices.

        Raises:
            StoreError: An index outside the store.
        """
        frames = np.asarray(frames, np.int64)
        if frames.size and (frames.min() < 0 or frames.max() >= self.total_frames):
            raise StoreError(f"expected frame indices from 0 to {self.total_frames - 1}, got {frames}")
        episodes = np.searchsorted(self._offsets, frames, side="right") - 1
        return episodes, self._starts[episodes] + frames - self._offsets[episodes]

    def read_images(
        self,
        camera: str,
        frame_indices: Sequence[int] | np.ndarray,
        out: np.ndarray | None = None,
        threads: int = 1,
    ) -> np.ndarray:
        """Decode global frames of one camera or map; a frame that is not there is all zeros.

        Args:
            camera: Name of a camera or map.
            frame_indices: (n,) global frame indices, in any order.
            out: (n, H, W, C) to decode into, in the dtype of the camera or map; C-contiguous.
            threads: Decode with this many threads; decoding releases the GIL.

        Returns:
            (n, H, W, C), uint8 for a camera; `out` if it was given.
        """
        spec = self.schema.image(camera)
        rows = self.rows(frame_indices)
        shape, dtype = (len(rows), *spec.shape), np.dtype(spec.dtype)
        if out is None:
            out = np.empty(shape, dtype)
        elif out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise SpecMismatchError(f"out: expected contiguous {dtype} {shape}, got {out.dtype} {out.shape}")
        self._frames.read(camera, rows, out, threads)
        return out

    def jpeg_bytes(self, camera: str, frame: int) -> bytes:
        """Return the stored bytes of one global frame as they are.

        Raises:
            StoreError: A frame that is stored raw or not at all.
        """
        self.schema.camera(camera)
        found = self._frames.encoded(camera, int(self.rows([frame])[0]))
        if found is None or found[1] != "jpeg":
            raise StoreError(f"frame {frame} of camera {camera!r} is not stored as JPEG")
        return found[0]

    def encoded(self, camera: str, frame: int) -> bytes | None:
        """Return the stored bytes of one global frame of a camera or map, however encoded; None where it is absent."""
        self.schema.image(camera)
        found = self._frames.encoded(camera, int(self.rows([frame])[0]))
        return None if found is None else found[0]

    def rows(self, frames: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the rows in `steps` of global frames: int64 (n,)."""
        frames = np.asarray(frames, np.int64).reshape(-1)
        return frames + self._shift[self.locate(frames)[0]]

    def _check_episodes(self, episodes: Sequence[int] | np.ndarray) -> np.ndarray:
        chosen = np.asarray(episodes, np.int64).reshape(-1)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= self.num_episodes):
            raise StoreError(f"store {self._path} has {self.num_episodes} episodes, got indices {chosen.tolist()}")
        return chosen

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self._path, self.version, self._chosen)

    def __repr__(self) -> str:
        return (
            f"EpisodeStore({str(self._path)!r}, version={self.version}, episodes={self.num_episodes}, "
            f"frames={self.total_frames}, embodiments={list(self.embodiments)})"
        )


def _episodes_of(state: commitlog.LogState, embodiment: str | None) -> EpisodeTable:
    """Records of the episodes of one embodiment; of all when None."""
    table = state.episodes.table()
    if embodiment is None or len(state.schemas) == 1:
        return table
    codes, segments = table.coded("segment")
    mine = [state.segments.get(segment, {}).get("embodiment") == embodiment for segment in segments]
    return table.take(np.array(mine, bool)[codes])


_OWN_NAMES = frozenset({"zarr.json", LOG, SEGMENTS, STAGING, CACHE})
