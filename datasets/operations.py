"""The verbs that change which episodes a store has, and their labels: ``edit``, ``filter``, ``split``, ``merge``.

None of them copies or encodes a frame. What is in a store stays there for those who open an older version of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..console import log, progress, table
from ..errors import ConfigError, StoreError, did_you_mean
from .derive import Part, derive, merged_schemas, new_folder, require_free
from .episode import EpisodeInfo
from .selection import OUTCOMES, Selection
from .split import side
from .store import EpisodeStore

LISTED = 12
"""Lines of a summary; what is more is counted."""
BY = ("episode", "instruction", "task")


def edit(
    *,
    store: str,
    where: Selection,
    instruction: str | None = None,
    success: str | bool | None = None,
    add_tags: Sequence[str] = (),
    remove_tags: Sequence[str] = (),
    remove: bool = False,
    dry_run: bool = False,
) -> int:
    """Change labels of episodes, or remove episodes. Older versions of the store stay as they are.

    Args:
        store: Folder of the store.
        where: Which episodes; at least one condition.
        instruction: New instruction.
        success: ``true``, ``false`` or ``unknown``.
        add_tags: Tags to add.
        remove_tags: Tags to take away.
        remove: Remove the episodes themselves.
        dry_run: Show what would be changed, and change nothing.

    Raises:
        ConfigError: Nothing to change, or nothing asked of the episodes.
        StoreError: No such episodes.
    """
    if success is not None and str(success).lower() not in OUTCOMES:
        raise ConfigError(f"no success={success!r}. {did_you_mean(str(success), OUTCOMES)}")
    if instruction is not None and not instruction.strip():
        raise ConfigError("expected instruction=WORDS, got none")
    if remove == (instruction is not None or success is not None or bool(add_tags) or bool(remove_tags)):
        raise ConfigError(
            "expected something to change: instruction=WORDS, success=true|false|unknown, add_tags=[a], "
            "remove_tags=[a], or remove=true alone"
        )
    if where.everything:
        raise ConfigError(
            "which episodes? Type where.episodes=[0,3-7], where.tags=[a] ... or where.steps=[1,null] for all"
        )
    opened = EpisodeStore.open(store)
    actions, rows = [], []
    for index in where.of(opened):
        episode = opened.episodes[index]
        changes: dict[str, Any] = {}
        if instruction is not None and instruction != episode.instruction:
            changes["instruction"] = instruction
        if success is not None and OUTCOMES[str(success).lower()] is not episode.success:
            changes["success"] = OUTCOMES[str(success).lower()]
        tags = [*dict.fromkeys([*(t for t in episode.tags if t not in remove_tags), *add_tags])]
        if tags != list(episode.tags):
            changes["tags"] = tags
        if remove:
            actions.append({"action": "remove_episode", "id": episode.id})
            rows.append([str(index), episode.id, "removed", episode.instruction])
        elif changes:
            actions.append({"action": "edit", "id": episode.id, **changes})
            rows += [
                [str(index), episode.id, key, f"{getattr(episode, key)!r} -> {value!r}"]
                for key, value in changes.items()
            ]
    _show(f"{store}: {len(actions)} episodes change", ["episode", "id", "what", ""], rows)
    if not actions:
        log("they are as asked already; nothing to do")
    elif _really(dry_run):
        version = opened.version
        after = opened.commit(actions)
        log(f"{store}: version {after.version}, {after.num_episodes} episodes; version {version} stays as it was")
    return 0


def filter_store(*, store: str, where: Selection, out: str, overwrite: bool = False, dry_run: bool = False) -> int:
    """Make a store of the episodes that fit. Files are shared with the old one, so it takes no time and no space.

    Args:
        store: Folder of the store.
        where: Which episodes.
        out: Folder of the new store.
        overwrite: Replace a store at `out`.
        dry_run: Show what would be taken, and make nothing.
    """
    opened = EpisodeStore.open(store)
    chosen = where.of(opened)
    _show_parts({out: (opened, chosen)})
    if _really(dry_run):
        with new_folder(Path(out), overwrite=overwrite) as work:
            derive(work, [(opened, chosen)])
        _done(out)
    return 0


def split(
    *,
    store: str,
    out: str,
    where: Selection,
    shares: Mapping[str, float] | None = None,
    by: str = "episode",
    seed: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Split a store into several, OUT/NAME for each share. Each episode's side depends on itself and the seed alone.

    Args:
        store: Folder of the store.
        out: Folder for the new stores.
        shares: Name -> share of the episodes; they sum to 1. ``{train: 0.9, test: 0.1}`` by default.
        by: What stays together: each ``episode`` by itself, all of an ``instruction``, or all of a ``task``.
        where: Which episodes are split; all by default.
        seed: Another seed is another split.
        overwrite: Replace stores that are there.
        dry_run: Show what would be made, and make nothing.

    Raises:
        ConfigError: Shares that do not sum to 1.
    """
    shares = {"train": 0.9, "test": 0.1} if shares is None else shares
    if not shares or min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise ConfigError(
            f"expected shares that sum to 1, such as shares={{train: 0.9, test: 0.1}}, got {dict(shares)}"
        )
    if by not in BY:
        raise ConfigError(f"no by={by!r}. {did_you_mean(by, BY)}")
    opened = EpisodeStore.open(store)
    sides: dict[str, list[int]] = {name: [] for name in shares}
    for index in where.of(opened):
        sides[side(_group(opened.episodes[index], by), shares, seed)].append(index)
    empty = [name for name, share in shares.items() if share > 0 and not sides[name]]
    parts: dict[str, Part] = {f"{out}/{name}": (opened, chosen) for name, chosen in sides.items()}
    _show_parts(parts)
    if empty:
        raise StoreError(f"no episode falls to {', '.join(empty)}: use another seed=, by=, or larger shares")
    if _really(dry_run):
        for path in parts:  # all or none
            require_free(Path(path), overwrite=overwrite)
        for path, part in parts.items():
            if part[1]:
                with new_folder(Path(path), overwrite=overwrite) as work:
                    derive(work, [part])
                _done(path)
    return 0


def merge(*, stores: Sequence[str], out: str, where: Selection, overwrite: bool = False, dry_run: bool = False) -> int:
    """Make one store of several, of one robot or of many. Files are shared with the old ones.

    Args:
        stores: Folders of stores, in the order in which their episodes are wanted.
        out: Folder of the new store.
        where: Which episodes of each; all by default.
        overwrite: Replace a store at `out`.
        dry_run: Show what would be taken, and make nothing.

    Raises:
        SpecMismatchError: Stores that say different things about one embodiment.
    """
    if isinstance(stores, str) or not stores:
        raise ConfigError(f"expected stores=[A,B], got {stores!r}")
    parts: dict[str, Part] = {}
    with progress("reading logs", total=len(stores), unit="stores") as bar:
        for path in stores:
            opened = EpisodeStore.open(path)
            parts[path] = opened, where.of(opened)
            bar.update(1)
    merged_schemas([opened for opened, _ in parts.values()])
    _show_parts(parts)
    if _really(dry_run):
        with new_folder(Path(out), overwrite=overwrite) as work:
            derive(work, list(parts.values()))
        _done(out)
    return 0


def _group(episode: EpisodeInfo, by: str) -> str:
    return {"episode": episode.id, "instruction": episode.instruction, "task": str(episode.meta.get("task", ""))}[by]


def _really(dry_run: bool) -> bool:
    if dry_run:
        log("dry run: nothing was changed")
    return not dry_run


def _done(path: str) -> None:
    made = EpisodeStore.open(path)
    log(f"{path}: {made.num_episodes} episodes, {made.total_frames} steps. See: brachium inspect store={path}")


def _show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    shown = rows[:LISTED] + ([[f"... {len(rows) - LISTED} more", "", "", ""]] if len(rows) > LISTED else [])
    table(title, columns, shown)


def _show_parts(parts: Mapping[str, Part]) -> None:
    """A line a store: how many episodes, and of what outcomes."""
    rows = []
    for path, (opened, chosen) in parts.items():
        counts = Counter(str(opened.episodes[index].success) for index in chosen)
        words = f"{counts['True']} succeeded, {counts['False']} failed, {counts['None']} unlabelled"
        steps = sum(opened.episodes[index].length for index in chosen)
        rows.append([path, f"{len(chosen)} of {opened.num_episodes}", str(steps), words])
    table("episodes", ["store", "episodes", "steps", "outcomes"], rows)
