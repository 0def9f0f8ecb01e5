"""What carries out skills in a world with physics: scripted experts as an oracle, and how to hold still."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import ConfigError
from ...spec import DETAIL, EmbodimentSpec, Observation
from ..base import Policy
from .base import LanguageSubgoal, Subgoal, describe

GRIPPER = "gripper"
RISE = 0.03
"""How far up absolute actions send the tool in a step [m]."""


class ScriptedSkills:
    """The scripted experts of a world's skills, as an oracle: they know where everything is.

    Args:
        world: With `instructions`, `calls` and `expert_action(call)`; one lane.
    """

    def __init__(self, world: Any) -> None:
        self.world, self.embodiment = world, world.spec_embodiment
        self._calls = dict(zip(world.instructions, world.calls))

    def reset(self, lane: int, seed: int) -> None:
        """There is nothing to forget."""

    def act(self, observations: Sequence[Observation], lanes: Sequence[int]) -> np.ndarray:
        """Actions (n, a)."""
        found = []
        for observation in observations:
            if observation.instruction not in self._calls:
                raise ConfigError(f"no scripted skill is called {observation.instruction!r}")
            found.append(self.world.expert_action(self._calls[str(observation.instruction)]))
        return np.asarray(found, np.float32)


class Lifted:
    """Carries out skills with a policy, and brings the hand up before each of them.

    An attempt that failed leaves the hand where it got stuck, and the same look would lead to the same failure.

    Args:
        policy: Told the skill's words.
        height: Of the tool from which on the policy acts [m].
        most: Steps that the way up may take.
    """

    def __init__(self, policy: Policy, *, height: float, most: int = 12) -> None:
        self.policy, self.embodiment = policy, policy.embodiment
        self.height, self.most = height, most
        spec = self.embodiment
        self._z = spec.state.names.index("z")
        names = spec.action.names
        self._up = names.index("dz") if "dz" in names else names.index("z")
        self._hold = holding(spec)
        self._seeds: dict[int, int] = {}
        self._left: dict[int, int] = {}
        self._attempts: dict[int, int] = {}

    def reset(self, lane: int, seed: int) -> None:
        """Start an episode."""
        self._seeds[lane], self._left[lane], self._attempts[lane] = seed, 0, 0
        self.policy.reset(lane, seed)

    def pursue(self, lane: int, subgoal: Subgoal, observation: Observation) -> None:
        """A skill begins: first the hand comes up; the policy then begins anew, with draws of its own."""
        if not isinstance(subgoal, LanguageSubgoal):
            raise ConfigError(f"this policy follows instructions in words, got {describe(subgoal)!r}")
        self._left[lane] = self.most
        self._attempts[lane] += 1

    def act(self, observations: Sequence[Observation], lanes: Sequence[int]) -> np.ndarray:
        """Actions (n, a)."""
        actions = np.zeros((len(lanes), self.embodiment.action.dim), np.float32)
        told = []
        for row, (observation, lane) in enumerate(zip(observations, lanes)):
            if self._left[lane] > 0 and float(observation.state[self._z]) < self.height:
                actions[row] = self._raise(observation)
                self._left[lane] -= 1
                continue
            if self._left[lane]:
                self._left[lane] = 0
                self.policy.reset(lane, self._seeds[lane] + 7919 * self._attempts[lane])
            told.append((row, observation, lane))
        if told:
            chosen = self.policy.act([seen for _, seen, _ in told], [lane for _, _, lane in told])
            actions[[row for row, _, _ in told]] = chosen
        return actions

    def _raise(self, observation: Observation) -> np.ndarray:
        action, spec = self._hold(observation), self.embodiment.action
        step = spec.high[self._up] if spec.reference != "absolute" else float(observation.state[self._z]) + RISE
        action[self._up] = step
        return action


def holding(spec: EmbodimentSpec) -> Callable[[Observation], np.ndarray]:
    """The action that keeps a robot where it is, and its gripper as it is.

    Deltas are zero; what is absolute is taken from the state's elements of the same names.

    Raises:
        ConfigError: An element of the action is absolute and not in the state.
    """
    states, names = spec.state.names, spec.action.names
    delta = spec.action.reference != "absolute"
    known = {name: states.index(name) for name in names if name in states}
    lacking = [name for name in names if name not in known and not (delta and name != GRIPPER)]
    if lacking:
        raise ConfigError(f"{spec.name}: holding still needs {lacking} in the state, which has {list(states)}")

    def hold(observation: Observation) -> np.ndarray:
        action = np.zeros(len(names), np.float32)
        for k, name in enumerate(names):
            if name in known and not (delta and name != GRIPPER):
                action[k] = observation.state[known[name]]
        return action

    return hold


def observed(seen: dict[str, Any], spec: EmbodimentSpec, timestamp: float = 0.0) -> Observation:
    """An environment's observation as policies take it."""
    images = {k: v for k, v in seen.items() if k in spec.camera_names or k.endswith(DETAIL)}
    return Observation(images=images, state=seen["state"], instruction=seen["instruction"], timestamp=timestamp)
