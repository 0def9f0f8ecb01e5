"""The episode store: a zarr v3 hierarchy of immutable segments under a commit log."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from ulid import ULID

from ..errors import NotFoundError, SpecMismatchError, StoreError, did_you_mean
from ..spec import EmbodimentSpec
from . import commitlog
from .episode import EpisodeData, EpisodeInfo, LazyImages
from .layout import (
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
from .reader import MappedFiles, SegmentReader
from .schema import StoreSchema
from .split import split_episodes

HOW_TO_MAKE = (
    "Make one with `brachium record out={path}` (demonstrations) or "
    "`brachium convert source=FOLDER out={path} data=bridge` (existing data)."
)


class EpisodeStore:
    """A snapshot of a store at one version; what others commit later is seen by `refresh` or a new `open`.

    Frames have one global order: episodes in commit order, steps in time order; frame ``offsets[i] + t`` is step t of
    episode i.
    """

    def __init__(self, *, path: Path, state: commitlog.LogState) -> None:
        self._path = path
        self._state = state
        self._schema = StoreSchema.from_dict(state.schema)
        self._segments: dict[str, SegmentReader] = {}
        self._files = MappedFiles()
        self._lowdim: dict[str, np.ndarray] = {}
        self._lock = threading.RLock()
        self._records = list(state.episodes.values())
        self._offsets = np.zeros(len(self._records) + 1, np.int64)
        np.cumsum([r["length"] for r in self._records], out=self._offsets[1:])
        self._starts = np.array([r["start"] for r in self._records], np.int64)
        self._pool: ThreadPoolExecutor | None = None
        self._pool_threads = 0

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
            store = cls.open(root)
            store.schema.require_same(schema, f"store {root}", "the new schema")
            return store
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
            first = StoreSchema.from_dict(commitlog.read_log(root, 0).schema)
            first.require_same(schema, f"store {root}", "the new schema")
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str], version: int | None = None) -> EpisodeStore:
        """Open a store as it is now, or as it was at `version`.

        Raises:
            NotFoundError: Nothing at `path`, or no such version.
            StoreError: A folder that is no store, a store of another format, or a damaged one.
        """
        root = Path(path)
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
        return cls(path=root, state=commitlog.read_log(root, version))

    def refresh(self) -> EpisodeStore:
        """Return a new snapshot at the newest version; this one stays as it is."""
        return type(self).open(self._path)

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
        """Fields of every step."""
        return self._schema

    @property
    def embodiment(self) -> EmbodimentSpec:
        """The robot whose episodes these are."""
        return self._schema.embodiment

    @functools.cached_property
    def episodes(self) -> tuple[EpisodeInfo, ...]:
        """All episodes, in commit order."""
        infos = []
        noted: dict[str, dict[str, Any]] = {}
        for segment in dict.fromkeys(record["segment"] for record in self._records):
            noted.update({e["id"]: e for e in self._segment(segment).attributes.get("episodes", ())})
        for index, record in enumerate(self._records):
            meta = dict(noted.get(record["id"], {}).get("meta") or {})
            fields = {**record, "tags": tuple(record["tags"]), "index": index, "meta": meta}
            infos.append(EpisodeInfo(**fields))
        return tuple(infos)

    @property
    def num_episodes(self) -> int:
        """Number of episodes; cheaper than ``len(store.episodes)``."""
        return len(self._starts)

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
        """32 hex digits that change when the schema, an episode or a label changes. Segments are immutable."""
        state = self._state
        content = [state.schema, sorted(state.segments), self._records]
        return hashlib.sha256(dump_json(content)).hexdigest()[:32]

    def select(
        self,
        success: bool | None = None,
        tags: Sequence[str] | None = None,
        split: str | None = None,
        *,
        heldout: float = 0.1,
        seed: int = 0,
    ) -> tuple[int, ...]:
        """Return the indices of the episodes that fit every condition given.

        Args:
            success: Only those labelled so.
            tags: Only those that carry all of these.
            split: ``train`` or ``heldout``, by `split_episodes` with `heldout` as fraction and `seed`.

        Raises:
            StoreError: No episode fits; the message says what is there.
        """
        chosen = [e for e in self.episodes if success is None or e.success is success]
        if not chosen:
            counts = {s: sum(e.success is s for e in self.episodes) for s in (True, False, None)}
            raise StoreError(
                f"store {self._path} has no episode with success={success}: {counts[True]} succeeded, "
                f"{counts[False]} failed, {counts[None]} unlabelled"
            )
        if tags:
            known = {t for e in self.episodes for t in e.tags}
            chosen = [e for e in chosen if set(tags) <= set(e.tags)]
            if not chosen:
                hint = [did_you_mean(t, known) for t in tags if t not in known] if known else ["It has no tags."]
                raise StoreError(f"store {self._path} has no such episode with tags {list(tags)}. {' '.join(hint)}")
        indices = tuple(e.index for e in chosen)
        if split is None:
            return indices
        if split not in ("train", "heldout"):
            raise StoreError(f"no split {split!r}. {did_you_mean(split, ('train', 'heldout'))}")
        indices = split_episodes(self, heldout, seed, indices)[split == "heldout"]
        if not indices:
            raise StoreError(f"the split {split!r} of {len(chosen)} episodes is empty: use another heldout= or seed=")
        return indices

    def episode_frames(self, episodes: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Return int64 global frame indices of `episodes` (all by default), one episode after another."""
        if episodes is None:
            return np.arange(self.total_frames, dtype=np.int64)
        chosen = self._check_episodes(episodes)
        parts = [np.arange(self._offsets[i], self._offsets[i + 1], dtype=np.int64) for i in chosen]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def lowdim(self, field: str, episodes: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Return `field` of `episodes` (all by default), concatenated: (N, *shape); `timestamp` is (N,) float64 [s].

        The array of all episodes is kept in memory and read-only.

        Raises:
            SpecMismatchError: No such field.
            StoreError: No such episode, or a damaged segment.
        """
        everything = self._load_lowdim(field)
        return everything if episodes is None else everything[self.episode_frames(episodes)]

    def _load_lowdim(self, field: str) -> np.ndarray:
        spec = self._schema.field(field)
        with self._lock:
            if field in self._lowdim:
                return self._lowdim[field]
            dtype, columns = np.dtype(spec.dtype), self._schema.columns(field)
            joined = np.empty((self.total_frames, columns), dtype)
            read: tuple[str, np.ndarray] | None = None
            for i, record in enumerate(self._records):
                if read is None or read[0] != record["segment"]:
                    values = self._segment(record["segment"]).lowdim(field, columns, dtype)
                    read = (record["segment"], values)
                stop = record["start"] + record["length"]
                joined[self._offsets[i] : self._offsets[i + 1]] = read[1][record["start"] : stop]
            joined = joined[:, 0] if field == "timestamp" else joined.reshape(-1, *spec.shape)
            joined.flags.writeable = False
            self._lowdim[field] = joined
            return joined

    def episode(self, index: int) -> EpisodeData:
        """Return the arrays of one episode; images are decoded when first asked for."""
        index = int(self._check_episodes([index])[0])
        rows = slice(self._offsets[index], self._offsets[index + 1])
        frames = np.arange(rows.start, rows.stop, dtype=np.int64)
        return EpisodeData(
            info=self.episodes[index],
            images=LazyImages(self.embodiment.camera_names, lambda camera: self.read_images(camera, frames)),
            state=self.lowdim("state")[rows],
            action=self.lowdim("action")[rows],
            timestamp=self.lowdim("timestamp")[rows],
            extras={e.name: self.lowdim(e.name)[rows] for e in self._schema.extras},
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
        """Decode global frames of one camera.

        Args:
            camera: Camera name.
            frame_indices: (n,) global frame indices, in any order.
            out: uint8 (n, H, W, 3) to decode into; C-contiguous.
            threads: Decode with this many threads; decoding releases the GIL.

        Returns:
            uint8 (n, H, W, 3); `out` if it was given.
        """
        shape = self._schema.camera(camera).shape
        episodes, steps = self.locate(frame_indices)
        if out is None:
            out = np.empty((len(steps), *shape), np.uint8)
        elif out.shape != (len(steps), *shape) or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise SpecMismatchError(
                f"out: expected contiguous uint8 {(len(steps), *shape)}, got {out.dtype} {out.shape}"
            )
        records = self._records
        arrays = {e: self._segment(records[e]["segment"]).camera(camera) for e in set(episodes.tolist())}
        jobs = list(zip(episodes.tolist(), steps.tolist(), out))

        def work(part: list[tuple[int, int, np.ndarray]]) -> None:
            for episode, step, target in part:
                arrays[episode].read_into(step, target)

        if threads <= 1 or len(jobs) < 2 * threads:
            work(jobs)
        else:
            size = -(-len(jobs) // threads)
            list(self._threads(threads).map(work, [jobs[i : i + size] for i in range(0, len(jobs), size)]))
        return out

    def jpeg_bytes(self, camera: str, frame: int) -> bytes:
        """Return the stored bytes of one global frame as they are.

        Raises:
            StoreError: A frame that is stored raw or not at all.
        """
        self._schema.camera(camera)
        episodes, steps = self.locate([frame])
        array = self._segment(self._records[int(episodes[0])]["segment"]).camera(camera)
        data = array.encoded(int(steps[0]))
        if data is None or not array.jpeg:
            raise StoreError(f"frame {frame} of camera {camera!r} is not stored as JPEG")
        return data.tobytes()

    def _segment(self, segment: str) -> SegmentReader:
        reader = self._segments.get(segment)
        if reader is None:
            reader = SegmentReader(self._path / SEGMENTS / segment, files=self._files)
            if reader.attributes.get("digest") != self.embodiment.digest:
                theirs = EmbodimentSpec.from_dict(reader.attributes["embodiment"])
                self.embodiment.require_same(theirs, f"store {self._path}", f"segment {segment}")
            reader = self._segments.setdefault(segment, reader)
        return reader

    def _check_episodes(self, episodes: Sequence[int] | np.ndarray) -> np.ndarray:
        chosen = np.asarray(episodes, np.int64).reshape(-1)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= self.num_episodes):
            raise StoreError(f"store {self._path} has {self.num_episodes} episodes, got indices {chosen.tolist()}")
        return chosen

    def _threads(self, threads: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._pool_threads < threads:
                self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
                self._pool_threads = threads
            return self._pool

    def __repr__(self) -> str:
        return (
            f"EpisodeStore({str(self._path)!r}, version={self.version}, episodes={self.num_episodes}, "
            f"frames={self.total_frames}, embodiment={self.embodiment.name!r})"
        )


_OWN_NAMES = frozenset({"zarr.json", LOG, SEGMENTS, STAGING})
