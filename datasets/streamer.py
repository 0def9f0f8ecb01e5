"""Windows from a store far away: whole blocks are fetched, and mixed in a buffer.

Single frames from an object store wait for a request each. A block of sixteen steps is one range a camera; blocks of
many episodes, in a shuffled order, fill a buffer of some thousand windows, from which batches are drawn at random.
The order is a function of the seed alone: a run that begins at batch k sees what a run from the start saw there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from types import TracebackType

import numpy as np

from ..errors import ConfigError, StoreError
from .batch import Batch
from .image import decode_into
from .mixture import permutation
from .reader import checked_frame
from .remote import RemoteStore
from .window import WindowDataset, WindowSpec

Frames = dict[str, dict[int, np.ndarray]]
"""Camera -> row -> stored bytes."""


class BlockStreamer:
    """Iterates over batches of windows, without end.

    Args:
        remote: Where the episodes are.
        spec: What a window holds.
        batch_size: Windows a batch.
        embodiment: Name of one, where the store holds several.
        episodes: Numbers of the episodes to use; all by default.
        block: Steps that are fetched together.
        buffer: Windows that are mixed.
        in_flight: Blocks that are fetched at once.
        seed: Of the order.
        first: Batch to begin with.

    Raises:
        ConfigError: Sizes below 1.
        StoreError: No steps, or data that cannot be got.
    """

    def __init__(
        self,
        remote: RemoteStore,
        spec: WindowSpec,
        *,
        batch_size: int,
        embodiment: str | None = None,
        episodes: Sequence[int] | None = None,
        block: int = 16,
        buffer: int = 4096,
        in_flight: int = 16,
        seed: int = 0,
        first: int = 0,
    ) -> None:
        if min(batch_size, block, buffer, in_flight) < 1 or first < 0 or seed < 0:
            raise ConfigError(
                "expected batch_size, block, buffer and in_flight of at least 1, and first and seed from 0, got "
                f"{batch_size}, {block}, {buffer}, {in_flight}, {first}, {seed}"
            )
        self.remote = remote
        store = remote.store if embodiment is None else remote.store.of(embodiment)
        names = (*(store.embodiment.camera_names if spec.cameras is None else spec.cameras), *spec.maps)
        remote.fetch_columns(store, store.schema.fields, names)
        self.windows = WindowDataset(store, spec, episodes)
        self.store, self.spec, self.batch_size = store, spec, batch_size
        self._names = names
        self._blocks = _cut(self.windows, block)
        self._order = _order(len(self._blocks), [stop - start for start, stop in self._blocks], buffer, seed)
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="stream")
        self._fetched: dict[int, Future[Frames]] = {}
        self._left: dict[int, int] = {}
        for _ in range(first * batch_size):  # the order alone: nothing is fetched for what was seen
            entered, (number, _place) = next(self._order)
            for visit in entered:
                self._left[visit] = self._size(visit)
            self._left[number] -= 1
        self._left = {visit: left for visit, left in self._left.items() if left}
        for visit in self._left:
            self._fetched[visit] = self._pool.submit(self._fetch, visit)

    def _size(self, visit: int) -> int:
        start, stop = self._blocks[visit % len(self._blocks)]
        return stop - start

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        drawn: list[tuple[int, int]] = []
        for _ in range(self.batch_size):
            entered, window = next(self._order)
            for visit in entered:
                self._left[visit] = self._size(visit)
                self._fetched[visit] = self._pool.submit(self._fetch, visit)
            drawn.append(window)
        indices = np.array([self._blocks[visit % len(self._blocks)][0] + place for visit, place in drawn])
        plain = self.windows.batch(indices, images=False)
        pictures, asked = self.windows.frames(indices)
        images = {name: self._decode(name, frames, [v for v, _ in drawn]) for name, frames in pictures.items()}
        for visit, _ in drawn:
            self._left[visit] -= 1
            if not self._left[visit]:
                del self._left[visit], self._fetched[visit]
        kept = {**vars(plain), "images": images, "pads": {**plain.pads, **asked.pads}}
        return Batch(**{**kept, "present": {**plain.present, **asked.present}})

    def _fetch(self, visit: int) -> Frames:
        """All frames that the windows of a block show."""
        start, stop = self._blocks[visit % len(self._blocks)]
        pictures, _ = self.windows.frames(np.arange(start, stop))
        rows = {name: np.unique(self.store.rows(frames.reshape(-1))) for name, frames in pictures.items()}
        return {name: self.remote.frames(self.store, name, some) for name, some in rows.items()}

    def _decode(self, name: str, frames: np.ndarray, visits: Sequence[int]) -> np.ndarray:
        spec = self.store.schema.image(name)
        out = np.zeros((*frames.shape, *spec.shape), spec.dtype)
        column = self.store.steps.images(name)
        for k, visit in enumerate(visits):
            fetched = self._fetched[visit].result()[name]
            for t, row in enumerate(self.store.rows(frames[k]).tolist()):
                data = fetched.get(row)
                if data is None:
                    continue
                segment = int(np.searchsorted(self.store.steps.starts, row, side="right")) - 1
                try:
                    kind = column.kinds[int(column.arrays["layout"][segment, 0])]
                    step = row - int(self.store.steps.starts[segment])
                    decode_into(checked_frame(data, 0, len(data)), out[k, t], kind, step)
                except StoreError as error:
                    raise StoreError(f"damaged store: {name}, frame {frames[k, t]}: {error}") from error
        return out

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> BlockStreamer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _cut(windows: WindowDataset, block: int) -> list[tuple[int, int]]:
    """Cut windows (from, to) into blocks of `block` or somewhat more whose steps lie side by side in one segment.

    Short episodes of one segment share a block: what counts is that its frames are one range.
    """
    store = windows.store
    firsts = store.rows(windows.first_frames)
    segments = np.searchsorted(store.steps.starts, firsts, side="right") - 1
    runs: list[list[int]] = []  # first window, number of windows
    next_row, last_segment = -1, -1
    for row, segment, length in zip(firsts.tolist(), segments.tolist(), windows.lengths):
        if row == next_row and segment == last_segment:
            runs[-1][1] += length
        else:
            runs.append([sum(runs[-1]) if runs else 0, length])
        next_row, last_segment = row + length, segment
    blocks = []
    for first, length in runs:
        edges = np.linspace(first, first + length, max(1, length // block) + 1).round().astype(int).tolist()
        blocks += list(pairwise(edges))
    return blocks


def _order(count: int, sizes: Sequence[int], buffer: int, seed: int) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Yield (visits whose windows enter the buffer, (visit, place in its block) that is drawn), without end.

    Visit v is block ``v mod count``, once an epoch; blocks enter in another order every epoch.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1])))
    held: list[tuple[int, int]] = []
    position = 0
    while True:
        entered = []
        while len(held) < buffer:
            epoch, place = divmod(position, count)
            visit = epoch * count + int(permutation(np.array([place]), count, (seed, 2, epoch))[0])
            entered.append(visit)
            held += [(visit, k) for k in range(sizes[visit % count])]
            position += 1
        chosen = int(rng.integers(len(held)))
        held[chosen], held[-1] = held[-1], held[chosen]
        yield entered, held.pop()
