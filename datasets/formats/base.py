"""What an importer of a foreign format yields; `brachium.datasets.convert` writes it into a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...spec import EmbodimentSpec


@dataclass(frozen=True, kw_only=True)
class ImportedStep:
    """One step of a foreign episode.

    Attributes:
        images: Camera name -> JPEG stream, which is stored byte for byte, or uint8 (H, W, 3), which is encoded.
        state: float32 (s,), in the units of the embodiment.
        action: float32 (a,), in the units of the embodiment.
        timestamp: Time since the episode began [s]; None for the step number over `control_hz`.
    """

    images: Mapping[str, bytes | np.ndarray]
    state: np.ndarray
    action: np.ndarray
    timestamp: float | None = None


@dataclass(frozen=True, kw_only=True)
class ImportedEpisode:
    """One foreign episode.

    Attributes:
        instruction: What was to be done.
        steps: Its steps, gone through once; they may be read as they are asked for.
        success: Whether it was done; None when the data does not say.
        tags: Labels to select by.
        meta: Anything else worth keeping that JSON can hold.
    """

    instruction: str
    steps: Iterable[ImportedStep]
    success: bool | None = None
    tags: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


class EpisodeImporter(Protocol):
    """Reads one foreign format. One file here and one YAML in ``conf/data/`` make a new one."""

    def embodiment_of(self, source: Path) -> EmbodimentSpec:
        """Return the robot whose episodes are in `source`.

        Raises:
            NotFoundError: Nothing there.
            SpecMismatchError: Nobody says what its numbers mean; the message says what to write.
        """

    def count(self, source: Path) -> int | None:
        """Return the number of episodes in `source` if that is cheap to know.

        Raises:
            NotFoundError: Nothing there.
            StoreError: Something else is there.
        """

    def read(self, source: Path, first: int = 0) -> Iterator[ImportedEpisode]:
        """Yield the episodes of `source` from number `first` on, always in the same order.

        The steps of an episode are to be taken before the next episode: a file may be open meanwhile.

        Raises:
            NotFoundError: Nothing there.
            StoreError: Damaged data.
            SpecMismatchError: Data that does not fit `embodiment`.
        """
