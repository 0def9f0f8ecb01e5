"""Records episodes into a store, safe against crashes, a full disk and other writers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from ulid import ULID

from ..errors import DiskSpaceError, SpecMismatchError, StoreError, did_you_mean
from ..spec import FeatureSpec
from . import commitlog, recovery
from .image import LOSSLESS, check_jpeg, decode_into, image_profile
from .layout import JOURNAL, disk_errors, dump_json
from .schema import PRESENT
from .staging import StagingSegment
from .store import EpisodeStore


class EpisodeWriter:
    """Adds episodes to a store; several writers, in several processes, may do so at once.

    ::

        with EpisodeWriter(store) as writer:
            writer.begin("stack the cups", tags=("lab",), meta={"seed": 3})
            writer.step(images={"front": frame}, state=state, action=action)
            writer.end(success=True)
        store = store.refresh()

    Nothing of an episode can be seen before its segment is committed; after that no crash can undo it. Leaving the
    `with` block by an exception discards the open episode and commits the finished ones.

    Args:
        store: Where to add.
        profile: Image encoding: ``jpeg`` (quality 95, 4:2:0), ``jpeg95-444``, ``raw`` or ``video`` (H.264, for
            archives: a tenth of the size, ten times dearer at random).
        quality: Another JPEG quality, 1 to 100.
        episodes_per_segment: Commit after so many finished episodes. 1 suits a robot; many short simulated episodes
            are written faster, and to fewer files, in larger groups.
        fsync: Force everything to the disk before a commit; off, a power cut may lose what a crash would not.
        source: Where the episodes come from, for the segment's record.
        salvage: What of a writer that died is taken over: ``torn`` (the whole steps of its last episode too, with the
            tag ``torn`` and no success), ``finished`` (episodes that were finished) or ``nothing``.
        checked: Refuse states and actions that are not finite, and a clock that does not run forward.
    """

    def __init__(
        self,
        store: EpisodeStore,
        *,
        profile: str = "jpeg",
        quality: int | None = None,
        episodes_per_segment: int = 1,
        fsync: bool = True,
        source: str = "",
        salvage: str = "torn",
        checked: bool = True,
    ) -> None:
        if episodes_per_segment < 1:
            raise StoreError(f"expected episodes_per_segment of at least 1, got {episodes_per_segment}")
        self._root, self._schema, self._version = store.path, store.schema, store.version
        self._profile = image_profile(profile, quality)
        odd = [c.name for c in store.embodiment.cameras if any(n % 2 for n in c.shape[:2])]
        if self._profile.group > 1 and odd:
            raise SpecMismatchError(f"profile=video needs even heights and widths; cameras {odd} have odd ones")
        self._per_segment, self._fsync, self._source = episodes_per_segment, fsync, source
        self._segment: StagingSegment | None = None
        self._pending: list[StagingSegment] = []
        self._episode: dict[str, Any] | None = None
        self._closed = False
        self._checked, self._clock = checked, -np.inf
        self.committed = 0
        """Episodes committed by this writer."""
        with disk_errors(self._root):
            recovery.recover(self._root, salvage)

    def begin(self, instruction: str | None, tags: Sequence[str] = (), meta: Mapping[str, Any] | None = None) -> str:
        """Begin an episode; return its id.

        Args:
            instruction: What is to be done; None where nobody said, as in play data.
            tags: Free labels.
            meta: What else is to be noted, JSON-ready.

        Raises:
            StoreError: No instruction, an episode is open, the writer is closed, or `meta` is nothing JSON can hold.
            DiskSpaceError: No space.
        """
        if self._closed:
            raise StoreError("this writer is closed: make another EpisodeWriter")
        if self._episode is not None:
            raise StoreError("an episode is open: call end() or discard() before begin()")
        if isinstance(tags, str):
            raise StoreError(f"expected tags as a sequence of strings, got the string {tags!r}")
        if instruction is not None and not str(instruction).strip():
            raise StoreError(f"no instruction ({instruction!r}): say what is to be done, or give None for play data")
        self._clock = -np.inf
        episode = {
            "id": str(ULID()),
            "instruction": str(instruction or ""),
            "tags": [str(t) for t in tags],
            "meta": dict(meta or {}),
        }
        dump_json(episode)
        with disk_errors(self._root):
            if self._segment is None:
                self._segment = StagingSegment.new(
                    self._root, self._schema, self._profile, source=self._source, fsync=self._fsync
                )
            self._segment.begin(episode)
        self._episode = {**episode, "start": self._segment.frames}
        return str(episode["id"])

    def step(
        self,
        images: Mapping[str, np.ndarray | bytes],
        state: Any,
        action: Any,
        timestamp: float | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        """Record one step.

        Args:
            images: Camera or map name -> (H, W, C) in its dtype, or a camera's JPEG stream to store byte for byte.
            state: (s,), in the units of the embodiment.
            action: (a,), in the units of the embodiment.
            timestamp: Time since the episode began [s]; by default the step number over `control_hz`.
            extras: Extra field -> value.

        What the schema calls optional may be left out.

        Raises:
            SpecMismatchError: Something missing, unknown, of the wrong shape or dtype, not finite, or from before the
                last step. The step is not recorded; the episode stays open.
            DiskSpaceError: No space. The open episode is discarded; finished ones are kept.
        """
        optional = self._schema.optional
        self._check_names("camera", images, [spec.name for spec in self._schema.images], optional)
        encoded = {s.name: self._encode(s, images[s.name]) if s.name in images else None for s in self._schema.images}
        values = self._values(state, action, timestamp, extras or {})
        if optional:
            values[PRESENT] = np.array([name in images or name in (extras or {}) for name in optional])
        segment, _ = self._open_episode()
        try:
            with disk_errors(self._root):
                segment.append(encoded, values)
        except DiskSpaceError:
            self.discard()
            raise
        self._clock = float(values["timestamp"][0])

    def step_jpeg(
        self,
        images: Mapping[str, bytes],
        state: Any,
        action: Any,
        timestamp: float | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        """Record one step whose images are all JPEG streams; the same as `step`."""
        self.step(images, state, action, timestamp, extras)

    def end(self, success: bool | None, tags: Sequence[str] = ()) -> str:
        """Finish the episode, and commit when `episodes_per_segment` are finished; return the episode's id.

        Args:
            success: Whether it did what was to be done; None where nobody said.
            tags: Further labels, of what is known only now.

        Raises:
            StoreError: No open episode, or one without steps.
            DiskSpaceError: No space for the commit; the episode is kept, and `flush` tries again.
        """
        segment, episode = self._open_episode()
        length = segment.frames - episode["start"]
        if not length:
            raise StoreError("the open episode has no steps: call step() first, or discard()")
        record = {**episode, "length": length, "success": None if success is None else bool(success)}
        record["tags"] = [*episode["tags"], *(str(tag) for tag in tags if str(tag) not in episode["tags"])]
        with disk_errors(self._root):
            segment.end(record)
        self._episode = None
        if len(segment.episodes) >= self._per_segment:
            self.flush()
        return str(episode["id"])

    def discard(self) -> None:
        """Forget the open episode."""
        segment, episode = self._open_episode()
        self._episode = None
        segment.discard(episode["start"])

    def flush(self) -> None:
        """Commit every finished episode now.

        Raises:
            StoreError: An episode is open.
            DiskSpaceError: No space; nothing is half-committed, and calling again continues.
        """
        if self._episode is not None:
            raise StoreError("an episode is open: call end() or discard() before flush()")
        if self._segment is not None:
            if not self._segment.episodes:
                return
            self._pending.append(self._segment)
            self._segment = None
        while self._pending:
            segment = self._pending[0]
            with disk_errors(self._root):
                actions = segment.publish()
                self._version = commitlog.commit(self._root, actions, after=self._version, fsync=self._fsync)
            self._pending.pop(0)
            (segment.folder / JOURNAL).unlink(missing_ok=True)
            segment.release()
            self.committed += len(segment.episodes)

    def close(self) -> None:
        """Commit what is finished and let go of everything. Safe to call twice.

        Raises:
            StoreError: An episode was still open; it is discarded.
            DiskSpaceError: No space for the commit.
        """
        if self._closed:
            return
        left_open = self._episode is not None
        try:
            if left_open:
                self.discard()
            self.flush()
        finally:
            self._closed = True
            for segment in self._pending:
                segment.release()
            if self._segment is not None:
                shutil.rmtree(self._segment.folder, ignore_errors=True)
                self._segment.release()
                self._segment = None
        if left_open:
            raise StoreError("the writer was closed with an open episode, which is lost: call end() or discard() first")

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            if self._episode is not None:
                self.discard()
            self.close()
        except (StoreError, OSError) as second:  # the first error is the one to show
            error.add_note(f"and finished episodes could not be committed: {second}")

    def _open_episode(self) -> tuple[StagingSegment, dict[str, Any]]:
        if self._episode is None or self._segment is None:
            raise StoreError("no episode is open: call begin() first")
        return self._segment, self._episode

    def _encode(self, camera: FeatureSpec, image: np.ndarray | bytes) -> bytes:
        """Check one image against its camera and encode it."""
        lossless = camera not in self._schema.embodiment.cameras
        where = f"{'map' if lossless else 'camera'} {camera.name!r}"
        if isinstance(image, bytes | bytearray | memoryview):
            if lossless or not self._profile.is_jpeg:
                raise StoreError(
                    f"{where}: JPEG streams need a camera and a JPEG profile; this writer has {self._profile.name!r}"
                )
            check_jpeg(bytes(image), camera.shape, where)
            if self._profile.group > 1:  # it is decoded at the commit, where it is too late to refuse it
                try:
                    decode_into(np.frombuffer(image, np.uint8), np.empty(camera.shape, np.uint8), "jpeg")
                except StoreError as error:
                    raise SpecMismatchError(f"{where}: {error}") from error
            return bytes(image)
        array = np.asarray(image)
        if array.shape != camera.shape or array.dtype != np.dtype(camera.dtype):
            raise SpecMismatchError(
                f"{where}: expected shape {camera.shape} {camera.dtype}, got {array.shape} {array.dtype}"
            )
        return (LOSSLESS if lossless else self._profile).encode(array)

    def _values(
        self, state: Any, action: Any, timestamp: float | None, extras: Mapping[str, Any]
    ) -> dict[str, np.ndarray]:
        """Return each low-dimensional field as an array of its spec's shape and dtype."""
        segment, episode = self._open_episode()
        schema = self._schema
        self._check_names("extra", extras, [e.name for e in schema.extras], schema.optional)
        if timestamp is None:
            timestamp = (segment.frames - episode["start"]) / schema.embodiment.control_hz
        values = {
            "state": _as_feature(state, schema.embodiment.state, "state"),
            "action": _as_feature(action, schema.embodiment.action, "action"),
            "timestamp": np.array([timestamp], np.float64),
        }
        if self._checked:
            self._require_sound(values)
        for extra in schema.extras:
            given = extras.get(extra.name)
            if given is None:
                given = np.full(extra.shape, np.nan if np.dtype(extra.dtype).kind == "f" else 0, extra.dtype)
            values[extra.name] = _as_feature(given, extra, f"extra {extra.name!r}")
        return values

    def _require_sound(self, values: Mapping[str, np.ndarray]) -> None:
        for name, value in values.items():
            if not np.isfinite(value).all():
                place = int(np.flatnonzero(~np.isfinite(value))[0])
                raise SpecMismatchError(f"{name}[{place}] is {value[place]}: expected finite numbers")
        if values["timestamp"][0] <= self._clock:
            raise SpecMismatchError(
                f"timestamp {values['timestamp'][0]} s comes after {self._clock} s: expected a clock that runs "
                "forward, as time.monotonic() does"
            )

    @staticmethod
    def _check_names(what: str, given: Mapping[str, Any], known: Sequence[str], optional: Sequence[str]) -> None:
        for name in given:
            if name not in known:
                hint = did_you_mean(name, known) if known else f"The schema has no {what}."
                raise SpecMismatchError(f"unknown {what} {name!r}. {hint}")
        expected = [name for name in known if name not in optional]
        missing = [name for name in expected if name not in given]
        if missing:
            raise SpecMismatchError(f"expected {what} names {expected}, got {sorted(given)}; missing {missing}")


def _as_feature(value: Any, spec: FeatureSpec, where: str) -> np.ndarray:
    """Return `value` as an array of the spec's shape; numbers of the same kind are cast, others are refused."""
    array = np.asarray(value)
    dtype = np.dtype(spec.dtype)
    if array.shape != spec.shape or not (np.can_cast(array.dtype, dtype, "same_kind")):
        raise SpecMismatchError(
            f"{where}: expected shape {spec.shape} {spec.dtype}, got {array.shape} {array.dtype}"
            + (f" (elements: {', '.join(spec.names)})" if spec.names else "")
        )
    return array.astype(dtype)
