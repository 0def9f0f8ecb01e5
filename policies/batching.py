"""Requests of several clients answered together: whatever waits while the model runs is its next batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..errors import ServerError
from ..spec import Guidance, Observation


@dataclass(frozen=True, kw_only=True)
class Job:
    """One observation to be answered.

    Attributes:
        observation: What was seen.
        noise: Draws (h, n) that the chunk is made from.
        guidance: Plan to agree with.
        lane: Number of the client.
        seed: The client begins an episode.
    """

    observation: Observation
    noise: np.ndarray
    guidance: Guidance | None = None
    lane: int = 0
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A chunk, float32 (h, a), the time the model took for its batch [s], and how many shared it."""

    actions: np.ndarray
    seconds: float
    shared: int


Run = Callable[[Sequence[Job]], np.ndarray]


class Batcher:
    """Runs a model in one thread of its own on batches of what waits.

    No request waits for others to come: a lone client has the latency of the model. `most` limits a batch, `queue` how
    many may wait; who comes later is told to come again, at once.

    Args:
        run: Jobs to chunks (n, h, a); called in the batcher's thread.
        most: Jobs in a batch.
        queue: Jobs that may wait.
    """

    def __init__(self, run: Run, *, most: int = 16, queue: int = 64) -> None:
        self._run, self._most = run, most
        self._waiting: asyncio.Queue[tuple[Job, asyncio.Future[Answer]]] = asyncio.Queue(queue)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    @property
    def depth(self) -> int:
        """Jobs that wait."""
        return self._waiting.qsize()

    async def ask(self, job: Job) -> Answer:
        """The answer to a job.

        Raises:
            ServerError: Too many wait already.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((job, future))
        except asyncio.QueueFull:
            raise ServerError(f"busy: {self.depth} requests wait already; ask again later") from None
        return await future

    async def work(self) -> None:
        """Answer jobs until cancelled."""
        try:
            while True:
                batch = [await self._waiting.get()]
                while len(batch) < self._most and not self._waiting.empty():
                    batch.append(self._waiting.get_nowait())
                await self._answer([(job, future) for job, future in batch if not future.done()])
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _answer(self, batch: list[tuple[Job, asyncio.Future[Answer]]]) -> None:
        """Run a batch; where it fails, each job by itself, so that one client's mistake is nobody else's."""
        if not batch:  # all their clients have gone
            return
        loop, begin = asyncio.get_running_loop(), time.monotonic()
        try:
            chunks = await loop.run_in_executor(self._thread, self._run, [job for job, _ in batch])
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    await self._answer([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        spent = time.monotonic() - begin
        for (_, future), actions in zip(batch, chunks):
            if not future.done():
                future.set_result(Answer(actions=actions, seconds=spent, shared=len(batch)))
