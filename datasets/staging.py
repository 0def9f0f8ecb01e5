"""A segment while it is recorded: frames appended to ``.partial`` shards, and a journal of every step."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ulid import ULID

from ..spec import FeatureSpec
from . import layout
from .image import LOSSLESS, MISSING, VIDEO_CRF, VIDEO_GROUP, ImageProfile, decode_into, encode_index
from .journal import PLACE, Journal, JournalEpisode
from .layout import FORMAT, JOURNAL, KEY, SEGMENTS, STAGING, crc32c, dump_json, fsync_dir, write_all, write_file
from .schema import StoreSchema

TORN = "torn"
"""Tag of an episode whose recording broke off."""
COPY = "copy"
"""Key that marks a segment with steps of others: nothing is lost with it, and nothing must be saved of it."""


class ShardWriter:
    """Appends encoded frames of one camera to ``c/<k>/0/0/0.partial``; the index is written by `seal`."""

    def __init__(self, folder: Path, max_frames: int) -> None:
        self._folder = folder
        self._max = max_frames
        self._offsets: list[int] = []
        self._lengths: list[int] = []
        self._ends: list[int] = []
        self._fd = -1
        self._open = -1

    def __len__(self) -> int:
        return len(self._offsets)

    def _path(self, shard: int) -> Path:
        return self._folder / "c" / str(shard) / "0" / "0" / "0.partial"

    def _bytes(self, shard: int) -> int:
        last = min(len(self), (shard + 1) * self._max) - 1
        return self._ends[last] if last >= shard * self._max else 0

    def append(self, data: bytes | None) -> bytes:
        """Write one frame and its crc, or note that there is none; return its place packed for the journal."""
        shard = len(self) // self._max
        offset = self._bytes(shard)
        if data is None:
            return self.note(int(MISSING), 0, 0, offset)
        if shard != self._open:
            self.close()
            self._path(shard).parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._path(shard), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self._open = shard
        checksum = crc32c(data)
        write_all(self._fd, data + checksum.to_bytes(4, "little"))
        return self.note(offset, len(data) + 4, checksum, offset + len(data) + 4)

    def note(self, offset: int, length: int, checksum: int, end: int) -> bytes:
        """Take a frame that stands in the file already; return its place packed for the journal."""
        self._offsets.append(offset)
        self._lengths.append(length if offset != MISSING else int(MISSING))
        self._ends.append(end)
        return PLACE.pack(offset, length, checksum)

    def end(self, frames: int) -> int:
        """Bytes in the shard of frame number `frames` before it."""
        return self._bytes(frames // self._max)

    def holds(self, place: tuple[int, int, int], frames: int) -> bool:
        """Whether the bytes of frame number `frames` stand in the file, whole, where the journal says."""
        offset, length, checksum = place
        if offset == MISSING:
            return True
        path = self._path(frames // self._max)
        try:
            with open(path if path.exists() else path.with_name("0"), "rb") as file:
                file.seek(offset)
                data = file.read(length)
        except OSError:
            return False
        return len(data) == length and crc32c(data[:-4]) == checksum == int.from_bytes(data[-4:], "little")

    def truncate(self, frames: int) -> None:
        """Forget every frame from `frames` on, and any bytes of a torn one."""
        self.close()
        shards = -(-(len(self) + 1) // self._max)
        del self._offsets[frames:], self._lengths[frames:], self._ends[frames:]
        for shard in range(frames // self._max, shards):
            if self._path(shard).exists():
                os.truncate(self._path(shard), self._bytes(shard))
                if not self._bytes(shard):
                    self._path(shard).unlink()

    def seal(self, *, fsync: bool) -> int:
        """Write each shard's index and make it durable; return the frames a shard. May be repeated."""
        self.close()
        shard_frames = max(1, min(len(self), self._max))
        for shard in range(-(-len(self) // shard_frames)):
            part = slice(shard * shard_frames, (shard + 1) * shard_frames)
            offsets, lengths = np.array(self._offsets[part], "<u8"), np.array(self._lengths[part], "<u8")
            path = self._path(shard)
            if path.with_name("0").exists():  # a repeated commit that had come so far
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.ftruncate(fd, self._bytes(shard))
                write_all(fd, encode_index(offsets, lengths, shard_frames))
                if fsync:
                    os.fsync(fd)
            finally:
                os.close(fd)
        return shard_frames

    def seal_video(self, shape: tuple[int, ...], *, fsync: bool) -> int:
        """Make the recorded JPEG frames closed groups of a video; return the frames a shard. May be repeated."""
        from .video_codec import encode_group, groups

        self.close()
        chunks = -(-self._max // VIDEO_GROUP)
        shard_frames = min(chunks, -(-len(self) // VIDEO_GROUP)) * VIDEO_GROUP
        encoded = (encode_group(group, VIDEO_CRF) for group in groups(self._decoded(shape), VIDEO_GROUP))
        for shard in range(-(-len(self) // shard_frames)):
            some = list(itertools.islice(encoded, shard_frames // VIDEO_GROUP))
            parts = [part + crc32c(part).to_bytes(4, "little") for part in some]
            lengths = np.array([len(part) for part in parts], "<u8")
            offsets = np.cumsum(lengths) - lengths
            target = self._folder / "c" / str(shard) / "0" / "0" / "0.video"
            target.parent.mkdir(parents=True, exist_ok=True)
            index = encode_index(offsets, lengths, shard_frames // VIDEO_GROUP)
            write_file(target, b"".join([*parts, index]), fsync=fsync)
        return shard_frames

    def _decoded(self, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Every recorded frame, in order; where there is none, the one before it."""
        frame = np.zeros(shape, np.uint8)
        for number, (offset, length) in enumerate(zip(self._offsets, self._lengths)):
            if offset != MISSING:
                with open(self._path(number // self._max), "rb") as file:
                    file.seek(offset)
                    data = np.frombuffer(file.read(length - 4), np.uint8)
                frame = np.empty(shape, np.uint8)
                decode_into(data, frame, "jpeg")
            yield frame

    def rename(self) -> None:
        """Give the sealed shards their final names."""
        videos = list(self._folder.glob("c/*/0/0/0.video"))
        for path in videos or self._folder.glob("c/*/0/0/0.partial"):
            path.rename(path.with_name("0"))

    def close(self) -> None:
        """Close the open file, if any."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = self._open = -1


class StagingSegment:
    """A segment under ``staging/`` that becomes ``segments/<id>`` by `publish`.

    Attributes:
        id: Its ULID.
        frames: Complete steps so far.
        episodes: Records of the finished episodes.
    """

    def __init__(
        self, folder: Path, schema: StoreSchema, profile: ImageProfile, *, source: str, fsync: bool, copy: bool = False
    ) -> None:
        self._copy = copy
        self.id = folder.name
        self.frames = 0
        self.episodes: list[dict[str, Any]] = []
        self._root, self._folder = folder.parent.parent, folder
        self._schema, self._profile = schema, profile
        self._profiles = {spec.name: self._profile_of(spec) for spec in schema.images}
        self._source, self._fsync = source, fsync
        self._sealed = self._moved = False
        self._dtypes = {f: np.dtype(schema.field(f).dtype).newbyteorder("<") for f in schema.fields}
        self._rows: list[tuple[np.ndarray, ...]] = []
        self._journal: Journal | None = None
        self._episode_mark = 0
        self._open_shards(layout.SHARD_FRAMES)

    def _profile_of(self, spec: FeatureSpec) -> ImageProfile:
        """Maps keep every bit; a video has no gaps, so cameras that may be lacking stay pictures."""
        if spec not in self._schema.embodiment.cameras:
            return LOSSLESS
        gaps = self._profile.group > 1 and spec.name in self._schema.optional
        return replace(self._profile, name="jpeg95-444") if gaps else self._profile

    def _open_shards(self, max_frames: int) -> None:
        images = self._folder / "images"
        self._shards = {spec.name: ShardWriter(images / spec.name, max_frames) for spec in self._schema.images}

    @classmethod
    def new(
        cls, root: Path, schema: StoreSchema, profile: ImageProfile, *, source: str, fsync: bool, copy: bool = False
    ) -> StagingSegment:
        """Begin a segment under ``staging/``."""
        made = cls(root / STAGING / str(ULID()), schema, profile, source=source, fsync=fsync, copy=copy)
        made._folder.mkdir(parents=True)
        header = {
            "format": FORMAT,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": round(time.time(), 3),
            "schema": schema.to_dict(),
            "profile": [profile.name, profile.quality, profile.subsampling],
            "images": [spec.name for spec in schema.images],
            "fields": [[f, made._dtypes[f].str, schema.columns(f)] for f in schema.fields],
            "max_frames": layout.SHARD_FRAMES,
            "source": source,
            COPY: copy,
        }
        made._journal = Journal(made._folder / JOURNAL, header)
        made._episode_mark = made._journal.size
        return made

    @classmethod
    def salvaged(
        cls, folder: Path, header: Mapping[str, Any], episodes: Sequence[JournalEpisode], *, torn: bool
    ) -> StagingSegment:
        """Take up a segment whose writer died, as far as its frames are whole; it is ready to be published.

        Args:
            folder: Its folder under ``staging/``.
            header: Of its journal.
            episodes: What its journal holds.
            torn: Keep the whole steps of an episode that was not finished, with the tag ``torn`` and no success.
        """
        name, quality, subsampling = header["profile"]
        profile = ImageProfile(name=name, quality=quality, subsampling=subsampling)
        schema = StoreSchema.from_dict(header["schema"])
        made = cls(folder, schema, profile, source=header.get("source", ""), fsync=True)
        made._open_shards(int(header["max_frames"]))
        for episode in episodes:
            start, whole = made.frames, True
            for step in episode.steps:
                whole = all(shard.holds(step.places[image], made.frames) for image, shard in made._shards.items())
                if not whole:
                    break
                for image, shard in made._shards.items():
                    offset, length, checksum = step.places[image]
                    end = shard.end(made.frames) if offset == MISSING else offset + length
                    shard.note(offset, length, checksum, end)
                made._rows.append(tuple(step.values[f] for f in schema.fields))
                made.frames += 1
            record = {**episode.about, "start": start, "length": made.frames - start, "success": episode.success}
            if not (whole and episode.ended):
                record |= {"success": None, "tags": [*dict.fromkeys([*episode.about["tags"], TORN])]}
                if not torn:
                    made._truncate(start)
                    made.frames = start
            if made.frames > start:
                made.episodes.append(record)
            if not whole:
                break
        return made

    @property
    def _log(self) -> Journal:
        assert self._journal is not None, "a salvaged segment takes no more steps"
        return self._journal

    def begin(self, episode: dict[str, Any]) -> None:
        """Note in the journal that an episode begins."""
        self._episode_mark = self._log.size
        self._log.append(b"B", dump_json(episode))

    def append(self, images: Mapping[str, bytes | None], values: Mapping[str, np.ndarray]) -> None:
        """Append one step: encoded `images` by camera or map, None for one that is not there, and flat `values` by
        field. All of it or nothing."""
        row = tuple(np.array(values[f], self._dtypes[f]).reshape(-1) for f in self._schema.fields)
        try:
            places = b"".join(shard.append(images[camera]) for camera, shard in self._shards.items())
            self._log.append(b"S", places + b"".join(r.tobytes() for r in row))
        except BaseException:
            self._truncate(self.frames)
            raise
        self._rows.append(row)
        self.frames += 1

    def end(self, episode: dict[str, Any]) -> None:
        """Add a finished episode, whose steps are the last ``episode["length"]`` ones."""
        self._log.append(b"E", dump_json({"success": episode["success"]}))
        self.episodes.append(episode)

    def discard(self, start: int) -> None:
        """Forget every step from `start` on."""
        self._truncate(start)
        self.frames = start
        self._log.truncate(self._episode_mark)

    def _truncate(self, frames: int) -> None:
        del self._rows[frames:]
        for shard in self._shards.values():
            shard.truncate(frames)

    def publish(self) -> list[dict[str, Any]]:
        """Finish the files, make them durable and move them to ``segments/``; may be repeated after a failure.

        Returns:
            The log's actions that commit it. Until then nobody sees the segment.
        """
        if not self._sealed:
            self._seal()
            self._sealed = True
        if not self._moved:
            self._folder = self._folder.rename(self._root / SEGMENTS / self.id)
            self._moved = True
            for path in self._folder.glob("images/*/c/*/0/0/0.partial"):  # what a video was made of
                path.unlink()
        if self._fsync:
            fsync_dir(self._root / SEGMENTS)
            fsync_dir(self._root / STAGING)
        return segment_actions(self.id, self._attributes())

    def _seal(self) -> None:
        folder, fsync = self._folder, self._fsync
        for camera, shard in self._shards.items():
            spec, profile = self._schema.image(camera), self._profiles[camera]
            frames = shard.seal(fsync=fsync) if profile.group == 1 else shard.seal_video(spec.shape, fsync=fsync)
            target = folder / "images" / camera
            target.mkdir(parents=True, exist_ok=True)
            dtype, group = np.dtype(spec.dtype), profile.group
            data = layout.image_array_json(self.frames, spec.shape, frames, dtype, profile.zarr_codecs(dtype), group)
            write_file(target / "zarr.json", data, fsync=fsync)
        for i, field in enumerate(self._schema.fields):
            values = np.stack([row[i] for row in self._rows])
            (folder / "lowdim" / field).mkdir(parents=True, exist_ok=True)
            layout.write_lowdim(folder / "lowdim" / field, values, fsync=fsync)
        (folder / "images").mkdir(exist_ok=True)
        for name in ("images", "lowdim"):
            write_file(folder / name / "zarr.json", layout.group_json({}), fsync=fsync)
        for shard in self._shards.values():
            shard.rename()
        write_file(folder / "zarr.json", layout.group_json({KEY: self._attributes()}), fsync=fsync)
        if fsync:
            for parent, _, _ in os.walk(folder, topdown=False):
                fsync_dir(Path(parent))

    def _attributes(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "frames": self.frames,
            **self._schema.to_dict(),
            "digest": self._schema.embodiment.digest,
            "fps": self._schema.embodiment.control_hz,
            "profile": [self._profile.name, self._profile.quality, self._profile.subsampling],
            "episode_ends": [e["start"] + e["length"] for e in self.episodes],
            "episodes": self.episodes,
            "source": self._source,
            **({COPY: True} if self._copy else {}),
        }

    def release(self) -> None:
        """Close every file and let go of the journal's lock; the folder stays."""
        for shard in self._shards.values():
            shard.close()
        if self._journal is not None:
            self._journal.close()

    @property
    def folder(self) -> Path:
        """Where the files are now."""
        return self._folder


def segment_actions(segment: str, attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the log actions that commit a published segment and its episodes; `meta` stays in the segment.

    Raises:
        KeyError: Attributes that miss a key.
    """
    keys = ("id", "start", "length", "instruction", "success", "tags")
    records = [{key: episode[key] for key in keys} for episode in attributes["episodes"]]
    about = {key: attributes[key] for key in ("frames", "digest")} | {"embodiment": attributes["embodiment"]["name"]}
    return [
        {"action": "add_segment", "id": segment, **about},
        {"action": "add_episodes", "segment": segment, "episodes": records},
    ]
