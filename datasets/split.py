"""Splits by episode that stay as they are when episodes are added."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def is_heldout(episode_id: str, fraction: float, seed: int) -> bool:
    """Whether an episode is held out: a keyed hash of its id falls below `fraction`."""
    digest = hashlib.blake2b(f"{seed}:{episode_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def side(key: str, shares: Mapping[str, float], seed: int) -> str:
    """Which of `shares` (name -> share, summing to 1) a key falls to, by a keyed hash of it alone."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    place, edge = int.from_bytes(digest, "little") / 2.0**64, 0.0
    for name, share in shares.items():
        edge += share
        if place < edge:
            return name
    return [name for name, share in shares.items() if share > 0][-1]
