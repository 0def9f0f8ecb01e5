"""The verb ``brachium convert``: foreign episode data into an episode store."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from ulid import ULID

from ..console import log, progress
from ..errors import ConfigError, SpecMismatchError, StoreError, did_you_mean
from .formats.base import EpisodeImporter, ImportedEpisode
from .schema import StoreSchema
from .store import EpisodeStore
from .writer import EpisodeWriter

SEGMENT = 64
"""Episodes that share a segment."""
UNLABELLED = ("refuse", "keep", "skip")


def convert(
    *, source: str, out: str, data: EpisodeImporter, unlabelled: str = "refuse", overwrite: bool = False
) -> dict[str, Any]:
    """Convert foreign episode data into a new store. JPEG frames keep their bytes; nothing is re-encoded.

    The store appears under its name when it is complete; an interrupted conversion leaves nothing behind.

    Args:
        source: Folder of the foreign data.
        out: Folder of the new store.
        data: Importer of the format, from ``conf/data/``.
        unlabelled: What to do with episodes without an instruction: ``refuse`` the data, ``keep`` or ``skip`` them.
        overwrite: Replace an episode store at `out`.

    Returns:
        ``{"store": path, "episodes": n, "frames": n, "instructions": {text: episodes}}``.

    Raises:
        NotFoundError: Nothing at `source`.
        StoreError: Damaged data, or something at `out` already.
        SpecMismatchError: Data that does not fit the importer's embodiment.
        DiskSpaceError: No space; nothing is left behind.
    """
    if unlabelled not in UNLABELLED:
        raise ConfigError(f"no unlabelled={unlabelled!r}. {did_you_mean(unlabelled, UNLABELLED)}")
    target = Path(out)
    _check_target(target, overwrite)
    total = data.count(Path(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.converting-{ULID()}"
    try:
        store = EpisodeStore.create(work, StoreSchema(embodiment=data.embodiment))
        with (
            EpisodeWriter(store, episodes_per_segment=SEGMENT, source=os.fspath(source)) as writer,
            progress(f"converting {source}", total=total, unit="episodes") as bar,
        ):
            for episode in data.read(Path(source)):
                _write(writer, episode, unlabelled)
                bar.update(1)
        store = store.refresh()
        if not store.num_episodes:
            raise StoreError(f"{source} holds no episodes with steps")
        instructions = Counter(e.instruction for e in store.episodes)
        if overwrite and target.exists():
            shutil.rmtree(target)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log(f"{store.num_episodes} episodes, {store.total_frames} steps -> {target}")
    log(f"Look at them: brachium inspect store={target}")
    return {
        "store": str(target),
        "episodes": store.num_episodes,
        "frames": store.total_frames,
        "instructions": dict(instructions),
    }


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise StoreError(f"{target} exists already: choose another out=, or say overwrite=true to replace it")
    with contextlib.suppress(SpecMismatchError):
        EpisodeStore.open(target)  # raises unless it is a store: nothing else is ever deleted


def _write(writer: EpisodeWriter, episode: ImportedEpisode, unlabelled: str) -> None:
    silent = not episode.instruction.strip()
    if not episode.steps or (silent and unlabelled == "skip"):
        return
    if silent and unlabelled == "refuse":
        raise StoreError(
            f"an episode has no instruction ({dict(episode.meta) or 'nothing else is noted of it'}). "
            "Type unlabelled=keep to take such episodes all the same, or unlabelled=skip to leave them out"
        )
    writer.begin(None if silent else episode.instruction, tags=episode.tags, meta=episode.meta)
    for step in episode.steps:
        writer.step(step.images, state=step.state, action=step.action, timestamp=step.timestamp)
    writer.end(episode.success)
