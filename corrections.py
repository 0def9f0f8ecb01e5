"""The verb ``brachium record policy=...``: a policy drives, and an expert says what would have been right.

Demonstrations show what the expert meets; what a policy meets by its own mistakes, and by acting on pictures that are
old by the time its actions come, they do not. Its own ways, labelled, do (DAgger, Ross, Gordon and Bagnell 2011). After
a while the expert takes over and ends the task (as people do in HG-DAgger, Kelly et al. 2019), so that every episode
that is kept is a success.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .datasets.schema import EXECUTED
from .datasets.store import EpisodeStore
from .envs.demonstrations import Demonstrator, RecordedEpisode, Step, demonstration_schema
from .envs.record import record_from
from .errors import ConfigError
from .policies.base import Policy
from .policies.vla_policy import VLAPolicy
from .spec import Observation


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """Rounds of corrections in ``brachium demo``.

    Attributes:
        rounds: How often the policy drives, is corrected, and is trained on; 0 for never.
        episodes: Episodes a task and round.
        max_delay: Longest delay between picture and action that the policy drives with [steps].
        steps: Optimiser steps of each further training.
    """

    rounds: int = 0
    episodes: int = 200
    max_delay: int = 0
    steps: int = 3000

    def __post_init__(self) -> None:
        if min(self.rounds, self.max_delay) < 0 or min(self.episodes, self.steps) < 1:
            raise ConfigError(
                "corrections: expected rounds and max_delay from 0, episodes and steps from 1, got "
                f"rounds={self.rounds}, max_delay={self.max_delay}, episodes={self.episodes}, steps={self.steps}"
            )


class CorrectedRollouts:
    """Episodes of a policy with an expert's labels.

    Args:
        env: An environment with `expert_action`.
        policies: Executors of the policy, one for each delay that it shall meet; episode by episode one is drawn.
        first, last: The expert takes over at a step between, drawn evenly.
        identity: Of the policy; kept with every episode.
    """

    def __init__(self, env: Demonstrator, policies: list[Policy], *, first: int, last: int, identity: str = "") -> None:
        self.env, self.policies, self.first, self.last, self.identity = env, policies, first, last, identity
        self.name = env.task.name
        self.schema = demonstration_schema(env.spec_embodiment)

    def record(self, seed: int) -> list[RecordedEpisode]:
        """Run one episode; the same seed gives the same episode."""
        env, rng = self.env, np.random.default_rng([seed, 0xDA66])
        which, handover = int(rng.integers(len(self.policies))), int(rng.integers(self.first, self.last + 1))
        policy = self.policies[which]
        policy.reset(0, seed)
        observation, _ = env.reset(seed=seed)
        spec, steps, success = env.spec_embodiment, [], False
        for t in range(self.last + env.task.max_steps):
            images = {name: observation[name] for name in spec.camera_names}
            label = env.expert_action()
            executed = label
            if t < handover:
                seen = Observation(
                    images=images, state=observation["state"], instruction=str(observation["instruction"])
                )
                executed = policy.act([seen], [0])[0]
            executed = executed.astype(np.float32)
            steps.append(Step(images, observation["state"], label, {EXECUTED: executed}))
            if success:  # one step more: the policy should stay there
                break
            observation, _, terminated, _, info = env.step(executed)
            success = bool(info["success"])
            if terminated and not success:
                break
        meta = {"seed": seed, "task": self.name, "expert_from": min(handover, len(steps)), "delay": which}
        meta["policy"] = self.identity
        return [RecordedEpisode(str(observation["instruction"]), (self.name, "corrected"), meta, steps, success)]


def record_corrections(
    *,
    policy: str,
    env: Callable[..., Any],
    executor: Callable[..., Policy],
    out: str = "outputs/corrections",
    episodes: int = 100,
    seed: int = 500_000,
    workers: int = 2,
    max_delay: int = 0,
    first: int = 4,
    last: int = 60,
    overwrite: bool = False,
    device: str = "cpu",
) -> int:
    """Record what an expert would do where a policy goes, into an episode store.

    The policy drives, each episode with a delay of 0 to `max_delay` steps between picture and action; the expert's
    actions are the labels, what was executed is kept beside them, and from a step drawn at random the expert ends the
    task. Then train on, with the demonstrations: ``train store=[DEMOS,CORRECTIONS] init=CHECKPOINT``. What the store
    has already of this task and these seeds is not recorded again.

    Args:
        policy: Folder of the checkpoint.
        env: A factory of environments with an expert.
        executor: Turns chunks into actions.
        out: Folder of the store.
        episodes: Number of episodes that the store shall have of these seeds.
        seed: First seed; other than those of the demonstrations and of evaluations.
        workers: Processes.
        max_delay: Longest delay [steps].
        first, last: The expert takes over at a step between these.
        overwrite: Delete an existing store first.
        device: Where the policy runs.
    """
    if max_delay < 0 or not 0 <= first <= last:
        raise ConfigError(f"expected max_delay from 0 and first <= last, got {max_delay}, {first} and {last}")
    if not (Path(policy) / "meta.json").exists():
        raise ConfigError(f"{policy} is no checkpoint: expected a folder that brachium train has made")
    _check_alone(Path(out), drives(policy, executor, max_delay), overwrite)
    make = partial(_make, env, policy, executor, max_delay, first, last, device)
    return record_from(make, out=out, episodes=episodes, seed=seed, workers=workers, overwrite=overwrite)


def _check_alone(out: Path, identity: str, overwrite: bool) -> None:
    """Raise ConfigError where a store has corrections of another policy: its seeds would count as done."""
    if overwrite or not out.exists():
        return
    others = {str(e.meta["policy"]) for e in EpisodeStore.open(out).episodes if "policy" in e.meta} - {identity}
    if others:
        raise ConfigError(
            f"{out} has corrections of another policy, executor or max_delay ({', '.join(sorted(others))}; this is "
            f"{identity}). Type: out={out}-2"
        )


def _make(
    env: Callable[..., Any],
    path: str,
    executor: Callable[..., Policy],
    max_delay: int,
    first: int,
    last: int,
    device: str,
) -> CorrectedRollouts:
    """What a recording process runs."""
    if multiprocessing.parent_process() is not None:  # recording processes share the cores; the command itself does not
        import torch

        torch.set_num_threads(1)
    made = env()
    if not hasattr(made, "expert_action"):
        raise ConfigError(f"cannot correct a policy in {type(made).__name__}: expected an environment with an expert")
    chunks = VLAPolicy.from_checkpoint(path, like=made.spec_embodiment, device=device, batch_size=1)
    policies = [executor(chunks, inference_delay=delay) for delay in range(max_delay + 1)]
    return CorrectedRollouts(made, policies, first=first, last=last, identity=drives(path, executor, max_delay))


def drives(path: str | Path, executor: Callable[..., Policy], max_delay: int) -> str:
    """12 hex digits of what decides where the policy goes: its weights, its executor, its delays."""
    digest = hashlib.sha256((Path(path) / "model.safetensors").read_bytes())
    options = getattr(executor, "keywords", {})
    made = getattr(executor, "func", executor)
    digest.update(json.dumps([getattr(made, "__qualname__", str(made)), options, max_delay], default=str).encode())
    return digest.hexdigest()[:12]
