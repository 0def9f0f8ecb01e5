"""Training windows: the last t observations and the next h actions of every recorded step.

For obs_horizon = 2 and action_horizon = 4, the window of step 3 in an episode of 6 steps::

    step           0   1   2   3   4   5
    observations           o   o
    actions                    a   a   a   a (step 5 repeated, action_pad True)
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import ConfigError, SpecMismatchError, StoreError, did_you_mean
from .batch import Batch
from .schema import PRESENT
from .store import EpisodeStore


@dataclass(frozen=True, kw_only=True)
class WindowSpec:
    """Which steps and fields a window holds.

    Attributes:
        obs_horizon: Observation steps t, the present one last; at least 1.
        action_horizon: Action steps h, the present one first; at least 1.
        cameras: Cameras to decode, in this order; all of the embodiment when None.
        extras: Extra fields to gather at the observation steps.
        maps: Maps to decode at the observation steps.
        offsets: Field -> steps relative to the present one, in place of its horizon: ``{"wrist": (0,), "state": (-8,
            -4, 0), "action": range(-1, 15)}``.
        hold: Where a step lacks an optional field, take the last value before it in the episode (a slow camera shows
            its last picture). The window's `present` is False only where there was none yet.
    """

    obs_horizon: int = 1
    action_horizon: int = 8
    cameras: tuple[str, ...] | None = None
    extras: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    offsets: Mapping[str, Sequence[int]] = field(default_factory=dict)
    hold: bool = False

    def __post_init__(self) -> None:
        if self.obs_horizon < 1 or self.action_horizon < 1:
            raise ConfigError(
                f"expected horizons of at least 1, got obs_horizon={self.obs_horizon}, "
                f"action_horizon={self.action_horizon}"
            )
        object.__setattr__(self, "cameras", None if self.cameras is None else tuple(self.cameras))
        for key in ("extras", "maps"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        offsets = {name: tuple(int(step) for step in steps) for name, steps in self.offsets.items()}
        for name, steps in offsets.items():
            if not steps:
                raise ConfigError(f"offsets of {name!r}: expected at least one step, such as (0,)")
        object.__setattr__(self, "offsets", offsets)


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
        SpecMismatchError: A camera, map or extra that the store does not have.
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
        for name in spec.maps:
            store.schema.image(name)
        for name in spec.extras:
            store.schema.field(name)
        used = (*self.cameras, *spec.maps, *spec.extras, "state", "action")
        for name in spec.offsets:
            if name not in used:
                raise SpecMismatchError(f"offsets of {name!r}, which no window holds. {did_you_mean(name, used)}")
        self.optional = {name: k for k, name in enumerate(store.schema.optional) if name in used}
        self._last_present: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        self._episodes = range(store.num_episodes) if episodes is None else [int(i) for i in episodes]
        self._frames = store.episode_frames(episodes)
        if not len(self._frames):
            raise StoreError(f"store {store.path} has no steps to train on: record or convert some episodes first")
        self._threads = threads
        self._instructions = store.instructions

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def first_frames(self) -> np.ndarray:
        """First global frame of each episode in use, in order: int64 (episodes,)."""
        return np.asarray(self.store.offsets[:-1][np.asarray(self._episodes, np.int64)])

    @property
    def lengths(self) -> list[int]:
        """Steps of each episode in use, in order."""
        return [int(self.store.offsets[i + 1] - self.store.offsets[i]) for i in self._episodes]

    def frames(self, indices: Sequence[int] | np.ndarray) -> tuple[dict[str, np.ndarray], Places]:
        """Return the global frames of every camera and map in windows `indices`, int64 (b, t), and where they gap."""
        places = self._places(indices)
        return {name: places.of(name, self._past) for name in (*self.cameras, *self.spec.maps)}, places

    @property
    def _past(self) -> np.ndarray:
        return np.arange(1 - self.spec.obs_horizon, 1)

    def _places(self, indices: Sequence[int] | np.ndarray) -> Places:
        chosen = np.asarray(indices, np.int64).reshape(-1)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise StoreError(f"expected window indices from 0 to {len(self) - 1}, got {chosen.min()}..{chosen.max()}")
        return Places(self, self._frames[chosen])

    def batch(
        self,
        indices: Sequence[int] | np.ndarray,
        images: bool = True,
        out: Mapping[str, np.ndarray] | None = None,
    ) -> Batch:
        """Return the windows `indices` (b,); without images where a caller needs none, which is much faster.

        Args:
            indices: Windows, in any order.
            images: Whether to decode pictures.
            out: Camera or map -> (b, t, H, W, C) to decode into; memory that is used again saves a third of the time.

        Raises:
            StoreError: An index outside the dataset.
            SpecMismatchError: An array in `out` that does not fit.
        """
        store, spec, places = self.store, self.spec, self._places(indices)
        past, ahead = self._past, np.arange(spec.action_horizon)
        now, episode, first, last = places.now, places.episode, places.first, places.last
        steps, pads, present = places.of, places.pads, places.present
        state, action = steps("state", past), steps("action", ahead)
        shown = (*self.cameras, *spec.maps) if images else ()
        frame = now[:, None] + past
        return Batch(
            images={name: self._decode(name, steps(name, past), None if out is None else out[name]) for name in shown},
            state=store.gather("state", state).astype(np.float32, copy=False),
            action=store.gather("action", action).astype(np.float32, copy=False),
            obs_pad=pads.get("state", frame < first),
            action_pad=pads.get("action", now[:, None] + ahead > last),
            instruction=tuple(self._instructions[i] for i in episode.tolist()),
            frame=np.maximum(frame, first),
            episode=episode,
            extras={name: store.gather(name, steps(name, past)) for name in spec.extras},
            pads=pads,
            present=present,
        )

    def there(self, name: str, frame: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return frames to read an optional field from, and whether it is there; by `hold` from steps before."""
        if not self.spec.hold:
            return frame, self.store.gather(PRESENT, frame)[..., self.optional[name]]
        with self._lock:
            if name not in self._last_present:
                there = self.store.lowdim(PRESENT)[:, self.optional[name]]
                numbers = np.where(there, np.arange(len(there), dtype=np.int64), -1)
                self._last_present[name] = np.maximum.accumulate(numbers)
        found = self._last_present[name][frame]
        return np.where(found >= first, found, frame), found >= first

    def _decode(self, name: str, frame: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        flat = None if out is None else out.reshape(-1, *out.shape[2:])
        decoded = self.store.read_images(name, frame.reshape(-1), out=flat, threads=self._threads)
        return decoded.reshape(*frame.shape, *decoded.shape[1:])

    def buffers(self, batch_size: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return camera or map -> (shape (b, t, H, W, C), dtype) of a batch, for arrays to decode into."""
        found = {}
        for name in (*self.cameras, *self.spec.maps):
            spec = self.store.schema.image(name)
            steps = len(self.spec.offsets.get(name, range(self.spec.obs_horizon)))
            found[name] = (batch_size, steps, *spec.shape), np.dtype(spec.dtype)
        return found


class Places:
    """Which frames the fields of some windows take.

    Attributes:
        now: Present frame of each window, int64 (b,).
        episode: Its episode, int64 (b,).
        first: First frame of the episode, int64 (b, 1).
        last: Its last frame, int64 (b, 1).
        pads: Field with offsets of its own -> bool (b, t): stands in for one outside the episode.
        present: Optional field -> bool (b, t).
    """

    def __init__(self, windows: WindowDataset, now: np.ndarray) -> None:
        self._windows, self.now = windows, now
        store = windows.store
        self.episode, _ = store.locate(now)
        self.first, self.last = store.offsets[self.episode][:, None], store.offsets[self.episode + 1][:, None] - 1
        self.pads: dict[str, np.ndarray] = {}
        self.present: dict[str, np.ndarray] = {}

    def of(self, name: str, default: np.ndarray) -> np.ndarray:
        """Frames (b, t) of field `name`; notes where they stand in for others, and which are there."""
        windows = self._windows
        frame = self.now[:, None] + np.array(windows.spec.offsets.get(name, default), np.int64)
        inside = np.clip(frame, self.first, self.last)
        if name in windows.spec.offsets:
            self.pads[name] = frame != inside
        if name in windows.optional:
            inside, self.present[name] = windows.there(name, inside, self.first)
        return inside
