"""Demonstrations by a task's scripted expert, with noise on what is executed and clean actions as labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..datasets.schema import EXECUTED, StoreSchema
from ..sim.embodiment import SimEmbodiment
from ..spec import EmbodimentSpec
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


def demonstration_schema(embodiment: EmbodimentSpec) -> StoreSchema:
    """What a demonstration's steps hold: the embodiment's fields, and what was executed beside what was right."""
    executed = replace(embodiment.action, name=EXECUTED, low=(), high=())
    return StoreSchema(embodiment=embodiment, extras=(executed,))


class Disturbances:
    """What comes between an expert's actions of one episode and the arm; the arguments are `ExpertDemonstrations`'.

    Args:
        embodiment: Whose actions.
        rng: Of the episode.
        noise, noisy, drop, stumble: As of `ExpertDemonstrations`.
    """

    def __init__(
        self,
        embodiment: SimEmbodiment,
        rng: np.random.Generator,
        noise: float,
        noisy: float,
        drop: float,
        stumble: float,
    ) -> None:
        self.embodiment, self.rng = embodiment, rng
        self.scale = noise * embodiment.control.disturbance(embodiment.robot) * (rng.random() < noisy)
        self.drop_at = int(rng.integers(4, 20)) if rng.random() < drop else -1
        self.astray = self._astray(rng, stumble)

    def executed(self, t: int, action: np.ndarray) -> np.ndarray:
        """What is executed at step `t` instead of an action (a,): float32 (a,)."""
        executed = action + self.rng.normal(0.0, 1.0, action.shape) * self.scale
        if t in self.astray:
            executed = self._stumbled(action, self.astray[t])
        if self.drop_at <= t < self.drop_at + 2:
            executed[-1] = 1.0
        return executed.astype(np.float32)

    def _astray(self, rng: np.random.Generator, stumble: float) -> dict[int, np.ndarray]:
        """Time step -> disturbance, of each step at which the arm goes its own way."""
        found: dict[int, np.ndarray] = {}
        if rng.random() >= stumble:
            return found
        unit = self.embodiment.control.disturbance(self.embodiment.robot)
        for _ in range(int(rng.integers(1, 3))):
            begin, length = int(rng.integers(2, 30)), int(rng.integers(2, 6))
            way = np.append(rng.uniform(-1.0, 1.0, len(unit) - 1) * unit[:-1], rng.choice([-1.0, 0.0, 1.0]))
            found |= dict.fromkeys(range(begin, begin + length), way)
        return found

    def _stumbled(self, action: np.ndarray, way: np.ndarray) -> np.ndarray:
        """The action with its position part replaced (delta control) or shifted (absolute) and the gripper flipped."""
        absolute = self.embodiment.spec.action.reference == "absolute"
        moved = np.where(way != 0.0, way + (action if absolute else 0.0), action)
        moved[-1] = action[-1] if way[-1] == 0.0 else float(way[-1] > 0.0)
        return moved


class ExpertDemonstrations:
    """Runs the expert of an environment.

    On a share of the episodes the executed action is disturbed while the label stays the expert's clean action at the
    state reached (DART, Laskey et al. 2017), so that the data shows how to come back. On some, the gripper is forced
    open for a few steps: what is held falls, and is picked up again. On some, the arm stumbles: for a few steps it goes
    a straight way of its own, which brings it to where small disturbances never would. What was executed is kept beside
    the labels (`EXECUTED`).

    Args:
        env: An environment with `expert_action`.
        noise: Standard deviation of the disturbance, as a share of what the control mode's `disturbance` says.
        noisy: Share of the episodes that are disturbed.
        drop: Share of the episodes in which the gripper opens by itself once.
        stumble: Share of the episodes in which the arm goes astray once or twice.
        settle: Steps recorded after success (the policy should stay there).
    """

    def __init__(
        self,
        env: TabletopEnv,
        *,
        noise: float = 0.3,
        noisy: float = 0.8,
        drop: float = 0.1,
        stumble: float = 0.5,
        settle: int = 1,
    ) -> None:
        self.env, self.noise, self.noisy, self.drop, self.stumble = env, noise, noisy, drop, stumble
        self.settle = settle
        self.name = env.task.name
        self.schema = demonstration_schema(env.embodiment.spec)

    def record(self, seed: int) -> list[RecordedEpisode]:
        """Run one episode; the same seed gives the same episode."""
        env, rng = self.env, np.random.default_rng([seed, 0xDE40])
        observation, _ = env.reset(seed=seed)
        embodiment = env.embodiment
        disturbed = Disturbances(embodiment, rng, self.noise, self.noisy, self.drop, self.stumble)
        steps: list[Step] = []
        success, after = False, 0
        for t in range(env.task.max_steps):
            action = env.expert_action()
            images = {name: observation[name] for name in embodiment.spec.camera_names}
            executed = disturbed.executed(t, action)
            steps.append(Step(images, observation["state"], action, {EXECUTED: executed}))
            if success and (after := after + 1) >= self.settle:
                break
            observation, _, terminated, _, info = env.step(executed)
            success = success or bool(info["success"])
            if terminated and not success:
                break
        instruction = str(observation["instruction"])
        meta = {"seed": seed, "task": self.name}
        return [RecordedEpisode(instruction, (self.name, "expert"), meta, steps, success)]
