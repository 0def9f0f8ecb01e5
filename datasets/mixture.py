"""Weighted mixtures of data sets: which window is drawn when, as a pure function of one integer.

Nothing is kept between draws, so a run resumes from its step alone, and the global order is the same for any number of
processes, threads or GPUs. Each source is gone through without repetition, epoch after epoch, in an order of its own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from ..errors import ConfigError
from .batch import Batch
from .window import WindowDataset

BLOCK = 4096
"""Draws that are shared out among the sources at once; every block has each source's exact share, rounded."""
_ROUNDS = 4
_UNIT = 1 << 32


class MixtureSampler:
    """Draw number i -> (source, window).

    In every block of draws each source has its share to within two draws, so that weights hold to 0.1 % from some
    thousand draws on. Inside a source, draw number p is window ``P_e(p mod size)``, where P_e is the permutation of its
    epoch ``e = p div size``: a Feistel network on the numbers below the next power of four, walked until it falls below
    the size (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). It needs no memory.

    Args:
        sizes: Number of windows of each source.
        weights: Share of the draws of each source; only their ratios count. A source of weight 0 is never drawn.
        seed: Any integer from 0.

    Raises:
        ConfigError: No sources, sizes below 1, weights that are no shares, or a negative seed.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if not sizes or len(sizes) != len(weights) or min(sizes) < 1 or seed < 0:
            raise ConfigError(
                "expected as many weights as sources, sizes of at least 1 and a seed from 0, got "
                f"sizes={list(sizes)}, weights={list(weights)}, seed={seed}"
            )
        if not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) <= 0:
            raise ConfigError(f"expected weights from 0, one of them larger, got {list(weights)}")
        self.sizes, self.seed = tuple(int(n) for n in sizes), int(seed)
        self.shares = tuple(w / sum(weights) for w in weights)
        """What each source is drawn with."""
        self._edges = [0, *(round(_UNIT * c) for c in np.cumsum(self.shares).tolist())]
        self._edges[-1] = _UNIT
        smallest = min(share for share in self.shares if share > 0)
        self.block = max(BLOCK, 2 ** math.ceil(math.log2(4 / smallest)))
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def draws(self, first: int, count: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return (source, window), both int64 (count,), of draws first, first + 1, ...

        Raises:
            ConfigError: Negative numbers.
        """
        if first < 0 or count < 0:
            raise ConfigError(f"expected draws from 0, got first={first}, count={count}")
        blocks = range(first // self.block, -(-(first + count) // self.block))
        parts = [self._block(number) for number in blocks]
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        skip = first - blocks.start * self.block
        source, window = (np.concatenate(some)[skip : skip + count] for some in zip(*parts))
        return source, window

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if number not in self._cache:
                while len(self._cache) > 3:
                    self._cache.pop(next(iter(self._cache)))
                self._cache[number] = self._make(number)
            return self._cache[number]

    def _make(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        before, after = self._counts(number * self.block), self._counts((number + 1) * self.block)
        sources = np.repeat(np.arange(len(self.sizes)), [b - a for a, b in zip(before, after)])
        windows = np.concatenate([self._windows(s, a, b) for s, (a, b) in enumerate(zip(before, after))])
        order = _permute(np.arange(self.block), self.block, _key(self.seed, -1, number))
        return sources[order], windows[order]

    def _counts(self, draws: int) -> list[int]:
        """How many of the first `draws` belong to each source; exact in integers, so that blocks fit together."""
        cuts = [(draws * edge + _UNIT // 2) // _UNIT for edge in self._edges]
        return [b - a for a, b in pairwise(cuts)]

    def _windows(self, source: int, start: int, stop: int) -> np.ndarray:
        """Windows of draws `start` to `stop` of one source, across epochs."""
        size, parts = self.sizes[source], [np.zeros(0, np.int64)]
        while start < stop:
            epoch, place = divmod(start, size)
            count = min(stop - start, size - place)
            key = _key(self.seed, source, epoch)
            parts.append(_permute(np.arange(place, place + count), size, key))
            start += count
        return np.concatenate(parts)


def permutation(values: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Where the permutation of ``range(size)`` that the numbers `key` choose sends `values`: int64 (n,)."""
    return _permute(values, size, _key(*key))


def _key(*numbers: int) -> np.ndarray:
    """Round keys: uint64 (_ROUNDS,)."""
    sequence = np.random.SeedSequence([n % (1 << 64) for n in numbers])
    return sequence.generate_state(_ROUNDS, np.uint64)


def _permute(values: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of ``range(size)`` sends `values`: int64 (n,)."""
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    found = values.astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        x = found[outside]
        left, right = x >> half, x & mask
        for k in key:
            left, right = right, left ^ (_mix(right + k) & mask)
        x = (left << half) | right
        found[outside] = x
        outside = outside[x >= size]
    return found.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): each bit of x moves all of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class WindowMixture:
    """Batches from several window data sets: of several stores, embodiments, or tags of one store.

    Args:
        datasets: Name -> windows.
        weights: Name -> share of the draws; by default each source has as much as it has windows.
        batch_size: Windows of a global batch.
        seed: Of the order.

    Raises:
        ConfigError: Weights for other names, or a batch size below 1.
    """

    def __init__(
        self,
        datasets: Mapping[str, WindowDataset],
        weights: Mapping[str, float] | None = None,
        *,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        if weights is not None and set(weights) != set(datasets):
            raise ConfigError(f"expected a weight for each of {sorted(datasets)}, got {sorted(weights)}")
        if batch_size < 1:
            raise ConfigError(f"expected a batch_size of at least 1, got {batch_size}")
        self.datasets, self.batch_size = dict(datasets), batch_size
        sizes = [len(dataset) for dataset in datasets.values()]
        shares = sizes if weights is None else [weights[name] for name in datasets]
        self.sampler = MixtureSampler(sizes, shares, seed)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> dict[str, Batch]:
        """Return the windows of one step, by source; a source that was not drawn is left out.

        Args:
            step: Number of the step; all that a resumed run needs to know.
            rank: Number of this process.
            world_size: Number of processes; together they have the global batch, in order of rank.

        Raises:
            ConfigError: A batch that cannot be split evenly, or a rank outside.
        """
        if self.batch_size % world_size or not 0 <= rank < world_size:
            raise ConfigError(
                f"expected a rank below world_size, which divides batch_size={self.batch_size}; got rank={rank}, "
                f"world_size={world_size}"
            )
        share = self.batch_size // world_size
        sources, windows = self.sampler.draws(step * self.batch_size + rank * share, share)
        found = {}
        for number, (name, dataset) in enumerate(self.datasets.items()):
            mine = windows[sources == number]
            if len(mine):
                found[name] = dataset.batch(mine)
        return found
