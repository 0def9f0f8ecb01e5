"""Computes batches ahead of the consumer in threads; decoding releases the GIL, so processes would only add copies."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from ..errors import ConfigError


class BatchLoader[T](Iterator[T]):
    """Iterates over ``fn(start_step), fn(start_step + 1), ...`` in order, up to `prefetch` of them computed ahead.

    Args:
        fn: Step number -> batch. Called from several threads at once when `threads` is more than 1.
        start_step: First step.
        num_steps: How many; None for no end.
        threads: Threads that call `fn`.
        prefetch: Results that are computed or waiting at any time.

    An error in `fn` is raised where its result would have come, and closes the loader. Leaving a ``with`` block, an
    error or Ctrl-C closes it too: what has not begun is cancelled.
    """

    def __init__(
        self,
        fn: Callable[[int], T],
        start_step: int,
        num_steps: int | None,
        threads: int = 1,
        prefetch: int = 4,
    ) -> None:
        if threads < 1 or prefetch < 1 or start_step < 0 or (num_steps is not None and num_steps < 0):
            raise ConfigError(
                "expected threads and prefetch of at least 1 and steps from 0, got "
                f"threads={threads}, prefetch={prefetch}, start_step={start_step}, num_steps={num_steps}"
            )
        self._fn = fn
        self._next = start_step
        self._stop = None if num_steps is None else start_step + num_steps
        self._prefetch = max(prefetch, threads)
        self._futures: deque[Future[T]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._closed = False
        self._served = 0
        self.wait_s = 0.0
        """Seconds the consumer waited so far, without the first batch [s]."""
        self._fill()

    def _fill(self) -> None:
        while len(self._futures) < self._prefetch and (self._stop is None or self._next < self._stop):
            self._futures.append(self._pool.submit(self._fn, self._next))
            self._next += 1

    def __iter__(self) -> BatchLoader[T]:
        return self

    def __next__(self) -> T:
        if self._closed or not self._futures:
            self.close()
            raise StopIteration
        begin = time.perf_counter()
        try:
            result = self._futures.popleft().result()
            self._fill()
        except BaseException:  # Ctrl-C too: no thread may go on behind the consumer's back
            self.close()
            raise
        if self._served:
            self.wait_s += time.perf_counter() - begin
        self._served += 1
        return result

    def close(self) -> None:
        """Cancel what has not begun and wait for what has. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._futures.clear()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> BatchLoader[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
