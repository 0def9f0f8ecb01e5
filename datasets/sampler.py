"""Shuffled batches that depend on nothing but (size, batch_size, seed, step)."""

from __future__ import annotations

import threading

import numpy as np

from ..errors import ConfigError


class ShuffledSampler:
    """Stateless shuffling: `batch(step)` is a pure function, so a run resumes from its step number alone.

    Each epoch is a fresh permutation of ``range(size)`` drawn from (seed, epoch), cut into ``size // batch_size`` full
    batches. What does not fill a batch is dropped for that epoch (a different rest each time), so that every batch has
    `batch_size` windows and none repeats inside an epoch.

    Args:
        size: Number of windows.
        batch_size: Windows a batch.
        seed: Any integer from 0.

    Raises:
        ConfigError: A batch larger than the dataset, or sizes below 1.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if batch_size < 1 or size < 1 or seed < 0:
            raise ConfigError(
                f"expected size and batch_size of at least 1 and seed from 0, got {size}, {batch_size}, {seed}"
            )
        if batch_size > size:
            raise ConfigError(
                f"batch_size {batch_size} is larger than the dataset of {size} windows: use at most {size}"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self._cache: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return self.size // self.batch_size

    def epoch(self, step: int) -> int:
        """Epoch that `step` belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> np.ndarray:
        """Return the window indices of `step`: int64 (batch_size,)."""
        if step < 0:
            raise ConfigError(f"expected a step from 0, got {step}")
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        return self._permutation(epoch)[start : start + self.batch_size].copy()

    def _permutation(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._cache:
                while len(self._cache) > 1:  # a prefetching loader works at the border of two epochs
                    self._cache.pop(next(iter(self._cache)))
                rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
                self._cache[epoch] = rng.permutation(self.size).astype(np.int64, copy=False)
            return self._cache[epoch]
