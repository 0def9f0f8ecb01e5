"""Batches decoded ahead of the consumer into a ring of buffers that are used again.

Fresh memory costs a page fault every four kilobytes, which for pictures is a third of the time of decoding them. The
buffers may be pinned, so that a GPU copies from them while the next batch is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import ConfigError
from .batch import Batch
from .loader import BatchLoader
from .window import WindowDataset


class BatchReader(Iterator[Batch]):
    """Iterates over batches of steps `start`, `start` + 1, ... Pictures are valid until the next batch is asked for.

    Args:
        windows: What windows are of.
        order: Step -> numbers of its windows, int64 (b,); b never changes.
        start: First step.
        steps: How many; None for no end.
        threads: Batches that are decoded at once.
        prefetch: Batches that are decoded or waiting at any time.
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
        pin: bool = False,
    ) -> None:
        if prefetch < 1 or threads < 1:
            raise ConfigError(f"expected threads and prefetch of at least 1, got {threads} and {prefetch}")
        self._windows, self._order = windows, order
        shapes = windows.buffers(len(order(start)))
        # the consumer holds one while the others are filled
        slots = max(prefetch, threads) + 1
        self._ring = [{name: _empty(*about, pin) for name, about in shapes.items()} for _ in range(slots)]
        self._loader = BatchLoader(self._read, start, steps, threads, prefetch)

    def _read(self, step: int) -> Batch:
        return self._windows.batch(self._order(step), out=self._ring[step % len(self._ring)])

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
