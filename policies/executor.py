"""From chunks to single actions: when to ask for a new chunk, and what to do with overlapping ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import ConfigError
from ..spec import EmbodimentSpec, Guidance, Observation
from .base import ChunkPolicy
from .timeline import Timeline


@dataclass
class _Lane:
    """State of one lane: its generator, its step, the chunks that have arrived, and those that are on their way."""

    rng: np.random.Generator
    step: int = 0
    timeline: Timeline = field(default_factory=Timeline)
    asked: int | None = None
    """Step of the last request."""
    coming: tuple[int, np.ndarray] | None = None
    """(step of arrival, rows) of the chunk that was asked for and has not come."""
    last: np.ndarray | None = None

    def arrive(self) -> None:
        """Put the chunk that has come by now on the time axis."""
        if self.coming is not None and self.asked is not None and self.coming[0] <= self.step:
            self.timeline.add(self.asked, self.coming[1])
            self.coming = None


class ChunkExecutor:
    """Common part: lanes, their noise, and one batched prediction for all lanes that need a chunk.

    An executor is used in two ways. In simulation `act` answers step by step; a controller of a real robot keeps a
    `Timeline` of its own, asks for chunks in the background, and uses `replan_every`, `guidance` and `merge`.

    Args:
        policy: What predicts chunks.
        replan_every: Steps between two requests.
        inference_delay: Steps between an observation and the arrival of its chunk; in simulation only, to see what it
            costs. The next chunk is asked for when the last has come, and an episode begins when its first one has;
            where chunks come too late, the robot holds.
        temperature: Factor of the noise that chunks are drawn from. Below 1, chunks are nearer to the most likely one:
            what demonstrations vary in (their makers' corrections of disturbances) is left out.
    """

    def __init__(
        self, policy: ChunkPolicy, *, replan_every: int, inference_delay: int = 0, temperature: float = 1.0
    ) -> None:
        horizon = policy.action_horizon
        if not 1 <= replan_every <= horizon:
            raise ConfigError(f"expected to replan every 1..{horizon} steps (the chunk's length), got {replan_every}")
        if inference_delay < 0:
            raise ConfigError(f"expected an inference_delay of at least 0 steps, got {inference_delay}")
        if not 0.0 <= temperature <= 2.0:
            raise ConfigError(f"expected a temperature from 0 to 2, got {temperature}")
        self.temperature = temperature
        self.policy, self.replan_every, self.inference_delay = policy, replan_every, inference_delay
        self.embodiment: EmbodimentSpec = policy.embodiment
        self._lanes: dict[int, _Lane] = {}

    def reset(self, lane: int, seed: int) -> None:
        """Start an episode in a lane."""
        self._lanes[lane] = _Lane(np.random.default_rng([seed, 0xAC7]))

    def forget(self, lane: int) -> None:
        """A lane is over."""
        self._lanes.pop(lane, None)

    def timeline(self, lane: int) -> Timeline:
        """The chunks of a lane that have come."""
        return self._lanes[lane].timeline

    def act(self, observations: Sequence[Observation], lanes: Sequence[int]) -> np.ndarray:
        """Actions float32 (n, a)."""
        missing = [lane for lane in lanes if lane not in self._lanes]
        if missing:
            raise ConfigError(f"lanes {missing} act before reset(lane, seed)")
        states = [self._lanes[lane] for lane in lanes]
        for state in states:  # what has come by now is known when the next chunk is asked for
            state.arrive()
        self._ask(observations, states)
        actions = []
        for state, observation in zip(states, observations):
            state.arrive()
            candidates = state.timeline.at(state.step)
            state.last = self.merge(candidates) if candidates else self.hold(state.last, observation)
            actions.append(state.last)
            state.step += 1
        return np.stack(actions).astype(np.float32)

    def _ask(self, observations: Sequence[Observation], states: Sequence[_Lane]) -> None:
        """One batched request for all lanes whose turn it is: one at a time, as a robot's policy computes one."""
        asking = [
            k
            for k, state in enumerate(states)
            if state.coming is None and (state.asked is None or state.step - state.asked >= self.replan_every)
        ]
        if not asking:
            return
        shape = (self.policy.action_horizon, self.policy.noise_dim)
        noise = np.stack([states[k].rng.standard_normal(shape, np.float32) for k in asking])
        noise *= self.temperature
        guides = [self.guidance(states[k].timeline, states[k].step, self.inference_delay) for k in asking]
        seen = [observations[k] for k in asking]
        led = any(guide is not None for guide in guides)
        chunk = self.policy.predict(seen, noise, guides) if led else self.policy.predict(seen, noise)
        for row, k in enumerate(asking):
            state = states[k]
            delay = self.inference_delay if state.step else 0  # the robot starts when it knows what to do
            state.asked, state.coming = state.step, (state.step + delay, chunk.actions[row])

    def hold(self, last: np.ndarray | None, observation: Observation) -> np.ndarray:
        """The action that keeps the robot where it is: nothing for deltas, the last targets for absolute ones."""
        if last is None:
            raise ConfigError("no chunk has arrived and there is no last action to hold")
        return hold_action(self.embodiment, last)

    def merge(self, candidates: list[np.ndarray]) -> np.ndarray:
        """The action to execute, from what each chunk says about this step, the oldest chunk first."""
        raise NotImplementedError

    def guidance(self, timeline: Timeline, start: float, delay: float) -> Guidance | None:
        """What a chunk should agree with whose row 0 is at step `start` and that will arrive `delay` steps later."""
        return None


def hold_action(embodiment: EmbodimentSpec, last: np.ndarray) -> np.ndarray:
    """The action that changes nothing after `last` (a,): the gripper stays, deltas are zero."""
    held = np.array(last, np.float32)
    if embodiment.action.reference == "delta":
        held[: len(held) - (embodiment.action.gripper != "none")] = 0.0
    return held


class RecedingHorizon(ChunkExecutor):
    """Execute the first `execute_horizon` actions of each chunk, then ask for the next (Chi et al. 2023)."""

    def __init__(
        self, policy: ChunkPolicy, *, execute_horizon: int = 4, inference_delay: int = 0, temperature: float = 1.0
    ) -> None:
        super().__init__(policy, replan_every=execute_horizon, inference_delay=inference_delay, temperature=temperature)

    def merge(self, candidates: list[np.ndarray]) -> np.ndarray:
        """The newest chunk."""
        return candidates[-1]


class TemporalEnsemble(ChunkExecutor):
    """Ask at every step, and average what all live chunks say of it with weights exp(-decay * age rank).

    As in ACT (Zhao et al. 2023) the oldest chunk has rank 0, so a positive `decay` favours older predictions. The last
    element (the gripper) is taken from the newest chunk: half-open is not between open and closed.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        *,
        decay: float = 0.01,
        average_gripper: bool = False,
        inference_delay: int = 0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(policy, replan_every=1, inference_delay=inference_delay, temperature=temperature)
        self.decay, self.average_gripper = decay, average_gripper

    def merge(self, candidates: list[np.ndarray]) -> np.ndarray:
        """The weighted mean."""
        weights = np.exp(-self.decay * np.arange(len(candidates)))
        action = np.average(np.stack(candidates), axis=0, weights=weights)
        if not self.average_gripper and self.embodiment.action.gripper != "none":
            action[-1] = candidates[-1][-1]
        return np.asarray(action)


class RealTimeChunking(ChunkExecutor):
    """Ask while the last chunk is executed, and have the next one agree with what is executed until it comes.

    Real-time chunking (Black, Galliker, Levine 2025): the steps that will be over when the chunk arrives are frozen,
    the later ones are held to the plan less and less (`soft_mask`), the last `execute_horizon` are free.

    Args:
        policy: What predicts chunks, with a flow-matching head.
        execute_horizon: Steps between two requests, s in the paper; a slower policy is asked when it has answered.
        limit: Largest factor of the guidance.
        gradient: ``vjp`` as in the paper, or ``identity``: no gradient, twice as fast, and not the same.
        inference_delay, temperature: See `ChunkExecutor`.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        *,
        execute_horizon: int = 1,
        limit: float = 5.0,
        gradient: str = "vjp",
        inference_delay: int = 0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(policy, replan_every=execute_horizon, inference_delay=inference_delay, temperature=temperature)
        if not policy.takes_guidance:
            raise ConfigError(
                "real-time chunking needs a flow-matching head (flow, dit, pi0, pi05, smolvla ...), and this policy "
                "has none. Type: executor=ensemble or executor=receding"
            )
        self.limit, self.gradient = limit, gradient

    def merge(self, candidates: list[np.ndarray]) -> np.ndarray:
        """The newest chunk."""
        return candidates[-1]

    def guidance(self, timeline: Timeline, start: float, delay: float) -> Guidance | None:
        """The plan of the newest chunk, with soft weights."""
        horizon = self.policy.action_horizon
        action = self.embodiment.action
        plan = timeline.ahead(start, horizon, smooth=action.reference == "absolute")
        nearest = timeline.ahead(start, horizon)
        if plan is None or nearest is None:
            return None
        rows, real = plan
        if action.gripper != "none":  # half-open is not between open and closed
            rows = np.concatenate([rows[:, :-1], nearest[0][:, -1:]], axis=1)
        weights = soft_mask(horizon, int(np.ceil(delay - 1e-6)), min(real, horizon - self.replan_every))
        if not weights.any():
            return None
        return Guidance(actions=rows.astype(np.float32), weights=weights, limit=self.limit, gradient=self.gradient)


def soft_mask(horizon: int, frozen: int, overlap: int) -> np.ndarray:
    """Weights float32 (horizon,): 1 for `frozen` steps, falling to 0 at `overlap` (Black et al. 2025, eq. 5)."""
    index = np.arange(horizon, dtype=np.float64)
    frozen = min(frozen, overlap)
    share = np.clip((overlap - index) / (overlap - frozen + 1.0), 0.0, 1.0)
    weights = share * np.expm1(share) / np.expm1(1.0)
    weights[:frozen] = 1.0
    weights[overlap:] = 0.0
    return weights.astype(np.float32)
