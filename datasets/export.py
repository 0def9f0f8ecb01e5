"""The verb ``brachium export``: an episode store into a foreign format."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from ulid import ULID

from ..console import log, progress
from ..errors import StoreError
from .layout import disk_errors
from .selection import Selection
from .store import EpisodeStore


class EpisodeExporter(Protocol):
    """Writes one foreign format. One file in ``datasets/formats/`` and one YAML in ``conf/format/`` make a new one."""

    def write(self, store: EpisodeStore, episodes: Sequence[int], out: Path, step: Callable[[int], None]) -> None:
        """Write `episodes` of `store` into the new folder `out`, and tell `step` of every finished one."""


def export(
    *,
    store: str,
    out: str,
    format: EpisodeExporter,
    where: Selection,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Write episodes in a foreign format. The folder appears under its name when it is complete.

    Args:
        store: Folder of the store; ``PATH@EMBODIMENT`` where it holds several.
        out: New folder.
        format: Exporter, from ``conf/format/``.
        where: Which episodes; all by default.
        overwrite: Replace what is at `out`.
        dry_run: Say what would be written, and write nothing.

    Raises:
        StoreError: Something is at `out` already, or the format cannot hold the episodes.
        DiskSpaceError: No space; nothing is left behind.
    """
    opened, target = EpisodeStore.open(store), Path(out)
    opened.schema  # noqa: B018 (says so if it holds several embodiments)
    chosen = where.of(opened)
    steps = sum(opened.episodes[i].length for i in chosen)
    log(f"{len(chosen)} of {opened.num_episodes} episodes, {steps} steps -> {target} ({type(format).__name__})")
    if dry_run:
        log("dry run: nothing was written")
        return 0
    if target.exists() and not overwrite:
        raise StoreError(f"{target} exists already: choose another out=, or say overwrite=true to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.exporting-{ULID()}"
    try:
        with disk_errors(target), progress("exporting", total=len(chosen), unit="episodes") as bar:
            format.write(opened, chosen, work, bar.update)
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log(f"{target}: written")
    return 0
