"""The verbs that write steps anew: ``compact`` joins small segments, ``resize`` changes the size of images."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..console import human_bytes, log, progress, require_disk, table
from ..errors import ConfigError
from . import commitlog
from .derive import new_folder
from .image import ImageProfile
from .layout import JOURNAL, SEGMENTS
from .schema import StoreSchema
from .staging import StagingSegment
from .store import EpisodeStore
from .writer import EpisodeWriter


def compact(*, store: str, segment_mb: float = 512.0, drop_old: bool = False, dry_run: bool = False) -> int:
    """Join small segments to large ones: fewer files, and no place for episodes that were removed.

    Frames keep their bytes. Readers that have the store open, and older versions, go on with the old segments, which
    stay on the disk until `drop_old`.

    Args:
        store: Folder of the store.
        segment_mb: Size of a segment that is large enough [MB].
        drop_old: Delete the segments that the newest version no longer needs; older versions cannot be read then.
        dry_run: Show what would be done, and do nothing.

    Raises:
        ConfigError: A size that is none.
        StoreError: A damaged frame; nothing is changed.
    """
    if segment_mb <= 0:
        raise ConfigError(f"expected segment_mb above 0, got {segment_mb}")
    opened = EpisodeStore.open(store)
    groups = [(part, group) for part in _parts(opened) for group in _groups(part, segment_mb * 1e6)]
    unused = _unused(opened) if drop_old else []
    _tell(opened, [group for _, group in groups], unused)
    if dry_run:
        log("dry run: nothing was changed")
        return 0
    total = sum(int(part.offsets[i + 1] - part.offsets[i]) for part, group in groups for i in group)
    if groups:
        require_disk(opened.path, sum(_bytes(opened.path, s) for s in _segments_of(opened, groups)), "compacting")
    with progress(f"compacting {store}", total=total, unit="steps") as bar:
        for part, group in groups:
            for _ in _rewrite(part, group):
                bar.update(1)
    if drop_old:
        opened = opened.refresh()
        _drop(opened, _unused(opened))
    opened = opened.refresh()
    log(f"{store}: version {opened.version}, {len(_used(opened))} segments")
    return 0


def resize(
    *,
    store: str,
    out: str,
    sizes: Mapping[str, Sequence[int]],
    profile: str = "jpeg",
    quality: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Make a store whose images have other sizes. Smaller images are averages of areas; maps are sampled, not mixed.

    Args:
        store: Folder of the store; ``PATH@EMBODIMENT`` where it holds several.
        out: Folder of the new store.
        sizes: Camera or map -> [height, width]; ``all`` stands for those that are not named. ``{}`` keeps all sizes, to
            encode anew.
        profile: Encoding of the new images: jpeg, jpeg95-444, raw, or video (for archives).
        quality: Another JPEG quality.
        overwrite: Replace a store at `out`.
        dry_run: Show what would be made, and make nothing.

    Raises:
        SpecMismatchError: No such camera or map.
        ConfigError: Sizes that are none.
    """
    opened = EpisodeStore.open(store)
    schema = _resized(opened.schema, sizes)
    rows = [
        [old.name, "x".join(map(str, old.shape[:2])), "x".join(map(str, new.shape[:2]))]
        for old, new in zip(opened.schema.images, schema.images)
    ]
    table(f"{store}: {opened.num_episodes} episodes, {opened.total_frames} steps", ["image", "from", "to"], rows)
    if dry_run:
        log("dry run: nothing was changed")
        return 0
    with new_folder(Path(out), overwrite=overwrite) as work:
        made = EpisodeStore.create(work, schema)
        options = {"profile": profile, "quality": quality, "source": f"resize of {opened.path.name}"}
        with (
            EpisodeWriter(made, episodes_per_segment=64, checked=False, **options) as writer,  # type: ignore[arg-type]
            progress(f"resizing {store}", total=opened.total_frames, unit="steps") as bar,
        ):
            for index in range(opened.num_episodes):
                for _ in _copy_resized(opened, index, schema, writer):
                    bar.update(1)
    log(f"{out}: {opened.num_episodes} episodes. See: brachium inspect store={out}")
    return 0


def _parts(store: EpisodeStore) -> list[EpisodeStore]:
    return [store.of(name) for name in store.embodiments]


def _bytes(root: Path, segment: str) -> int:
    return sum(f.stat().st_size for f in (root / SEGMENTS / segment).rglob("*") if f.is_file())


def _used(store: EpisodeStore) -> set[str]:
    return {episode.segment for episode in store.episodes}


def _unused(store: EpisodeStore) -> list[str]:
    """Segments of the log of which no episode of the newest version has steps."""
    return sorted(set(store.segments) - _used(store))


def _segments_of(store: EpisodeStore, groups: Sequence[tuple[EpisodeStore, Sequence[int]]]) -> set[str]:
    return {part.episodes[i].segment for part, group in groups for i in group}


def _groups(store: EpisodeStore, enough: float) -> list[list[int]]:
    """Runs of episodes that are to share a segment. Segments that are large and full already are left alone."""
    kept: dict[str, int] = {}
    for episode in store.episodes:
        kept[episode.segment] = kept.get(episode.segment, 0) + episode.length
    sizes = {segment: float(_bytes(store.path, segment)) for segment in kept}
    frames = {segment: about["frames"] for segment, about in store.segments.items()}
    profiles = {segment: store.segment(segment).profile for segment in kept}
    full = {s for s in kept if frames[s] == kept[s]}
    groups: list[list[int]] = []
    size, codec = 0.0, None
    for episode in store.episodes:
        if episode.segment in full and sizes[episode.segment] >= enough:
            continue
        mine = profiles[episode.segment]
        if mine.group > 1:  # groups of a video cannot be cut without encoding them again
            continue
        if not groups or size >= enough or mine != codec:
            groups.append([])
            size, codec = 0.0, mine
        groups[-1].append(episode.index)
        size += sizes[episode.segment] * episode.length / max(1, frames[episode.segment])
    # a group that is one whole segment already gains nothing
    return [g for g in groups if not (len({s := store.episodes[i].segment for i in g}) == 1 and s in full)]


def _rewrite(store: EpisodeStore, group: Sequence[int]) -> Iterator[int]:
    """Write the steps of some episodes into one new segment, and move the episodes there. Yields step by step."""
    schema = store.schema
    profile: ImageProfile = store.segment(store.episodes[group[0]].segment).profile
    segment = StagingSegment.new(store.path, schema, profile, source="compact", fsync=True, copy=True)
    try:
        for index in group:
            episode = store.episodes[index]
            about = {"id": episode.id, "instruction": episode.instruction, "tags": list(episode.tags)}
            segment.begin({**about, "meta": dict(episode.meta)})
            start = segment.frames
            frames = np.arange(store.offsets[index], store.offsets[index + 1])
            fields = {field: store.gather(field, frames) for field in schema.fields}
            for step, frame in enumerate(frames.tolist()):
                images = {spec.name: store.encoded(spec.name, frame) for spec in schema.images}
                segment.append(images, {field: values[step] for field, values in fields.items()})
                yield frame
            end = {"start": start, "length": episode.length, "success": episode.success}
            segment.end({**about, "meta": dict(episode.meta), **end})
        added, episodes = segment.publish()
        moved = [{"id": e["id"], "start": e["start"]} for e in episodes["episodes"]]
        store.commit([added, {"action": "move_episodes", "segment": segment.id, "episodes": moved}])
        (segment.folder / JOURNAL).unlink(missing_ok=True)
    except BaseException:
        if segment.id not in commitlog.read_log(store.path).segments:  # else its episodes are there now
            shutil.rmtree(segment.folder, ignore_errors=True)
        raise
    finally:
        segment.release()


def _drop(store: EpisodeStore, segments: Sequence[str]) -> None:
    if not segments:
        return
    freed = sum(_bytes(store.path, s) for s in segments)
    store.commit([{"action": "drop_segments", "ids": list(segments)}])
    for segment in segments:
        shutil.rmtree(store.path / SEGMENTS / segment, ignore_errors=True)
    log(f"{store.path}: dropped {len(segments)} segments, {human_bytes(freed)}")


def _tell(store: EpisodeStore, groups: Sequence[Sequence[int]], unused: Sequence[str]) -> None:
    rows = [["segments now", str(len(_used(store)))]]
    rows += [["episodes that move", str(sum(map(len, groups)))], ["new segments", str(len(groups))]]
    if unused:
        size = human_bytes(sum(_bytes(store.path, s) for s in unused))
        rows.append(["segments that no episode needs", f"{len(unused)}, {size}"])
    table(f"Store {store.path}", ["what", "value"], rows)


def _resized(schema: StoreSchema, sizes: Mapping[str, Sequence[int]]) -> StoreSchema:
    named = {name: size for name, size in sizes.items() if name != "all"}
    for name, size in sizes.items():
        if name != "all":
            schema.image(name)
        if len(size) != 2 or min(size) < 1:
            raise ConfigError(f"expected sizes as CAMERA: [height, width], got {name}: {list(size)}")

    def new(spec: Any) -> Any:
        size = named.get(spec.name, sizes.get("all"))
        return spec if size is None else replace(spec, shape=(int(size[0]), int(size[1]), spec.shape[2]))

    embodiment = replace(schema.embodiment, cameras=tuple(new(c) for c in schema.embodiment.cameras))
    return replace(schema, embodiment=embodiment, maps=tuple(new(m) for m in schema.maps))


def _copy_resized(store: EpisodeStore, index: int, schema: StoreSchema, writer: EpisodeWriter) -> Iterator[int]:
    import cv2

    episode, info = store.episode(index), store.episodes[index]
    cameras = {c.name for c in schema.embodiment.cameras}
    writer.begin(info.instruction or None, tags=info.tags, meta=dict(info.meta))
    present = episode.extras.get("present")
    for t in range(len(episode)):
        there = dict(zip(schema.optional, present[t])) if present is not None else {}
        images = {}
        for spec in schema.images:
            if not there.get(spec.name, True):
                continue
            image = episode.images[spec.name][t]
            if image.shape != spec.shape:
                smaller = spec.shape[0] <= image.shape[0] and spec.shape[1] <= image.shape[1]
                way = (cv2.INTER_AREA if smaller else cv2.INTER_LINEAR) if spec.name in cameras else cv2.INTER_NEAREST
                image = cv2.resize(image, (spec.shape[1], spec.shape[0]), interpolation=way).reshape(spec.shape)
            images[spec.name] = image
        extras = {e.name: episode.extras[e.name][t] for e in schema.extras if there.get(e.name, True)}
        writer.step(images, episode.state[t], episode.action[t], float(episode.timestamp[t]), extras)
        yield t
    writer.end(info.success)
