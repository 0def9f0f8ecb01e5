"""The commit log: numbered JSON entries that are added if absent and never rewritten, and parquet checkpoints.

Entry `n` is ``_log/%020d.json``: ``{"version": n, "time": ..., "actions": [...], "crc32c": "..."}``. What a store
holds at version `n` is the replay of entries 0..n:

- ``set_schema {schema}``: of the embodiment that the schema names; a store may hold several
- ``add_segment {id, frames, digest, embodiment}``
- ``add_episodes {segment, episodes: [{id, start, length, instruction, success, tags}]}``
- ``remove_episode {id}``
- ``edit {id, instruction?, success?, tags?}``
- ``move_episodes {segment, episodes: [{id, start}]}``: the same steps, in another segment
- ``drop_segments {ids}``: gone from the disk; no episode has steps there any more
- ``set_stats {embodiment, stats}``

Adding what is there already changes nothing, so that a repeated commit is harmless.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ulid import ULID

from ..errors import NotFoundError, StoreError
from .episode_table import EpisodeRecords, EpisodeTable
from .layout import LOG, SEGMENTS, crc32c, disk_errors, dump_json, fsync_dir, write_file

CHECKPOINT_EVERY = 64


@dataclass
class LogState:
    """What a store holds at one version.

    Attributes:
        version: Number of the last replayed entry; -1 before the first.
        schemas: Embodiment name -> `StoreSchema.to_dict` output; empty before the first entry.
        segments: Segment id -> ``{"frames": int, "digest": str, "embodiment": str}``.
        episodes: Their records, in the order of their commits.
        stats: Embodiment name -> the last statistics set.
    """

    version: int = -1
    schemas: dict[str, dict[str, Any]] = field(default_factory=dict)
    segments: dict[str, dict[str, Any]] = field(default_factory=dict)
    episodes: EpisodeRecords = field(default_factory=EpisodeRecords)
    stats: dict[str, dict[str, Any]] = field(default_factory=dict)

    def apply(self, version: int, actions: Sequence[dict[str, Any]]) -> None:
        """Replay one entry.

        Raises:
            StoreError: An action this version of brachium does not know, or one that misses a key.
        """
        for action in actions:
            try:
                self._apply_one(action)
            except (KeyError, TypeError) as error:
                raise StoreError(f"damaged store: log entry {version}: {action!r:.200} lacks {error}") from error
        self.version = version

    def _apply_one(self, action: dict[str, Any]) -> None:
        kind = action["action"]
        if kind == "add_segment":
            about = {"frames": action["frames"], "digest": action["digest"]}
            self.segments.setdefault(action["id"], {**about, "embodiment": action.get("embodiment") or self._only})
        elif kind == "add_episodes":
            for episode in action["episodes"]:
                self.episodes.add(action["segment"], episode)
        elif kind == "remove_episode":
            self.episodes.remove(action["id"])
        elif kind == "edit":
            self.episodes.edit(action["id"], action)
        elif kind == "move_episodes":
            for episode in action["episodes"]:
                self.episodes.move(episode["id"], action["segment"], episode["start"])
        elif kind == "drop_segments":
            for segment in action["ids"]:
                self.segments.pop(segment, None)
        elif kind == "set_schema":
            self.schemas[action["schema"]["embodiment"]["name"]] = action["schema"]
        elif kind == "set_stats":
            self.stats[action.get("embodiment") or self._only] = action["stats"]
        else:
            raise StoreError(f"the log holds the action {kind!r}, which this version of brachium does not know")

    @property
    def _only(self) -> str:
        """The embodiment of what names none."""
        return next(iter(self.schemas), "")


def _entry_path(root: Path, version: int) -> Path:
    return root / LOG / f"{version:020d}.json"


def _checkpoint_path(root: Path, version: int) -> Path:
    return root / LOG / f"{version:020d}.ckpt.parquet"


def _versions(root: Path, suffix: str) -> list[int]:
    try:
        names = os.listdir(root / LOG)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"damaged store: {root / LOG} is missing") from error
    return sorted(int(n[:20]) for n in names if n[20:] == suffix and n[:20].isdigit())


def read_entry(root: Path, version: int) -> list[dict[str, Any]]:
    """Return the actions of one entry.

    Raises:
        StoreError: An entry that is missing, torn, or does not fit its checksum.
    """
    path = _entry_path(root, version)
    try:
        entry = json.loads(path.read_bytes())
        stated = entry.pop("crc32c")
    except FileNotFoundError as error:
        raise StoreError(f"damaged store: log entry {path} is missing") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise StoreError(f"damaged store: log entry {path} cannot be read: {error}") from error
    if f"{crc32c(dump_json(entry)):08x}" != stated or entry.get("version") != version:
        raise StoreError(f"damaged store: log entry {path} does not fit its checksum")
    actions: list[dict[str, Any]] = entry["actions"]
    return actions


def read_log(root: Path, version: int | None = None) -> LogState:
    """Replay the log up to `version` (the newest by default), starting from the nearest checkpoint.

    Raises:
        NotFoundError: A version the store does not have.
        StoreError: An entry that is missing, torn, or unknown.
    """
    entries = _versions(root, ".json")
    if not entries:
        if not any(path.is_dir() for path in (root / SEGMENTS).glob("*")):
            raise StoreError(
                f"{root} is a store that is just being created, or whose creation was cut short. "
                "Try again, or type the command that makes it once more"
            )
        raise StoreError(f"damaged store: {root / LOG} holds no entry")
    last = entries[-1]
    if version is None:
        version = last
    elif not 0 <= version <= last:
        raise NotFoundError(f"store {root} has versions 0 to {last}, got version={version}")
    state = LogState()
    for number in reversed(_versions(root, ".ckpt.parquet")):
        if number <= version:
            loaded = _read_checkpoint(root, number)
            if loaded is not None:
                state = loaded
                break
    for number in range(state.version + 1, version + 1):
        state.apply(number, read_entry(root, number))
    return state


def extend(root: Path, state: LogState) -> None:
    """Replay the entries that were added since `state` was read."""
    while _entry_path(root, state.version + 1).exists():
        state.apply(state.version + 1, read_entry(root, state.version + 1))


def commit(root: Path, actions: Sequence[dict[str, Any]], *, after: int, fsync: bool = True) -> int:
    """Add one entry with the first free number above `after`; return that number.

    Of two writers that want the same number one wins (a hard link cannot be made twice) and the other takes the next.

    Raises:
        DiskSpaceError: No space; nothing was added.
        StoreError: A filesystem without hard links.
    """
    folder = root / LOG
    version = after
    while True:
        version += 1
        if _entry_path(root, version).exists():
            continue
        entry: dict[str, Any] = {"version": version, "time": round(time.time(), 3), "actions": list(actions)}
        entry["crc32c"] = f"{crc32c(dump_json(entry)):08x}"
        try:
            _put_if_absent(folder, _entry_path(root, version), dump_json(entry), fsync)
        except FileExistsError:
            continue
        if version and version % CHECKPOINT_EVERY == 0:
            _write_checkpoint(root, version, fsync)
        return version


def _put_if_absent(folder: Path, target: Path, data: bytes, fsync: bool) -> None:
    temporary = folder / f".tmp-{ULID()}"
    with disk_errors(folder):
        try:
            write_file(temporary, data, fsync=fsync)
            os.link(temporary, target)
        except PermissionError as error:
            raise StoreError(f"{folder} is not writable, or its filesystem has no hard links: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)
        if fsync:
            fsync_dir(folder)


def _write_checkpoint(root: Path, version: int, fsync: bool) -> None:
    """Write the state at `version` as parquet; a checkpoint that cannot be written is not needed."""
    state = read_log(root, version)
    header = {"version": version, "schemas": state.schemas, "segments": state.segments, "stats": state.stats}
    table = state.episodes.table().columns.replace_schema_metadata({"brachium": json.dumps(header)})
    temporary = root / LOG / f".tmp-{ULID()}"
    try:
        pq.write_table(table, temporary, compression="zstd")
        if fsync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.rename(temporary, _checkpoint_path(root, version))
    except OSError:
        temporary.unlink(missing_ok=True)


def _read_checkpoint(root: Path, version: int) -> LogState | None:
    """Return the checkpoint at `version`, or None when it is damaged: the entries before it are all still there."""
    try:
        table = pq.ParquetFile(_checkpoint_path(root, version)).read()  # read_table imports a second of data sets
        header = json.loads(table.schema.metadata[b"brachium"])
        episodes = EpisodeRecords(EpisodeTable(table.replace_schema_metadata(None)))
        if header["version"] != version:
            return None
        return LogState(version, header["schemas"], header["segments"], episodes, header["stats"])
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None
