"""Demonstrations by a task's scripted expert, with noise on what is executed and clean actions as labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..datasets.schema import EXECUTED, StoreSchema
from ..spec import EmbodimentSpec

NEVER = -9
"""No step, nor one after it."""


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


@dataclass(frozen=True, kw_only=True)
class Disturbable:
    """What of an action (a,) may be disturbed, and by how much.

    Attributes:
        unit: What counts as a disturbance of size 1 of each element (a,); 0 where none is wanted.
        absolute: Whether actions say where to go rather than how far.
        grippers: Elements that open and close.
        opened, closed: What those elements say to do so.
    """

    unit: np.ndarray
    absolute: bool
    grippers: tuple[int, ...] = (-1,)
    opened: float = 1.0
    closed: float = 0.0


class Disturbances:
    """What comes between an expert's actions of one episode and the arm; the arguments are `ExpertDemonstrations`'.

    Args:
        what: Of an action.
        rng: Of the episode.
        noise, noisy, drop, stumble: As of `ExpertDemonstrations`.
    """

    def __init__(
        self, what: Disturbable, rng: np.random.Generator, noise: float, noisy: float, drop: float, stumble: float
    ) -> None:
        self.what, self.rng = what, rng
        self.scale = noise * what.unit * (rng.random() < noisy)
        self.drop_at = int(rng.integers(4, 20)) if rng.random() < drop else NEVER
        self.astray = self._astray(rng, stumble)

    def executed(self, t: int, action: np.ndarray) -> np.ndarray:
        """What is executed at step `t` instead of an action (a,): float32 (a,)."""
        executed = action + self.rng.normal(0.0, 1.0, action.shape) * self.scale
        if t in self.astray:
            executed = self._stumbled(action, *self.astray[t])
        if self.drop_at <= t < self.drop_at + 2:
            executed[list(self.what.grippers)] = self.what.opened
        return executed.astype(np.float32)

    def _astray(self, rng: np.random.Generator, stumble: float) -> dict[int, tuple[np.ndarray, float]]:
        """Time step -> way and sign of the grippers, of each step at which the arm goes its own way."""
        found: dict[int, tuple[np.ndarray, float]] = {}
        if rng.random() >= stumble:
            return found
        unit, grippers = self.what.unit.astype(float), list(self.what.grippers)
        moving = np.setdiff1d(np.arange(len(unit)), np.arange(len(unit))[grippers])
        for _ in range(int(rng.integers(1, 3))):
            begin, length = int(rng.integers(2, 30)), int(rng.integers(2, 6))
            way = np.zeros(len(unit))
            way[moving] = rng.uniform(-1.0, 1.0, len(moving)) * unit[moving]
            hand = float(rng.choice([-1.0, 0.0, 1.0]))
            found |= dict.fromkeys(range(begin, begin + length), (way, hand))
        return found

    def _stumbled(self, action: np.ndarray, way: np.ndarray, hand: float) -> np.ndarray:
        """The action with what moves replaced (deltas) or shifted (absolute), and the grippers flipped."""
        moved = np.where(way != 0.0, way + (action if self.what.absolute else 0.0), action)
        if hand and self.what.grippers:
            moved[list(self.what.grippers)] = self.what.opened if hand > 0.0 else self.what.closed
        return moved


class Demonstrator(Protocol):
    """An environment whose expert can be recorded."""

    @property
    def spec_embodiment(self) -> EmbodimentSpec:
        """What its robot sees, feels and accepts."""

    @property
    def task(self) -> Any:
        """Has a `name` and `max_steps`."""

    @property
    def disturbable(self) -> Disturbable:
        """What of an action may be disturbed."""

    def expert_action(self) -> np.ndarray:
        """What the expert would do now (a,)."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], Any]:
        """As Gymnasium's."""

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        """As Gymnasium's."""


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
        settle: Where success is judged at the last step, steps in a row in which it must hold for the episode to end
            before; 0 for never.
    """

    def __init__(
        self,
        env: Demonstrator,
        *,
        noise: float = 0.3,
        noisy: float = 0.8,
        drop: float = 0.1,
        stumble: float = 0.5,
        settle: int = 0,
    ) -> None:
        self.env, self.noise, self.noisy, self.drop, self.stumble = env, noise, noisy, drop, stumble
        self.settle = settle
        self.name = env.task.name
        self.schema = demonstration_schema(env.spec_embodiment)

    def record(self, seed: int) -> list[RecordedEpisode]:
        """Run one episode; the same seed gives the same episode."""
        env, rng = self.env, np.random.default_rng([seed, 0xDE40])
        observation, _ = env.reset(seed=seed)
        cameras = env.spec_embodiment.camera_names
        disturbed = Disturbances(env.disturbable, rng, self.noise, self.noisy, self.drop, self.stumble)
        limits = getattr(env, "clips", None)
        steps: list[Step] = []
        success, held = False, 0
        for t in range(env.task.max_steps):
            action = env.expert_action()
            images = {name: observation[name] for name in cameras}
            executed = disturbed.executed(t, action)
            if limits is not None:  # what is kept as executed must be what is
                executed = np.clip(executed, *limits)
            steps.append(Step(images, observation["state"], action, {EXECUTED: executed}))
            if success or (self.settle and held >= self.settle):
                success = True
                break
            observation, _, terminated, _, info = env.step(executed)
            success = success or bool(info["success"])
            held = held + 1 if info.get("holds") else 0
            if terminated and not success:
                break
        instruction = str(observation["instruction"])
        meta = {"seed": seed, "task": self.name}
        return [RecordedEpisode(instruction, (self.name, "expert"), meta, steps, success)]
