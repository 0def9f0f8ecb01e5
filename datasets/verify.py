"""The verb ``brachium verify``: every checksum of a store, and what is lost where one does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..console import human_bytes, log, progress, table
from ..errors import BrachiumError, StoreError
from . import commitlog
from .episode import EpisodeInfo
from .image import MISSING, decode_into
from .layout import LOG, SEGMENTS, STAGING
from .reader import ImageArray, MappedFiles, SegmentReader, checked_frame
from .store import EpisodeStore


@dataclass(frozen=True)
class Damage:
    """Something that is wrong.

    Attributes:
        where: File or folder.
        what: What is wrong with it.
        episodes: Ids of the episodes that are lost by it; empty where none is.
    """

    where: str
    what: str
    episodes: tuple[str, ...] = ()


def verify(*, store: str, decode: bool = False, remove: bool = False, threads: int = 2, dry_run: bool = False) -> int:
    """Read every byte of a store against its checksums. Exit code 1 says that something is damaged.

    Args:
        store: Folder of the store.
        decode: Decode every frame too, which finds what was broken before it was stored; much slower.
        remove: Take damaged episodes out of the newest version, so that the rest trains without errors.
        threads: Segments at once.
        dry_run: With `remove`, only say which episodes would go.

    Raises:
        StoreError: A log that cannot be read: nothing can be said then.
    """
    opened = EpisodeStore.open(store)
    found = list(_log_entries(opened.path))
    _tell_leftovers(opened)
    by_segment: dict[str, list[EpisodeInfo]] = {}
    for episode in opened.episodes:
        by_segment.setdefault(episode.segment, []).append(episode)
    frames = {segment: about["frames"] for segment, about in opened.segments.items()}
    with (
        progress(f"verifying {store}", total=len(by_segment), unit="segments") as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        for bad in pool.map(
            lambda s: list(check_segment(opened.path, s, frames[s], by_segment[s], decode=decode)), by_segment
        ):
            found += bad
            bar.update(1, damaged=len(found))
    lost = sorted({i for damage in found for i in damage.episodes})
    size = human_bytes(sum(f.stat().st_size for f in opened.path.rglob("*") if f.is_file()))
    if not found:
        log(f"{store}: {opened.num_episodes} episodes, {opened.total_frames} steps, {size}: all checksums fit")
        return 0
    numbers = {e.id: e.index for e in opened.episodes}
    rows = [[", ".join(str(numbers[i]) for i in d.episodes) or "none", d.where, d.what] for d in found]
    table(f"{store}: damage", ["episodes lost", "where", "what"], rows)
    if lost and remove and not dry_run:
        after = opened.commit([{"action": "remove_episode", "id": identity} for identity in lost])
        log(f"{store}: version {after.version} is without the {len(lost)} damaged episodes")
    elif lost:
        log(f"{len(lost)} of {opened.num_episodes} episodes are lost. Type remove=true to take them out of the store")
    return 1


def check_segment(
    root: Path, segment: str, expected: int, episodes: list[EpisodeInfo], *, decode: bool = False
) -> Iterator[Damage]:
    """Yield what is wrong with a segment of `expected` steps, as far as it concerns `episodes`."""
    path = root / SEGMENTS / segment
    everybody = tuple(e.id for e in episodes)
    try:
        reader = SegmentReader(path)
        schema = reader.schema
        if reader.frames != expected:
            yield Damage(str(path), f"has {reader.frames} steps, expected {expected}", everybody)
            return
    except BrachiumError as error:
        yield Damage(str(path), _plain(error), everybody)
        return
    for field in schema.fields:
        try:
            reader.lowdim(field, schema.columns(field), np.dtype(schema.field(field).dtype))
        except BrachiumError as error:
            yield Damage(str(path / "lowdim" / field), _plain(error), everybody)
    for spec in schema.images:
        try:
            array = reader.image(spec.name)
            index = array.load_index()
        except BrachiumError as error:
            yield Damage(str(path / "images" / spec.name), _plain(error), everybody)
            continue
        out = np.empty(spec.shape, spec.dtype) if decode else None
        files = MappedFiles(limit=2)
        for episode in episodes:
            why = _bad_frame(array, index, files, range(episode.start, episode.start + episode.length), out)
            if why:
                yield Damage(str(array.folder), why, (episode.id,))


def _bad_frame(array: ImageArray, index: np.ndarray, files: MappedFiles, steps: range, out: np.ndarray | None) -> str:
    """What is wrong with the first frame of `steps` that cannot be read; empty when all can."""
    for step in steps:
        offset, length = index[step].tolist()
        if offset == MISSING:
            continue
        try:
            data = checked_frame(files.get(array.path(step // array.shard)), offset, length)
            if out is not None:
                decode_into(data, out, array.kind, step)
        except StoreError as error:
            return f"frame {step} {_plain(error)}"
    return ""


def _plain(error: BaseException) -> str:
    return str(error).removeprefix("damaged store: ")


def _log_entries(root: Path) -> Iterator[Damage]:
    """Entries that a checkpoint stands in for are read too: older versions need them."""
    for path in sorted((root / LOG).glob("*.json")):
        try:
            commitlog.read_entry(root, int(path.stem))
        except StoreError as error:
            yield Damage(str(path), f"{_plain(error)}; versions before the next checkpoint cannot be opened")


def _tell_leftovers(store: EpisodeStore) -> None:
    """Folders that no version knows: no episode is lost, but they take space."""
    known = set(store.segments)
    for folder in sorted((store.path / SEGMENTS).iterdir()):
        if folder.is_dir() and folder.name not in known and not folder.name.startswith(".tmp-"):
            log(f"note: {folder} belongs to no episode; the next writer takes it over or leaves it")
    for folder in sorted((store.path / STAGING).iterdir()):
        log(f"note: {folder} is being recorded, or was left by a writer that died; the next writer saves what is whole")
