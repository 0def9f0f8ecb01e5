"""New stores from old ones without copying: segments never change, so another store may share their files."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ulid import ULID

from ..errors import SpecMismatchError, StoreError
from . import commitlog
from .layout import SEGMENTS, disk_errors, fsync_dir
from .schema import StoreSchema
from .store import EpisodeStore

Part = tuple[EpisodeStore, Sequence[int]]
"""A store, and the numbers of the episodes that are taken of it."""


def require_free(target: Path, *, overwrite: bool) -> None:
    """Raise StoreError where something is at `target`, or, with `overwrite`, something that is no store."""
    if not target.exists():
        return
    if not overwrite:
        raise StoreError(f"{target} exists already: choose another out=, or say overwrite=true to replace it")
    with contextlib.suppress(SpecMismatchError):
        EpisodeStore.open(target)  # raises unless it is a store: nothing else is ever deleted


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to build in; it gets the name `target` when all went well, and is deleted otherwise.

    Raises:
        StoreError: Something is at `target` already, or, with `overwrite`, something that is no store.
    """
    require_free(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.making-{ULID()}"
    try:
        with disk_errors(target):
            yield work
        if overwrite and target.exists():
            shutil.rmtree(target)
        work.rename(target)
        fsync_dir(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def derive(target: Path, parts: Sequence[Part]) -> EpisodeStore:
    """Make a store of some episodes of others, in the order given; their segments are linked, not copied.

    Episodes keep their ids and labels; one that comes twice is taken once. Where links cannot be made (another disk),
    files are copied.

    Raises:
        StoreError: No episodes, or something at `target`.
        SpecMismatchError: Schemas of one embodiment that do not fit.
    """
    if not any(len(episodes) for _, episodes in parts):
        raise StoreError(f"nothing to put into {target}: no episodes were chosen")
    schemas = merged_schemas([store for store, _ in parts])
    made = EpisodeStore.create(target, schemas[0])
    for schema in schemas[1:]:
        made.set_schema(schema)
    segments: dict[str, dict[str, Any]] = {}
    runs: list[dict[str, Any]] = []
    for store, episodes in parts:
        records, theirs = store.raw_records(episodes)
        for segment in theirs:
            link_segment(store.path, target, segment)
        segments |= theirs
        for record in records:  # the order of adding is the order of episodes
            if not runs or runs[-1]["segment"] != record["segment"]:
                runs.append({"action": "add_episodes", "segment": record["segment"], "episodes": []})
            runs[-1]["episodes"].append(record)
    added = [{"action": "add_segment", "id": segment, **about} for segment, about in segments.items()]
    commitlog.commit(target, [*added, *runs], after=len(schemas) - 1)
    return EpisodeStore.open(target)


def merged_schemas(stores: Sequence[EpisodeStore]) -> list[StoreSchema]:
    """One schema for each embodiment of the stores; of two that differ, the one that can read the other.

    Raises:
        SpecMismatchError: Two of which neither can; the message says in what they differ.
    """
    found: dict[str, tuple[StoreSchema, Path]] = {}
    for store in stores:
        for name in store.embodiments:
            schema = store.of(name).schema
            if name not in found:
                found[name] = schema, store.path
                continue
            other, path = found[name]
            try:
                other.require_reads(schema, f"embodiment {name!r} of {path}", f"that of {store.path}")
            except SpecMismatchError:
                schema.require_reads(other, f"embodiment {name!r} of {store.path}", f"that of {path}")
                found[name] = schema, store.path
    return [schema for schema, _ in found.values()]


def link_segment(source: Path, target: Path, segment: str) -> None:
    """Give the store at `target` a segment of the one at `source`; nothing happens where it has it."""
    there = target / SEGMENTS / segment
    if there.exists():
        return
    temporary = target / SEGMENTS / f".tmp-{ULID()}"
    try:
        shutil.copytree(source / SEGMENTS / segment, temporary, copy_function=_link)
        temporary.rename(there)
    except shutil.Error as error:
        raise StoreError(f"segment {segment} of {source} cannot be taken over: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_dir(target / SEGMENTS)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
