"""The slow system as a planner: it leaves a latent every now and then, and the fast policy acts on the newest one.

Helix-like (Figure, 2025; OpenHelix 2505.03912): two rates, joined by a latent whose age the fast policy knows.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import ConfigError, did_you_mean
from ...spec import ActionChunk, EmbodimentSpec, Guidance, Observation
from ...vla.slowfast import SlowFastModel, shrunk
from ..base import Policy
from .base import Candidate, LatentSubgoal, PlanContext, Proposal, Subgoal, Verdict, describe
from .executing import holding
from .runner import HierarchicalRunner
from .wiring import Factory, wired

ABLATIONS = ("none", "zero", "shuffle")
"""What is done to the latent: nothing, all zeros, or that of another moment of another episode."""
BANK = 256
"""Latents kept to shuffle."""


@dataclass(frozen=True, kw_only=True)
class LatentObservation(Observation):
    """An observation of a lane with the newest latent z (d,) and its age [steps]."""

    z: np.ndarray
    age: float
    lane: int


class LatentPlanner:
    """Proposes what the slow system makes of the present as a latent subgoal.

    Args:
        system: A slow-fast pair.
        period: Steps between two latents.
        latency: Steps that a latent takes to come.
        ttl_s: A latent is worth nothing after so long [s].
        ablation: One of `ABLATIONS`: a fast policy that does as well without its latent does not listen to it.
    """

    name = "latent"

    def __init__(
        self,
        *,
        system: SlowFastModel,
        period: int = 5,
        latency: int = 0,
        ttl_s: float = 5.0,
        ablation: str = "none",
    ) -> None:
        if ablation not in ABLATIONS:
            raise ConfigError(f"unknown ablation {ablation!r}. {did_you_mean(ablation, ABLATIONS)}")
        if period < 1 or latency < 0 or ttl_s <= 0.0:
            raise ConfigError(
                "expected period of at least 1, latency of at least 0 and ttl_s above 0, got "
                f"{period}, {latency} and {ttl_s}"
            )
        self.system, self.period, self.latency, self.ttl_s, self.ablation = system, period, latency, ttl_s, ablation
        self._bank: deque[tuple[int, np.ndarray]] = deque(maxlen=BANK)

    def propose(self, context: PlanContext) -> Proposal:
        """One candidate: the latent of the present."""
        seen = replace(context.observation, instruction=context.instruction)
        z = self._changed(self.system.think([seen])[0], context)
        subgoal = LatentSubgoal(
            z=z[None], stamp=context.observation.timestamp, ttl_s=self.ttl_s, text=context.instruction
        )
        return Proposal(candidates=(Candidate(subgoal=subgoal),))

    def _changed(self, z: np.ndarray, context: PlanContext) -> np.ndarray:
        if self.ablation == "zero":
            return np.zeros_like(z)
        if self.ablation == "shuffle":
            others = [kept for seed, kept in self._bank if seed != context.seed]
            self._bank.append((context.seed, z))
            rng = np.random.default_rng([context.seed, context.step, 0x5F])
            return others[int(rng.integers(len(others)))] if others else np.zeros_like(z)
        return z


class _LatentChunks:
    """The fast system as a `ChunkPolicy`; always on batches of `batch_size` rows, see `VLAPolicy`."""

    takes_guidance = False

    def __init__(self, system: SlowFastModel, batch_size: int) -> None:
        self.system, self.batch_size = system, batch_size
        self.embodiment: EmbodimentSpec = system.embodiment
        self.action_horizon, self.noise_dim = system.net.sizes.horizon, system.embodiment.action.dim
        self.share: dict[int, float] = {}
        """Lane -> how far the task is, as it was seen last, 0..1."""

    def predict(
        self,
        observations: Sequence[Observation],
        noise: np.ndarray,
        guidance: Sequence[Guidance | None] | None = None,
    ) -> ActionChunk:
        """See `ChunkPolicy`; there is no guidance."""
        if guidance is not None and any(guide is not None for guide in guidance):
            raise ConfigError("the fast system takes no guidance. Type: executor=receding")
        spec, found = self.embodiment, []
        for start in range(0, len(observations), self.batch_size):
            rows = list(range(start, min(start + self.batch_size, len(observations))))
            full = rows + [rows[-1]] * (self.batch_size - len(rows))
            some = [_latent(observations[k]) for k in full]
            z = torch.from_numpy(np.stack([o.z for o in some])).float()
            age = torch.tensor([o.age for o in some])
            images = torch.from_numpy(np.stack([np.stack([o.images[n] for n in spec.camera_names]) for o in some]))
            state = torch.from_numpy(np.stack([o.state for o in some])).float()
            draws = torch.from_numpy(np.asarray(noise[full], np.float32))
            small = shrunk(images, self.system.net.sizes.image)
            chunk, share = self.system.net.act(z, age, small, state, draws)
            found.append(chunk.numpy()[: len(rows)])
            self.share |= {each.lane: float(p) for each, p in zip(some, share)}
        actions = np.concatenate(found)
        if spec.action.low and spec.action.high:
            actions = np.clip(actions, np.asarray(spec.action.low), np.asarray(spec.action.high))
        stamp = max(o.timestamp for o in observations)
        return ActionChunk(actions=actions.astype(np.float32), control_hz=spec.control_hz, timestamp=stamp)


def _latent(observation: Observation) -> LatentObservation:
    if not isinstance(observation, LatentObservation):
        raise ConfigError("the fast system needs a latent with what is seen: use FastPolicy")
    return observation


class FastPolicy:
    """Acts on the newest latent; a `Policy`, with `pursue`. It holds still where the latent is too old.

    Args:
        system: A slow-fast pair.
        executor: Turns chunks into actions.
        batch_size: Rows of every pass.
    """

    def __init__(self, system: SlowFastModel, executor: Callable[..., Policy], *, batch_size: int = 8) -> None:
        self.chunks = _LatentChunks(system, batch_size)
        self.executor, self.embodiment = executor(self.chunks), system.embodiment
        self.hold = holding(system.embodiment)
        self._latents: dict[int, LatentSubgoal] = {}

    @property
    def share(self) -> dict[int, float]:
        """Lane -> how far the task is, as the fast system last saw it, 0..1."""
        return self.chunks.share

    def reset(self, lane: int, seed: int) -> None:
        """Start an episode: there is no latent."""
        self._latents.pop(lane, None)
        self.chunks.share.pop(lane, None)
        self.executor.reset(lane, seed)

    def pursue(self, lane: int, subgoal: Subgoal, observation: Observation) -> None:
        """Act on a latent from now on; ConfigError for anything else."""
        if not isinstance(subgoal, LatentSubgoal):
            raise ConfigError(f"the fast system acts on latents and reads no words, got {describe(subgoal)!r}")
        self._latents[lane] = subgoal

    def act(self, observations: Sequence[Observation], lanes: Sequence[int]) -> np.ndarray:
        """Actions (n, a)."""
        actions = np.zeros((len(lanes), self.embodiment.action.dim), np.float32)
        told: list[tuple[int, LatentObservation, int]] = []
        for row, (observation, lane) in enumerate(zip(observations, lanes)):
            if lane not in self._latents:
                raise ConfigError(f"lane {lane} acts before pursue(lane, subgoal, observation)")
            latent = self._latents[lane]
            seconds = observation.timestamp - latent.stamp
            if seconds > latent.ttl_s:
                actions[row] = self.hold(observation)
                continue
            fields = {name: getattr(observation, name) for name in ("images", "state", "instruction", "timestamp")}
            age = seconds * self.embodiment.control_hz
            told.append((row, LatentObservation(**fields, z=latent.z[0], age=age, lane=lane), lane))
        if told:
            chosen = self.executor.act([seen for _, seen, _ in told], [lane for _, _, lane in told])
            actions[[row for row, _, _ in told]] = chosen
        return actions


class Completion:
    """Takes the work to be finished when the fast system says so (Helix's share of the task that is done).

    Args:
        policy: What knows it.
        threshold: Least share.
    """

    def __init__(self, policy: FastPolicy, *, threshold: float = 0.9) -> None:
        self.policy, self.threshold = policy, threshold

    def check(self, context: PlanContext, lane: int) -> Verdict:
        """Whether it says so."""
        share = self.policy.share.get(lane, 0.0)
        return Verdict(ok=share > self.threshold, p=share, source="completion")


class SlowFastRunner(HierarchicalRunner):
    """A slow-fast pair as a policy: the slow system every `period` steps, the fast one at every step.

    Args:
        system: Loaded pair.
        executor: Turns chunks into actions.
        planner: Makes the planner from `system`.

    Attributes:
        told: What results depend on beside the weights.
    """

    def __init__(self, system: SlowFastModel, executor: Callable[..., Policy], planner: Factory | None = None) -> None:
        made: LatentPlanner = wired(planner or LatentPlanner, {"system": system})
        fast = FastPolicy(system, executor)
        super().__init__(
            planner=made,
            policy=fast,
            hold=holding(system.embodiment),
            termination="planner",
            every=made.period,
            latency=made.latency,
        )
        acts: Any = fast.executor
        self.told = json.dumps(
            [
                made.period,
                made.latency,
                made.ttl_s,
                made.ablation,
                type(acts).__name__,
                getattr(acts, "replan_every", 0),
            ]
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        executor: Callable[..., Policy],
        planner: Factory | None = None,
        like: EmbodimentSpec | None = None,
    ) -> SlowFastRunner:
        """Load a pair.

        Raises:
            CheckpointError: See `SlowFastModel.load`.
            SpecMismatchError: It was trained for another robot than `like`.
        """
        system = SlowFastModel.load(path)
        if like is not None:
            system.embodiment.require_same(like, f"checkpoint {path}", "environment")
        return cls(system, executor, planner)
