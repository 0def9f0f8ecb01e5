"""Chunks asked for in the background, so that the control loop never waits for a model."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BrachiumError
from ..policies.base import ChunkPolicy
from ..spec import Guidance, Observation

RECENT = 10
"""Delays whose largest is what the next is taken to be (Black et al. 2025)."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What became of a request; times by `time.monotonic` [s].

    Attributes:
        captured: When what the policy saw was captured.
        asked, arrived: When it was asked, and its answer was there.
        actions: float32 (h, a); None where it failed.
        error: Why.
    """

    captured: float
    asked: float
    arrived: float
    actions: np.ndarray | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class _Job:
    observation: Observation
    noise: np.ndarray
    guidance: Guidance | None
    asked: float
    epoch: int


class Inference:
    """Asks a policy from threads of its own, at most `under_way` requests at once.

    Args:
        policy: What is asked; one with ``reconnect`` is connected anew after a failure.
        seed: Of the noise that chunks are drawn from.
        under_way: Requests at once.
        delay_s: Hold every answer back for so long, to see what it costs [s].
        expected_s: What a first answer is taken to need [s].
        temperature: Factor of the noise; see `ChunkExecutor`.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        *,
        seed: int = 0,
        under_way: int = 1,
        delay_s: float = 0.0,
        expected_s: float = 0.1,
        temperature: float = 1.0,
    ) -> None:
        self.policy, self.delay_s, self.temperature = policy, delay_s, temperature
        self._rng = np.random.default_rng([seed, 0xAC7])
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._replies: deque[Reply] = deque()
        self._free, self._most = under_way, under_way
        self._lock = threading.Lock()
        self._delays: deque[float] = deque([expected_s + delay_s], maxlen=RECENT)
        self._epoch = 0
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(under_way)]
        for thread in self._threads:
            thread.start()

    @property
    def is_free(self) -> bool:
        """Whether another request may be made."""
        return self._free > 0

    @property
    def expected_s(self) -> float:
        """How long an answer is likely to take at most [s]."""
        return max(self._delays)

    def restart(self, seed: int) -> None:
        """Begin an episode: draws from `seed`; answers to what was asked before are forgotten."""
        with self._lock:
            self._rng = np.random.default_rng([seed, 0xAC7])
            self._epoch += 1
            self._replies.clear()

    def ask(self, observation: Observation, guidance: Guidance | None = None) -> None:
        """Ask for a chunk; only while `is_free`."""
        with self._lock:
            self._free -= 1
            noise = self._rng.standard_normal((self.policy.action_horizon, self.policy.noise_dim), np.float32)
            noise *= self.temperature
            now = time.monotonic()
            self._jobs.put(_Job(observation=observation, noise=noise, guidance=guidance, asked=now, epoch=self._epoch))

    def replies(self) -> list[Reply]:
        """What has come since the last call."""
        found = []
        while self._replies:
            found.append(self._replies.popleft())
        return found

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            actions, why = None, ""
            try:
                guides = None if job.guidance is None else [job.guidance]
                chunk = self.policy.predict([job.observation], job.noise[None], guides)
                actions = np.asarray(chunk.actions[0], np.float32)
            except BrachiumError as error:
                why = str(error)
            except Exception as error:  # a policy of somebody's own may fail in any way; the robot must know
                why = f"{type(error).__name__}: {error}"
            if self.delay_s:
                self._ended.wait(max(0.0, self.delay_s))
            now = time.monotonic()
            with self._lock:
                if job.epoch == self._epoch:
                    seen = job.observation.timestamp
                    self._replies.append(Reply(captured=seen, asked=job.asked, arrived=now, actions=actions, error=why))
                    if actions is not None:
                        self._delays.append(now - job.asked)
                if not why:
                    self._free += 1
            if why:
                self._recover()
                with self._lock:
                    self._free += 1

    def _recover(self) -> None:
        """Wait a little, and connect anew where that can be done; the next request will tell."""
        self._ended.wait(0.05)
        reconnect: Any = getattr(self.policy, "reconnect", None)
        if reconnect is None or self._ended.is_set():
            return
        try:
            reconnect()
        except BrachiumError:
            self._ended.wait(0.2)
        except OSError:
            self._ended.wait(0.2)

    def close(self) -> None:
        """End the threads; a policy that hangs is left to its own."""
        self._ended.set()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(1.0)
