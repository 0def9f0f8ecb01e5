"""From chunks to single actions: when to ask for a new chunk, and what to do with overlapping ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import ConfigError
from ..spec import EmbodimentSpec, Observation
from .base import ChunkPolicy


@dataclass
class _Lane:
    """State of one lane: its generator, its step, and chunks with the step that their first action is meant for."""

    rng: np.random.Generator
    step: int = 0
    chunks: list[tuple[int, np.ndarray]] = field(default_factory=list)


class ChunkExecutor:
    """Common part: lanes, their noise, and one batched prediction for all lanes that need a chunk."""

    def __init__(self, policy: ChunkPolicy, *, replan_every: int) -> None:
        if not 1 <= replan_every <= policy.action_horizon:
            raise ConfigError(
                f"expected to replan every 1..{policy.action_horizon} steps (the chunk's length), got {replan_every}"
            )
        self.policy, self.replan_every = policy, replan_every
        self.embodiment: EmbodimentSpec = policy.embodiment
        self._lanes: dict[int, _Lane] = {}

    def reset(self, lane: int, seed: int) -> None:
        """Start an episode in a lane."""
        self._lanes[lane] = _Lane(np.random.default_rng([seed, 0xAC7]))

    def act(self, observations: Sequence[Observation], lanes: Sequence[int]) -> np.ndarray:
        """Actions float32 (n, a)."""
        missing = [lane for lane in lanes if lane not in self._lanes]
        if missing:
            raise ConfigError(f"lanes {missing} act before reset(lane, seed)")
        asking = [k for k, lane in enumerate(lanes) if self._lanes[lane].step % self.replan_every == 0]
        if asking:
            shape = (self.policy.action_horizon, self.policy.noise_dim)
            noise = np.stack([self._lanes[lanes[k]].rng.standard_normal(shape, np.float32) for k in asking])
            chunk = self.policy.predict([observations[k] for k in asking], noise)
            for row, k in enumerate(asking):
                state = self._lanes[lanes[k]]
                state.chunks.append((state.step, chunk.actions[row]))
        actions = []
        for lane in lanes:
            state = self._lanes[lane]
            horizon = self.policy.action_horizon
            state.chunks = [(start, rows) for start, rows in state.chunks if state.step - start < horizon]
            actions.append(self.merge([rows[state.step - start] for start, rows in state.chunks]))
            state.step += 1
        return np.stack(actions).astype(np.float32)

    def merge(self, candidates: list[np.ndarray]) -> np.ndarray:
        """The action to execute, from what each chunk says about this step, the oldest chunk first."""
        raise NotImplementedError


class RecedingHorizon(ChunkExecutor):
    """Execute the first `execute_horizon` actions of each chunk, then ask for the next (Chi et al. 2023)."""

    def __init__(self, policy: ChunkPolicy, *, execute_horizon: int = 4) -> None:
        super().__init__(policy, replan_every=execute_horizon)

    def merge(self, candidates: list[np.ndarray]) -> np.ndarray:
        """The newest chunk."""
        return candidates[-1]


class TemporalEnsemble(ChunkExecutor):
    """Ask at every step, and average what all live chunks say of it with weights exp(-decay * age rank).

    As in ACT (Zhao et al. 2023) the oldest chunk has rank 0, so a positive `decay` favours older predictions. The last
    element (the gripper) is taken from the newest chunk: half-open is not between open and closed.
    """

    def __init__(self, policy: ChunkPolicy, *, decay: float = 0.01, average_gripper: bool = False) -> None:
        super().__init__(policy, replan_every=1)
        self.decay, self.average_gripper = decay, average_gripper

    def merge(self, candidates: list[np.ndarray]) -> np.ndarray:
        """The weighted mean."""
        weights = np.exp(-self.decay * np.arange(len(candidates)))
        action = np.average(np.stack(candidates), axis=0, weights=weights)
        if not self.average_gripper and self.embodiment.action.gripper != "none":
            action[-1] = candidates[-1][-1]
        return np.asarray(action)
