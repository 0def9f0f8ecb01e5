"""Decodes frames of a store, any rows in any order, straight from mapped shards and on several threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..errors import StoreError
from .image import decode_into
from .layout import SEGMENTS
from .reader import MappedFiles, checked_frame, shard_path
from .segment_index import ABSENT, SegmentIndex


class FrameReader:
    """Reads frames by row of a `SegmentIndex`. Safe to use from several threads.

    Args:
        index: Where the frames are.
        explain: Row -> whose frame it is, for messages.
    """

    def __init__(self, index: SegmentIndex, explain: Callable[[int], str]) -> None:
        self._index, self._explain = index, explain
        self._prefix = str(index.root / SEGMENTS)
        self.files = MappedFiles()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_threads, self._owner = 0, os.getpid()

    def read(self, name: str, rows: np.ndarray, out: np.ndarray, threads: int = 1) -> None:
        """Decode frames `rows` (n,) of camera or map `name` into `out` (n, H, W, C); absent ones become zeros.

        Raises:
            StoreError: A frame that is damaged; the message names its episode.
        """
        column = self._index.images(name)
        segments = np.searchsorted(self._index.starts, rows, side="right") - 1
        steps = (rows - self._index.starts[segments]).tolist()
        offsets = column.arrays["offset"][rows].tolist()
        lengths = column.arrays["length"][rows].tolist()
        layouts = column.arrays["layout"][segments].tolist()
        numbers = segments.tolist()
        absent, kinds, broken = int(ABSENT), column.kinds, column.broken
        shards: dict[tuple[int, int], np.ndarray] = {}  # a batch comes back to the same ones

        def work(part: range) -> None:
            for k in part:
                number, step, length = numbers[k], steps[k], lengths[k]
                code, frames = layouts[k]
                if number in broken:
                    raise StoreError(f"{broken[number]} ({self._explain(int(rows[k]))})")
                if length == absent:
                    out[k] = 0
                    continue
                place = number, step // frames
                try:
                    mapped = shards.get(place)
                    if mapped is None:
                        path = shard_path(self._folder(number, name), step // frames)
                        mapped = shards[place] = self.files.get(path)
                    decode_into(checked_frame(mapped, offsets[k], length), out[k], kinds[code], step)
                except StoreError as error:
                    raise StoreError(self._damaged(error, self._folder(number, name), step, int(rows[k]))) from error

        count = len(steps)
        if threads <= 1 or count < 2 * threads:
            work(range(count))
        else:
            size = -(-count // threads)
            list(self._threads(threads).map(work, [range(i, min(i + size, count)) for i in range(0, count, size)]))

    def encoded(self, name: str, row: int) -> tuple[bytes, str] | None:
        """The stored bytes of one frame and how to decode them, or None where it is absent."""
        column = self._index.images(name)
        number = int(np.searchsorted(self._index.starts, row, side="right")) - 1
        step = row - int(self._index.starts[number])
        if number in column.broken:
            raise StoreError(f"{column.broken[number]} ({self._explain(row)})")
        if column.arrays["length"][row] == ABSENT:
            return None
        code, shard = column.arrays["layout"][number].tolist()
        folder = self._folder(number, name)
        try:
            mapped = self.files.get(shard_path(folder, step // shard))
            data = checked_frame(mapped, int(column.arrays["offset"][row]), int(column.arrays["length"][row]))
        except StoreError as error:
            raise StoreError(self._damaged(error, folder, step, row)) from error
        return data.tobytes(), column.kinds[code]

    def _folder(self, segment: int, name: str) -> str:
        return f"{self._prefix}/{self._index.ids[segment]}/images/{name}"

    def _damaged(self, error: StoreError, folder: str, step: int, row: int) -> str:
        what = str(error).removeprefix("damaged store: ")
        return f"damaged store: frame {step} in {folder}: {what} ({self._explain(row)})"

    def _threads(self, threads: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._pool_threads < threads or self._owner != os.getpid():
                self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
                self._pool_threads, self._owner = threads, os.getpid()  # a forked child has the pool, not its threads
            return self._pool
