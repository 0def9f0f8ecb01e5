"""Skills as a policy carries them out, with what became of them: data that success and affordances are learned from."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .corrections import drives
from .datasets.schema import StoreSchema
from .datasets.store import EpisodeStore
from .envs.demonstrations import RecordedEpisode, Step
from .envs.record import record_from
from .envs.tabletop import TabletopEnv
from .errors import ConfigError
from .policies.base import Policy
from .policies.vla_policy import VLAPolicy
from .spec import FeatureSpec, Observation
from .vla.judge import DONE

AFTER = 3
"""Steps that a policy goes on after it has succeeded."""


class Executions:
    """Episodes of a policy in a task, each step with whether the task is done.

    Args:
        env: The task.
        policy: Executor of the policy.
        identity: Of the policy; kept with every episode.
    """

    def __init__(self, env: TabletopEnv, policy: Policy, *, identity: str = "") -> None:
        self.env, self.policy, self.identity, self.name = env, policy, identity, env.task.name
        self.schema = StoreSchema(embodiment=env.embodiment.spec, extras=(FeatureSpec(name=DONE, shape=(1,)),))

    def record(self, seed: int) -> list[RecordedEpisode]:
        """Run one episode; the same seed gives the same episode."""
        env, steps, after, done = self.env, [], 0, False
        self.policy.reset(0, seed)
        observation, _ = env.reset(seed=seed)
        spec = env.embodiment.spec
        succeeded = failed = False
        for _ in range(env.task.max_steps):
            images = {name: observation[name] for name in spec.camera_names}
            seen = Observation(images=images, state=observation["state"], instruction=str(observation["instruction"]))
            action = self.policy.act([seen], [0])[0].astype(np.float32)
            steps.append(Step(images, observation["state"], action, {DONE: np.array([done], np.float32)}))
            if after == AFTER or failed:
                break
            observation, _, _, _, info = env.step(action)
            done, failed = bool(info["success"]), bool(info["failure"])
            succeeded |= done
            after += succeeded
        meta = {"seed": seed, "task": self.name, "policy": self.identity}
        return [RecordedEpisode(str(observation["instruction"]), (self.name, "executed"), meta, steps, succeeded)]


def record_executions(
    *,
    policy: str,
    env: Callable[..., Any],
    executor: Callable[..., Policy],
    out: str,
    episodes: int,
    seed: int = 700_000,
    workers: int = 2,
    device: str = "cpu",
) -> int:
    """Record how a policy carries out a task, successes and failures, into an episode store; what is there is reused.

    Args:
        policy: Folder of the checkpoint.
        env: A factory of environments.
        executor: Turns chunks into actions.
        out: Folder of the store.
        episodes: Number of episodes.
        seed: First seed.
        workers: Processes.
        device: Where the policy runs.

    Raises:
        ConfigError: The store has executions of another policy.
    """
    identity = drives(policy, executor, 0)
    if Path(out).exists():
        others = {str(e.meta.get("policy")) for e in EpisodeStore.open(out).episodes} - {identity}
        if others:
            raise ConfigError(
                f"{out} has executions of another policy ({', '.join(sorted(others))}). Type: out=ANOTHER"
            )
    make = partial(_make, env, policy, executor, device, identity)
    return record_from(make, out=out, episodes=episodes, seed=seed, workers=workers, keep_failures=True)


def _make(
    env: Callable[..., Any], path: str, executor: Callable[..., Policy], device: str, identity: str
) -> Executions:
    """What a recording process runs."""
    if multiprocessing.parent_process() is not None:  # recording processes share the cores; the command itself does not
        import torch

        torch.set_num_threads(1)
    made = env()
    chunks = VLAPolicy.from_checkpoint(path, like=made.embodiment.spec, device=device, batch_size=1)
    return Executions(made, executor(chunks), identity=identity)
