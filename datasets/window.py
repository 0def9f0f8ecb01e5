"""Training windows: the last t observations and the next h actions of every recorded step.

For obs_horizon = 2 and action_horizon = 4, the window of step 3 in an episode of 6 steps::

    step           0   1   2   3   4   5
    observations           o   o
    actions                    a   a   a   a (step 5 repeated, action_pad True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError, StoreError
from .batch import Batch
from .store import EpisodeStore


@dataclass(frozen=True, kw_only=True)
class WindowSpec:
    """Which steps and fields a window holds.

    Attributes:
        obs_horizon: Observation steps t, the present one last; at least 1.
        action_horizon: Action steps h, the present one first; at least 1.
        cameras: Cameras to decode, in this order; all of the embodiment when None.
        extras: Extra fields to gather at the observation steps.
    """

    obs_horizon: int = 1
    action_horizon: int = 8
    cameras: tuple[str, ...] | None = None
    extras: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.obs_horizon < 1 or self.action_horizon < 1:
            raise ConfigError(
                f"expected horizons of at least 1, got obs_horizon={self.obs_horizon}, "
                f"action_horizon={self.action_horizon}"
            )
        object.__setattr__(self, "cameras", None if self.cameras is None else tuple(self.cameras))
        object.__setattr__(self, "extras", tuple(self.extras))


class WindowDataset:
    """One window for each step of the chosen episodes. No window crosses from one episode into another.

    Before an episode's first step the first observation is repeated (`obs_pad`), after its last step the last action
    (`action_pad`).

    Args:
        store: Where the episodes are.
        spec: Which steps and fields.
        episodes: Indices of the episodes to use; all when None.
        threads: Threads that decode the images of one batch.

    Raises:
        SpecMismatchError: A camera or extra that the store does not have.
        StoreError: No steps to make windows of.
    """

    def __init__(
        self,
        store: EpisodeStore,
        spec: WindowSpec,
        episodes: Sequence[int] | np.ndarray | None = None,
        *,
        threads: int = 1,
    ) -> None:
        self.store = store
        self.spec = spec
        self.cameras = store.embodiment.camera_names if spec.cameras is None else spec.cameras
        for camera in self.cameras:
            store.schema.camera(camera)
        for name in spec.extras:
            store.schema.field(name)
        self._frames = store.episode_frames(episodes)
        if not len(self._frames):
            raise StoreError(f"store {store.path} has no steps to train on: record or convert some episodes first")
        self._threads = threads
        self._instructions = tuple(e.instruction for e in store.episodes)

    def __len__(self) -> int:
        return len(self._frames)

    def batch(self, indices: Sequence[int] | np.ndarray, images: bool = True) -> Batch:
        """Return the windows `indices` (b,); without images where a caller needs none, which is much faster.

        Raises:
            StoreError: An index outside the dataset.
        """
        chosen = np.asarray(indices, np.int64).reshape(-1)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise StoreError(f"expected window indices from 0 to {len(self) - 1}, got {chosen.min()}..{chosen.max()}")
        store, spec = self.store, self.spec
        now = self._frames[chosen]
        episode, _ = store.locate(now)
        first, last = store.offsets[episode][:, None], store.offsets[episode + 1][:, None] - 1
        obs = now[:, None] + np.arange(1 - spec.obs_horizon, 1)
        act = now[:, None] + np.arange(spec.action_horizon)
        frame = np.maximum(obs, first)
        return Batch(
            images={c: self._decode(c, frame) for c in self.cameras} if images else {},
            state=store.lowdim("state")[frame].astype(np.float32, copy=False),
            action=store.lowdim("action")[np.minimum(act, last)].astype(np.float32, copy=False),
            obs_pad=obs < first,
            action_pad=act > last,
            instruction=tuple(self._instructions[i] for i in episode.tolist()),
            frame=frame,
            episode=episode,
            extras={name: store.lowdim(name)[frame] for name in spec.extras},
        )

    def _decode(self, camera: str, frame: np.ndarray) -> np.ndarray:
        decoded = self.store.read_images(camera, frame.reshape(-1), threads=self._threads)
        return decoded.reshape(*frame.shape, *decoded.shape[1:])
