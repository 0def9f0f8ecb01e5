"""One recorded episode: what is known about it, and its arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class EpisodeInfo:
    """What is known about an episode without reading its arrays.

    Attributes:
        id: Unique, sortable by time of recording (ULID).
        index: Place in `EpisodeStore.episodes`.
        segment: Id of the segment that holds its steps.
        start: First step inside the segment.
        length: Number of steps.
        instruction: What was to be done.
        success: Whether it was; None when nobody said.
        tags: Free labels.
        meta: What the recorder noted, for example ``{"seed": 3, "task": "reach"}``.
    """

    id: str
    index: int
    segment: str
    start: int
    length: int
    instruction: str
    success: bool | None
    tags: tuple[str, ...]
    meta: Mapping[str, Any] = field(compare=False)


class LazyMeta(Mapping[str, Any]):
    """What a recorder noted of an episode, read when first asked for: there are stores with a hundred thousand."""

    def __init__(self, read: Callable[[], Mapping[str, Any]]) -> None:
        self._read = read
        self._found: Mapping[str, Any] | None = None

    def _all(self) -> Mapping[str, Any]:
        if self._found is None:
            self._found = self._read()
        return self._found

    def __getitem__(self, key: str) -> Any:
        return self._all()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return repr(dict(self._all()))


class LazyImages(Mapping[str, np.ndarray]):
    """Camera or map name -> (T, H, W, C), decoded when first asked for."""

    def __init__(self, cameras: tuple[str, ...], read: Callable[[str], np.ndarray]) -> None:
        self._cameras = cameras
        self._read = read
        self._decoded: dict[str, np.ndarray] = {}

    def __getitem__(self, camera: str) -> np.ndarray:
        if camera not in self._decoded:
            self._decoded[camera] = self._read(camera)
        return self._decoded[camera]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cameras)

    def __len__(self) -> int:
        return len(self._cameras)


@dataclass(frozen=True, kw_only=True)
class EpisodeData:
    """The arrays of one episode of T steps.

    Attributes:
        info: What is known about the episode.
        images: Camera or map name -> (T, H, W, C), uint8 or the map's dtype, decoded when first asked for.
        state: (T, s), in the units of the embodiment.
        action: (T, a), in the units of the embodiment.
        timestamp: float64 (T,) [s].
        extras: Extra field -> (T, *shape).
    """

    info: EpisodeInfo
    images: Mapping[str, np.ndarray]
    state: np.ndarray
    action: np.ndarray
    timestamp: np.ndarray
    extras: dict[str, np.ndarray]

    def __len__(self) -> int:
        return self.info.length
