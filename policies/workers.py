"""Where episodes are run: in this process, in several of this machine, or on a Ray cluster.

Episodes are handed out in jobs of a few. Each is run from its own seed and depends on nothing else, so that where it is
run has no say in how it goes; a job whose worker dies is run again by another.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Protocol

from gymnasium.vector import VectorEnv

from ..console import log
from ..errors import BrachiumError, ConfigError
from ..spec import EmbodimentSpec
from .base import Policy
from .rollout import EpisodeResult, rollout

DEATHS = 3
"""Workers in a row that may die without an episode getting done, before it is the episode's fault."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Some episodes of a task.

    Attributes:
        task: Name.
        split: Kind of instruction.
        seeds: One an episode.
        options: Reset options of the environment.
    """

    task: str
    split: str
    seeds: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a worker needs to run episodes; it can be sent to another process.

    Attributes:
        policy: Makes the policy for an embodiment.
        envs: Task -> makes an environment.
        vector: Makes a vector environment from such.
        num_envs: Environments at once.
        threads: Of torch; the last digits of a sum depend on it.
        key: Tells this setting from others.
    """

    policy: Callable[[EmbodimentSpec], Policy]
    envs: Mapping[str, Callable[..., Any]]
    vector: Callable[..., VectorEnv]
    num_envs: int
    threads: int
    key: str


class Workers(Protocol):
    """Runs jobs."""

    def run(self, setting: Setting, jobs: Sequence[Job]) -> Iterator[tuple[Job, EpisodeResult]]:
        """Episodes as they end, with the job that each is of."""


class _Worker:
    """Runs jobs in one process; keeps the policy, and the environments of the last task."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._policy: Policy | None = None
        self._envs: VectorEnv | None = None
        self._task, self._count = "", 0

    def episodes(self, job: Job) -> Iterator[EpisodeResult]:
        """The episodes of a job as they end."""
        setting, count = self.setting, min(self.setting.num_envs, len(job.seeds))
        if self._envs is None or self._task != job.task or self._count < count:
            self.close()
            self._envs = setting.vector([setting.envs[job.task]] * count)
            self._task, self._count = job.task, count
        if self._policy is None:
            made = setting.envs[job.task]()
            try:
                self._policy = setting.policy(made.spec_embodiment)
            finally:
                made.close()
        yield from rollout(self._envs, self._policy, job.seeds, job.options)

    def close(self) -> None:
        """Close the environments."""
        if self._envs is not None:
            self._envs.close()
            self._envs = None


class LocalWorkers:
    """Episodes in this process."""

    def run(self, setting: Setting, jobs: Sequence[Job]) -> Iterator[tuple[Job, EpisodeResult]]:
        """See `Workers`."""
        worker = _Worker(setting)
        try:
            for job in jobs:
                for result in worker.episodes(job):
                    yield job, result
        finally:
            worker.close()


class ProcessWorkers:
    """Episodes in several processes of this machine; one that dies is replaced.

    Args:
        workers: Processes.
    """

    def __init__(self, *, workers: int = 2) -> None:
        if workers < 1:
            raise ConfigError(f"rollout.workers: expected at least 1, got {workers}")
        self.workers = workers

    def run(self, setting: Setting, jobs: Sequence[Job]) -> Iterator[tuple[Job, EpisodeResult]]:
        """See `Workers`."""
        waiting, deaths = list(jobs), 0
        while waiting:
            context = multiprocessing.get_context("spawn")  # a fork with an open OpenGL context hangs
            count = min(self.workers, len(waiting))
            pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(setting,))
            try:
                asked = {pool.submit(_work, job): job for job in waiting}
                for job, results in _done(asked):
                    waiting.remove(job)
                    deaths = 0
                    for result in results:
                        yield job, result
            except BrokenProcessPool as error:
                deaths += 1
                if deaths >= DEATHS:
                    raise BrachiumError(
                        f"{DEATHS} worker processes died one after the other without an episode getting done. Type "
                        "rollout=local to see why, or give them more memory with rollout.workers=1"
                    ) from error
                log(f"a worker process died; the {sum(len(j.seeds) for j in waiting)} episodes left are run by others")
            finally:
                for process in list((pool._processes or {}).values()):
                    process.terminate()  # after Ctrl-C; those that are done have nothing left to do
                pool.shutdown(wait=True, cancel_futures=True)


class RayWorkers:
    """Work on a Ray cluster, or on a Ray of this machine; Ray does a piece again whose worker died.

    Args:
        address: Of the cluster; null for the one that ``RAY_ADDRESS`` names, or one of this machine.
        cpus: Cores a worker takes.
        gpus: GPUs a worker takes, such as 0.25.
    """

    def __init__(self, *, address: str | None = None, cpus: float = 1.0, gpus: float = 0.0) -> None:
        self.address, self.cpus, self.gpus = address, cpus, gpus

    def run(self, setting: Setting, jobs: Sequence[Job]) -> Iterator[tuple[Job, EpisodeResult]]:
        """See `Workers`."""
        for job, results in self.map(_work_with, setting, jobs):
            for result in results:
                yield job, result

    def map[Shared, Piece, Found](
        self, function: Callable[[Shared, Piece], Found], shared: Shared, pieces: Sequence[Piece]
    ) -> Iterator[tuple[Piece, Found]]:
        """``function(shared, piece)`` of every piece, as they get done; what it is given and gives can be pickled."""
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                "rollout=ray needs Ray. Type: pip install 'brachium[ray]'   (or rollout=processes)"
            ) from error
        if not ray.is_initialized():
            ray.init(address=self.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        remote: Any = ray.remote(function)
        remote = remote.options(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=DEATHS)
        put = ray.put(shared)
        asked = {remote.remote(put, piece): piece for piece in pieces}
        try:
            while asked:
                ready, _ = ray.wait(list(asked), num_returns=1)
                yield asked.pop(ready[0]), ray.get(ready[0])
        finally:
            for reference in asked:
                ray.cancel(reference, force=True)


def _done(asked: Mapping[Future[list[EpisodeResult]], Job]) -> Iterator[tuple[Job, list[EpisodeResult]]]:
    """Jobs in the order in which they get done."""
    left = set(asked)
    while left:
        done, left = wait(left, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda one: one.exception() is not None):  # first what is there
            yield asked[future], future.result()


# -- in a worker -------------------------------------------------------------------------------------------------------

_here: dict[str, _Worker] = {}


def _begin(setting: Setting) -> None:
    import torch

    torch.set_num_threads(setting.threads)
    _here["worker"] = _Worker(setting)


def _work(job: Job) -> list[EpisodeResult]:
    return list(_here["worker"].episodes(job))


def _work_with(setting: Setting, job: Job) -> list[EpisodeResult]:
    """In a worker of Ray, which may have run episodes of this setting before, or of another."""
    if "worker" not in _here or _here["worker"].setting.key != setting.key:
        _begin(setting)
    return _work(job)
