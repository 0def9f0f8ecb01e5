"""Batches decoded ahead of the consumer into a ring of buffers that are used again.

Fresh memory costs a page fault every four kilobytes, which for pictures is a third of the time of decoding them, and
for their floats eight times what computing them takes. The buffers may be pinned, so that a GPU copies from them while
the next batch is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import ConfigError
from .batch import Batch
from .loader import BatchLoader
from .window import WindowDataset


class PixelScale:
    """uint8 pixels to float32, ``(x / 255 - mean) / std``, by a table: one pass, into memory that is there.

    Args:
        mean: Of all channels, or one a channel.
        std: As `mean`.

    Raises:
        ConfigError: A standard deviation that is not above 0.
    """

    def __init__(self, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0) -> None:
        means, stds = np.broadcast_arrays(np.atleast_1d(mean), np.atleast_1d(std))
        if not (stds > 0).all():
            raise ConfigError(f"expected a std above 0, got {std}")
        values = (np.arange(256)[:, None] / 255 - means) / stds
        self._table = np.ascontiguousarray(values.astype(np.float32).reshape(256, 1, -1))

    def __call__(self, images: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Scale `images` uint8 (..., H, W, C) into `out` float32 of the same shape, both contiguous; returns `out`."""
        import cv2

        channels = self._table.shape[2]
        flat = (images.size // channels, 1, channels) if channels > 1 else (images.size, 1)
        cv2.LUT(images.reshape(flat), self._table, dst=out.reshape(flat))
        return out


class BatchReader(Iterator[Batch]):
    """Iterates over batches of steps `start`, `start` + 1, ... Pictures are valid until the next batch is asked for.

    Args:
        windows: What windows are of.
        order: Step -> numbers of its windows, int64 (b,); b never changes.
        start: First step.
        steps: How many; None for no end.
        threads: Batches that are decoded at once.
        prefetch: Batches that are decoded or waiting at any time.
        scale: Give the cameras' pictures as floats; maps stay as they are.
        pin: Put the buffers into pinned memory (torch with CUDA).

    Raises:
        ConfigError: Numbers below 1.
    """

    def __init__(
        self,
        windows: WindowDataset,
        order: Callable[[int], np.ndarray],
        *,
        start: int = 0,
        steps: int | None = None,
        threads: int = 1,
        prefetch: int = 4,
        scale: PixelScale | None = None,
        pin: bool = False,
    ) -> None:
        if prefetch < 1 or threads < 1:
            raise ConfigError(f"expected threads and prefetch of at least 1, got {threads} and {prefetch}")
        self._windows, self._order = windows, order
        shapes = windows.buffers(len(order(start)))
        # the consumer holds one while the others are filled
        slots = max(prefetch, threads) + 1
        self._ring = [{n: _empty(*about, pin and scale is None) for n, about in shapes.items()} for _ in range(slots)]
        self._scale = scale
        cameras = windows.cameras if scale is not None else ()
        floats = {n: (shape, np.dtype(np.float32)) for n, (shape, _) in shapes.items() if n in cameras}
        self._floats = [{n: _empty(*about, pin) for n, about in floats.items()} for _ in range(slots)]
        self._loader = BatchLoader(self._read, start, steps, threads, prefetch)

    def _read(self, step: int) -> Batch:
        slot = step % len(self._ring)
        batch = self._windows.batch(self._order(step), out=self._ring[slot])
        if self._scale is None:
            return batch
        scaled = {name: self._scale(batch.images[name], out) for name, out in self._floats[slot].items()}
        return replace(batch, images={**batch.images, **scaled})

    def __next__(self) -> Batch:
        return next(self._loader)

    @property
    def wait_s(self) -> float:
        """Seconds the consumer waited so far, without the first batch [s]."""
        return self._loader.wait_s

    def close(self) -> None:
        """Stop reading. Safe to call twice."""
        self._loader.close()

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _empty(shape: tuple[int, ...], dtype: np.dtype, pin: bool) -> np.ndarray:
    if not pin:
        return np.empty(shape, dtype)
    import torch

    kept: Any = torch.empty(shape, dtype=getattr(torch, dtype.name), pin_memory=True)
    return np.asarray(kept.numpy())
