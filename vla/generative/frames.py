"""Pairs and sequences of frames of recorded episodes: what generators and the policies under them are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from ...console import progress
from ...datasets.sampler import ShuffledSampler
from ...datasets.schema import EXECUTED
from ...datasets.store import EpisodeStore
from ...errors import ConfigError
from ..sources import open_sources

DECODED = 512
"""Frames decoded at once."""


def shrink(images: UInt8[Tensor, "*b height width 3"], size: int) -> UInt8[Tensor, "*b size size 3"]:
    """Images of another size, each new pixel the mean of the area it covers (bilinear where images grow)."""
    if images.shape[-3] == images.shape[-2] == size:
        return images
    flat = images.flatten(0, -4).permute(0, 3, 1, 2).float()
    if min(flat.shape[2:]) >= size:
        flat = F.adaptive_avg_pool2d(flat, size)
    else:
        flat = F.interpolate(flat, size=(size, size), mode="bilinear", align_corners=False)
    small = flat.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return small.reshape(*images.shape[:-3], size, size, 3)


def to_unit(images: UInt8[Tensor, "*b height width 3"]) -> Float[Tensor, "*b 3 height width"]:
    """Pixels from -1 to 1, channels first."""
    return images.movedim(-1, -3).float() / 127.5 - 1.0


def to_pixels(images: Float[Tensor, "*b 3 height width"]) -> UInt8[Tensor, "*b height width 3"]:
    """The inverse of `to_unit`; what lies outside -1 to 1 is cut off."""
    return ((images.movedim(-3, -1) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class FrameData:
    """All frames of a store, small, with what goes with them.

    Attributes:
        store: Where they come from; full-size images are decoded from it when they are needed.
        small: uint8 (N, n, size, size, 3), of the n cameras whose future is generated.
        state: float32 (N, s).
        action: float32 (N, a), what was right.
        executed: float32 (N, a), what was done: demonstrations may be disturbed on purpose.
        owner: Episode of each frame, int64 (N,).
        last: Last frame of its episode, int64 (N,).
        training, testing: Frames to train on, and those of episodes that are kept back.
    """

    store: EpisodeStore
    small: Tensor
    state: Tensor
    action: Tensor
    executed: Tensor
    owner: np.ndarray
    last: np.ndarray
    training: np.ndarray
    testing: np.ndarray

    @classmethod
    def open(cls, path: str, size: int, heldout: float, cameras: Sequence[str] | None = None) -> FrameData:
        """Read a store's frames at `size` pixels; all of them are kept in memory (7 kB each at 48 pixels).

        Args:
            path: Episode store.
            size: Side of the small images.
            heldout: Share of episodes kept back.
            cameras: Cameras of the small images; all when None.

        Raises:
            ConfigError: A size below 8 pixels.
            SpecMismatchError: A camera that the store does not have.
            NotFoundError, StoreError: No store there, or one without a usable episode.
        """
        if size < 8:
            raise ConfigError(f"expected size of at least 8 pixels, got {size}")
        source = open_sources(path, heldout)[0]
        store = source.store
        count = store.total_frames
        cameras = store.embodiment.camera_names if cameras is None else tuple(cameras)
        for camera in cameras:
            store.embodiment.camera(camera)
        small = torch.empty(count, len(cameras), size, size, 3, dtype=torch.uint8)
        with progress("reading frames", total=count, unit="frames") as bar:
            for start in range(0, count, DECODED):
                rows = np.arange(start, min(start + DECODED, count))
                for k, camera in enumerate(cameras):
                    small[start : start + len(rows), k] = shrink(
                        torch.from_numpy(store.read_images(camera, rows)), size
                    )
                bar.update(len(rows))
        owner = np.repeat(np.arange(store.num_episodes), np.diff(store.offsets))
        action = torch.from_numpy(store.lowdim("action").astype(np.float32))
        executed = action
        if EXECUTED in store.schema.fields:
            told = torch.from_numpy(store.lowdim(EXECUTED).astype(np.float32))
            executed = torch.where(told.isfinite(), told, action)  # a merged store may lack it in some episodes
        return cls(
            store=store,
            small=small,
            state=torch.from_numpy(store.lowdim("state").astype(np.float32)),
            action=action,
            executed=executed,
            owner=owner,
            last=np.asarray(store.offsets[1:])[owner] - 1,
            training=store.episode_frames(list(source.training)),
            testing=store.episode_frames(list(source.testing)) if source.testing else np.zeros(0, np.int64),
        )

    def sampler(self, batch_size: int, seed: int) -> ShuffledSampler:
        """Shuffled positions in `training`."""
        return ShuffledSampler(len(self.training), min(batch_size, len(self.training)), seed)

    def ahead(self, now: np.ndarray, steps: np.ndarray | int) -> np.ndarray:
        """Frames `steps` later; at its end an episode's last frame repeats, which teaches to stay there."""
        return np.minimum(now + steps, self.last[now])

    def chunk(self, now: np.ndarray, horizon: int, done: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Actions (b, h, a) from frames on, and False (b, h) where an episode is over.

        The first `done` (b,) rows say what was executed, the others what was right.
        """
        steps = now[:, None] + np.arange(horizon)
        inside = torch.from_numpy(np.minimum(steps, self.last[now][:, None]))
        chunk = self.action[inside]
        if done is not None:
            rows = torch.from_numpy(np.arange(horizon) < done[:, None])
            chunk = torch.where(rows[:, :, None], self.executed[inside], chunk)
        return chunk, torch.from_numpy(steps) == inside

    def images(self, now: np.ndarray) -> Tensor:
        """Full-size images uint8 (b, n, height, width, 3)."""
        cameras = self.store.embodiment.camera_names
        return torch.stack([torch.from_numpy(self.store.read_images(name, now)) for name in cameras], dim=1)

    def instructions(self, now: np.ndarray) -> list[str]:
        """What each frame's episode was told."""
        texts = self.store.instructions
        return [texts[k] for k in self.owner[now].tolist()]
