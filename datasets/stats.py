"""The verb ``brachium stats``: mean, deviation, range and quantiles of every low-dimensional field."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ulid import ULID

from ..console import log, table
from .layout import CACHE
from .selection import Selection
from .statistics import Statistics, compute_statistics
from .store import EpisodeStore


def stats(
    *,
    store: str,
    where: Selection,
    fields: Sequence[str] = ("state", "action"),
    out: str | None = None,
    record: bool = False,
    dry_run: bool = False,
) -> int:
    """Print statistics; they are kept in the store's cache until its episodes change.

    Args:
        store: Folder of the store; ``PATH@EMBODIMENT`` where it holds several.
        where: Which episodes; all by default.
        fields: Low-dimensional fields.
        out: JSON file to write them to as well.
        record: Commit them to the store's log, for other readers.
        dry_run: Say what would be computed, and compute nothing.
    """
    opened = EpisodeStore.open(store)
    chosen = where.of(opened)
    if dry_run:
        log(f"dry run: {', '.join(fields)} of {len(chosen)} of {opened.num_episodes} episodes of {store}")
        return 0
    found = cached_statistics(opened, chosen, fields)
    for field in fields:
        spec, one = opened.schema.field(field), found[field]
        names = spec.names if len(spec.names) == one.dim else [str(k) for k in range(one.dim)]
        units = spec.units if len(spec.units) == one.dim else [""] * one.dim
        keys = ("mean", "std", "min", "q01", "q99", "max")
        rows = [
            [name, unit, *(f"{getattr(one, key)[k]:.5g}" for key in keys)]
            for k, (name, unit) in enumerate(zip(names, units))
        ]
        table(f"{field}: {one.count} steps of {len(chosen)} episodes", ["name", "unit", *keys], rows)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(found.to_dict(), indent=1) + "\n")
        log(f"{out}: written")
    if record:
        action = {"action": "set_stats", "embodiment": opened.embodiment.name, "stats": found.to_dict()}
        log(f"{store}: version {opened.commit([action]).version} holds them")
    return 0


def cached_statistics(store: EpisodeStore, episodes: Sequence[int], fields: Sequence[str]) -> Statistics:
    """`compute_statistics`, kept in ``cache/stats`` under a name that changes with what they are taken of."""
    asked = json.dumps([store.fingerprint, [int(i) for i in episodes], list(fields)])
    path = store.path / CACHE / "stats" / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.json"
    try:
        return Statistics.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = compute_statistics(store, np.asarray(episodes), fields)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{ULID()}")
        temporary.write_text(json.dumps(found.to_dict()))
        os.replace(temporary, path)
    except OSError as error:
        log(f"statistics are not kept: {error}")
    return found
