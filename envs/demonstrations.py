"""Demonstrations by a task's scripted expert, with noise on what is executed and clean actions as labels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..datasets.schema import StoreSchema
from .tabletop import TabletopEnv


class Step(NamedTuple):
    """One recorded step: what was seen, and what the expert would do."""

    images: dict[str, np.ndarray]
    state: np.ndarray
    action: np.ndarray
    extras: dict[str, np.ndarray]


class RecordedEpisode(NamedTuple):
    """One episode, ready for a writer."""

    instruction: str
    tags: tuple[str, ...]
    meta: dict[str, Any]
    steps: list[Step]
    success: bool | None


class ExpertDemonstrations:
    """Runs the expert of an environment.

    On a share of the episodes the executed action is disturbed while the label stays the expert's clean action at the
    state reached (DART, Laskey et al. 2017), so that the data shows how to come back. On some, the gripper is forced
    open for a few steps: what is held falls, and is picked up again.

    Args:
        env: An environment with `expert_action`.
        noise: Standard deviation of the disturbance, as a share of what the control mode's `disturbance` says.
        noisy: Share of the episodes that are disturbed.
        drop: Share of the episodes in which the gripper opens by itself once.
        settle: Steps recorded after success (the policy should stay there).
    """

    def __init__(
        self, env: TabletopEnv, *, noise: float = 0.3, noisy: float = 0.8, drop: float = 0.1, settle: int = 1
    ) -> None:
        self.env, self.noise, self.noisy, self.drop, self.settle = env, noise, noisy, drop, settle
        self.name = env.task.name
        self.schema = StoreSchema(embodiment=env.embodiment.spec)

    def record(self, seed: int) -> list[RecordedEpisode]:
        """Run one episode; the same seed gives the same episode."""
        env, rng = self.env, np.random.default_rng([seed, 0xDE40])
        observation, _ = env.reset(seed=seed)
        embodiment = env.embodiment
        scale = self.noise * embodiment.control.disturbance(embodiment.robot) * (rng.random() < self.noisy)
        drop_at = int(rng.integers(4, 20)) if rng.random() < self.drop else -1
        steps: list[Step] = []
        success, after = False, 0
        for t in range(env.task.max_steps):
            action = env.expert_action()
            images = {name: observation[name] for name in embodiment.spec.camera_names}
            steps.append(Step(images, observation["state"], action, {}))
            if success and (after := after + 1) >= self.settle:
                break
            executed = action + rng.normal(0.0, 1.0, action.shape) * scale
            if drop_at <= t < drop_at + 2:
                executed[-1] = 1.0
            observation, _, terminated, _, info = env.step(executed.astype(np.float32))
            success = success or bool(info["success"])
            if terminated and not success:
                break
        instruction = str(observation["instruction"])
        meta = {"seed": seed, "task": self.name}
        return [RecordedEpisode(instruction, (self.name, "expert"), meta, steps, success)]
