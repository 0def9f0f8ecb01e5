"""Splits by episode that stay as they are when episodes are added."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from .store import EpisodeStore


def is_heldout(episode_id: str, fraction: float, seed: int) -> bool:
    """Whether an episode is held out: a keyed hash of its id falls below `fraction`."""
    digest = hashlib.blake2b(f"{seed}:{episode_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def split_episodes(
    store: EpisodeStore, fraction: float, seed: int, episodes: Sequence[int] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split episodes (all by default) into training and held-out ones by a hash of their ids.

    Each episode's side depends on its own id, `fraction` and `seed` alone: recording more never moves an old one. The
    held-out share is `fraction` on average, so a small store may hold out none.

    Returns:
        (train_indices, heldout_indices), each in store order.

    Raises:
        ConfigError: A fraction outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ConfigError(f"expected a held-out fraction from 0 to 1, got {fraction}")
    chosen = range(len(store.episodes)) if episodes is None else episodes
    train: list[int] = []
    heldout: list[int] = []
    for index in chosen:
        (heldout if is_heldout(store.episodes[index].id, fraction, seed) else train).append(int(index))
    return tuple(train), tuple(heldout)
