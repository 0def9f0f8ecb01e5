"""What carries out skills in a world with physics: scripted experts as an oracle, and how to hold still."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import ConfigError
from ...spec import EmbodimentSpec, Observation

GRIPPER = "gripper"


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
    images = {name: seen[name] for name in spec.camera_names if name in seen}
    return Observation(images=images, state=seen["state"], instruction=seen["instruction"], timestamp=timestamp)
