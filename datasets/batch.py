"""A batch of windows: what a trainer gets and a transform changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import StoreError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """b windows of t observation steps and h action steps.

    A field with offsets of its own (`WindowSpec.offsets`) has its own number of steps in place of t or h.

    Attributes:
        images: Camera or map name -> (b, t, H, W, C), uint8 for cameras; the last of the t steps is the present one.
        state: float32 (b, t, s), in the units of the embodiment.
        action: float32 (b, h, a), in the units of the embodiment; row 0 belongs to the present step.
        obs_pad: bool (b, t); True where a step before the episode's first stands repeated.
        action_pad: bool (b, h); True where an action after the episode's last stands repeated. Mask it in losses.
        instruction: One instruction a window.
        frame: int64 (b, t) global frame indices of the observations in their store.
        episode: int64 (b,) episode indices in their store.
        extras: Extra field -> (b, t, *shape).
        pads: Field with offsets of its own -> bool (b, its steps), as `obs_pad`.
        present: Optional field -> bool (b, t); False where the step lacks it, and what stands there means nothing.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    action: np.ndarray
    obs_pad: np.ndarray
    action_pad: np.ndarray
    instruction: tuple[str, ...]
    frame: np.ndarray
    episode: np.ndarray
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    pads: Mapping[str, np.ndarray] = field(default_factory=dict)
    present: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.instruction)


def collate(batches: Sequence[Batch]) -> Batch:
    """Join batches along b.

    Raises:
        StoreError: No batch, or batches that differ in cameras, extras or shapes.
    """
    if not batches:
        raise StoreError("expected at least one batch to collate, got none")
    first = batches[0]
    kept = ("images", "extras", "pads", "present")
    if any(set(getattr(b, key)) != set(getattr(first, key)) for b in batches for key in kept):
        raise StoreError("batches with different cameras, extras or offsets cannot be collated")
    try:
        return Batch(
            state=np.concatenate([b.state for b in batches]),
            action=np.concatenate([b.action for b in batches]),
            obs_pad=np.concatenate([b.obs_pad for b in batches]),
            action_pad=np.concatenate([b.action_pad for b in batches]),
            instruction=tuple(text for b in batches for text in b.instruction),
            frame=np.concatenate([b.frame for b in batches]),
            episode=np.concatenate([b.episode for b in batches]),
            **{
                key: {name: np.concatenate([getattr(b, key)[name] for b in batches]) for name in getattr(first, key)}
                for key in kept
            },
        )
    except ValueError as error:
        raise StoreError(f"batches with different shapes cannot be collated: {error}") from error
