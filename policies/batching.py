"""Requests of several clients answered together: whatever waits while the model runs is its next batch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread

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


Batch = list[tuple[Job, "asyncio.Future[Answer]"]]
QUICK_S = 0.0005
"""A model that took less than this the last time runs in the event loop: the hand-overs to a thread take about as long,
and what waits for others to share a batch would wait longer than the others' turns take."""


class Batcher:
    """Runs a model on batches of what waits: in one thread of its own, or where it is quick in the event loop.

    No request waits for others to come: a lone client has the latency of the model. `most` limits a batch, `queue` how
    many may wait; who comes later is told to come again, at once. Between loop and thread there is one hand-over each
    way and nothing else; a model that took less than `QUICK_S` does without, and goes back to the thread after the
    first time that it takes longer.

    Args:
        run: Jobs to chunks (n, h, a); called by one thread at a time, the loop's or the batcher's.
        most: Jobs in a batch.
        queue: Jobs that may wait.
    """

    def __init__(self, run: Run, *, most: int = 16, queue: int = 64) -> None:
        self._run, self._most, self._limit = run, most, queue
        self._waiting: deque[tuple[Job, asyncio.Future[Answer]]] = deque()
        self._alone: deque[Batch] = deque()
        self._inbox: SimpleQueue[Batch | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._busy = self._closed = self._quick = False

    @property
    def depth(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    async def ask(self, job: Job) -> Answer:
        """The answer to a job.

        Raises:
            ServerError: Too many wait already, or the server is closing.
        """
        if self._closed:
            raise ServerError("the server is closing")
        if self.depth >= self._limit:
            raise ServerError(f"busy: {self.depth} requests wait already; ask again later")
        if self._quick and not self._busy and self._loop is not None:
            return self._at_once(job)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, future))
        self._start()
        return await future

    async def work(self) -> None:
        """Answer jobs until cancelled."""
        self._loop = asyncio.get_running_loop()
        Thread(target=self._serve, args=(self._loop,), name="policy", daemon=True).start()
        self._start()
        try:
            await self._loop.create_future()
        finally:
            self._loop, self._closed = None, True
            self._inbox.put(None)
            left = [*self._waiting, *(one for batch in self._alone for one in batch)]
            for _, future in left:
                if not future.done():
                    future.set_exception(ServerError("the server is closing"))

    # -- in the event loop ---------------------------------------------------------------------------------------------

    def _at_once(self, job: Job) -> Answer:
        found, spent = self._answer([job])
        self._quick = spent < QUICK_S
        if isinstance(found, Exception):
            raise found
        return Answer(actions=found[0], seconds=spent, shared=1)

    def _start(self) -> None:
        """Hand a batch to the thread, unless it has one."""
        if self._busy or self._loop is None:
            return
        batch: Batch = []
        while not batch and (self._alone or self._waiting):
            if self._alone:
                taken: Batch = self._alone.popleft()
            else:
                taken = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            batch = [(job, future) for job, future in taken if not future.done()]  # the others' clients have gone
        if batch:
            self._busy = True
            self._inbox.put(batch)

    def _finish(self, batch: Batch, found: np.ndarray | Exception, spent: float) -> None:
        """Tell who asked; where a batch failed, each job runs by itself: one client's mistake is nobody else's."""
        self._busy, self._quick = False, spent < QUICK_S
        if isinstance(found, Exception) and len(batch) > 1 and not self._closed:
            self._alone.extend([one] for one in batch)
        else:
            for k, (_, future) in enumerate(batch):
                if future.done():
                    continue
                if isinstance(found, Exception):
                    future.set_exception(found)
                else:
                    future.set_result(Answer(actions=found[k], seconds=spent, shared=len(batch)))
        self._start()

    # -- in the thread, or in the loop ---------------------------------------------------------------------------------

    def _answer(self, jobs: Sequence[Job]) -> tuple[np.ndarray | Exception, float]:
        """What the model made of a batch, and the time it took [s]."""
        begin = time.monotonic()
        found: np.ndarray | Exception
        try:
            found = self._run(jobs)
        except Exception as error:
            found = error
        except BaseException as error:  # of a native package that panics: this server must go on
            found = RuntimeError(f"{type(error).__name__}: {error}")
        return found, time.monotonic() - begin

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        while (batch := self._inbox.get()) is not None:
            found, spent = self._answer([job for job, _ in batch])
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._finish, batch, found, spent)
            del batch, found  # what was seen is not kept until the next request comes
