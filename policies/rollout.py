"""Closed loop: a policy in vector environments, episode by episode, each from its own seed.

Knows only Gymnasium: any `VectorEnv` with autoreset disabled whose observations hold ``state``, ``instruction`` and one
image a camera.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from ..errors import ConfigError
from ..spec import EmbodimentSpec, Observation
from .base import Policy


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """How one episode went.

    Attributes:
        seed: Of the environment and of the policy's draws.
        instruction: What the policy was told.
        success: Whether the environment said so, by ``info["success"]`` or else by a positive reward at the end.
        failure: Why not, in the environment's words (``info["failure"]``); empty where it does not say.
        steps: Number of actions.
        actions: float32 (steps, a): with the seed, they replay the episode exactly.
        seconds: Wall time while it ran, beside others [s].
    """

    seed: int
    instruction: str
    success: bool
    failure: str
    steps: int
    actions: np.ndarray
    seconds: float


def rollout(
    env: VectorEnv, policy: Policy, seeds: Sequence[int], options: Mapping[str, Any] | None = None
) -> Iterator[EpisodeResult]:
    """Run one episode a seed and yield results as they end; none depends on the others or on the number of envs.

    Args:
        env: Vector environment with ``AutoresetMode.DISABLED``. Lanes without an episode are reset when they end and
            stepped with zeros, unless ``metadata["rests_finished"]`` says that it leaves finished ones alone.
        policy: Acts for lane k in sub-environment k.
        seeds: One an episode.
        options: Reset options of every episode.
    """
    if env.metadata.get("autoreset_mode") is not AutoresetMode.DISABLED:
        raise ConfigError("rollout needs a vector environment with autoreset_mode=AutoresetMode.DISABLED")
    waiting = list(seeds)
    lanes: dict[int, _Running] = {}
    observation: dict[str, Any] = {}
    rests = bool(env.metadata.get("rests_finished"))
    ended: np.ndarray = np.ones(env.num_envs, bool)
    while waiting or lanes:
        free = [k for k in range(env.num_envs) if k not in lanes][: len(waiting)]
        if free or (ended.any() and not rests):
            started = [waiting.pop(0) for _ in free]
            mask = np.zeros(env.num_envs, bool) if rests else ended.copy()
            mask[free] = True
            all_seeds: list[int | None] = [0 if one and not rests else None for one in ended]
            for lane, seed in zip(free, started):
                all_seeds[lane] = seed
                policy.reset(lane, seed)
            given = {**(options or {}), "reset_mask": mask}
            observation, _ = env.reset(seed=all_seeds, options=given)  # type: ignore[arg-type]
            for lane, seed in zip(free, started):
                lanes[lane] = _Running(seed, str(observation["instruction"][lane]))
        active = sorted(lanes)
        hz = policy.embodiment.control_hz
        seen = [observation_of(observation, k, policy.embodiment, len(lanes[k].actions) / hz) for k in active]
        chosen = policy.act(seen, active)
        actions = np.zeros((env.num_envs, policy.embodiment.action.dim), np.float32)
        actions[active] = chosen
        observation, rewards, terminated, truncated, info = env.step(actions)
        ended = np.asarray(terminated | truncated)
        for lane, action in zip(active, chosen):
            running = lanes[lane]
            running.actions.append(action)
            if ended[lane]:
                del lanes[lane]
                success = info["success"][lane] if "success" in info else rewards[lane] > 0
                failure = info["failure"][lane] if "failure" in info else ""
                yield running.result(success=bool(success), failure=str(failure or ""))


class _Running:
    def __init__(self, seed: int, instruction: str) -> None:
        self.seed, self.instruction = seed, instruction
        self.actions: list[np.ndarray] = []
        self.start = time.monotonic()

    def result(self, success: bool, failure: str) -> EpisodeResult:
        return EpisodeResult(
            seed=self.seed,
            instruction=self.instruction,
            success=success,
            failure=failure,
            steps=len(self.actions),
            actions=np.stack(self.actions),
            seconds=time.monotonic() - self.start,
        )


def observation_of(batch: Mapping[str, Any], lane: int, spec: EmbodimentSpec, timestamp: float = 0.0) -> Observation:
    """One lane of a vector environment's observation, `timestamp` [s] after the episode's beginning."""
    return Observation(
        images={name: np.asarray(batch[name][lane]) for name in spec.camera_names},
        state=np.asarray(batch["state"][lane], np.float32),
        instruction=str(batch["instruction"][lane]),
        timestamp=timestamp,
    )


def replay(
    make_env: Callable[[], gymnasium.Env[Any, Any]],
    seed: int,
    options: Mapping[str, Any] | None,
    actions: np.ndarray,
    most_fps: float = np.inf,
) -> tuple[list[np.ndarray], float]:
    """Frames of an episode that was run before, and how many of them are a second; the same seed and actions give the
    same states. Of environments of a higher rate than `most_fps` every so manyth is drawn, and the last."""
    env: Any = make_env()
    rate = float(env.metadata.get("render_fps") or 10.0)
    every = max(1, math.ceil(rate / most_fps))
    if isinstance(getattr(env, "images", None), bool):
        env.images = False  # what policies see costs time and is not shown
    env.reset(seed=seed, options=dict(options or {}))
    frames = [np.asarray(env.render())]
    for k, action in enumerate(actions):
        env.step(action)
        if (k + 1) % every == 0 or k + 1 == len(actions):
            frames.append(np.asarray(env.render()))
    env.close()
    return frames, rate / every
