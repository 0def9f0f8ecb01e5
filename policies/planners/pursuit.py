"""A policy that pursues pictures: it is shown what it should look like; an executor makes its chunks actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...errors import ConfigError, SpecMismatchError
from ...spec import ActionChunk, EmbodimentSpec, Guidance, Observation
from ...vla.generative.frames import shrink
from ...vla.generative.system import SubgoalSystem
from ..base import Policy
from .album import Album
from .base import ImageSubgoal, Subgoal, VideoSubgoal, describe

GOAL = "goal/"
"""What the names of goal images begin with, beside those of the cameras in an observation."""


class GoalChunks:
    """Chunks towards goal images, which stand in the observations under ``goal/CAMERA``.

    The policy always runs on batches of `batch_size` rows, so that an episode does not depend on how many others run
    beside it.

    Args:
        system: Its policy.
        batch_size: Rows of every pass.
    """

    takes_guidance = False

    def __init__(self, system: SubgoalSystem, *, batch_size: int = 8) -> None:
        self.model, self.see, self.batch_size = system.policy.eval(), system.see, batch_size
        self.embodiment: EmbodimentSpec = system.embodiment
        self.action_horizon = self.model.action_horizon
        self.noise_dim = self.embodiment.action.dim

    def predict(
        self,
        observations: Sequence[Observation],
        noise: np.ndarray,
        guidance: Sequence[Guidance | None] | None = None,
    ) -> ActionChunk:
        """See `ChunkPolicy`; there is no guidance."""
        if guidance is not None and any(guide is not None for guide in guidance):
            raise ConfigError("a policy that pursues pictures takes no guidance. Type: executor=receding")
        found = []
        for start in range(0, len(observations), self.batch_size):
            rows = list(range(start, min(start + self.batch_size, len(observations))))
            full = rows + [rows[-1]] * (self.batch_size - len(rows))
            names = self.embodiment.camera_names
            images = self._stacked([[observations[k].images[name] for name in names] for k in full])
            goals = self._stacked(
                [[observations[k].images[f"{GOAL}{name}"] for name in self.model.goals] for k in full]
            )
            state = torch.from_numpy(np.stack([observations[k].state for k in full]).astype(np.float32))
            draws = torch.from_numpy(np.asarray(noise[full], np.float32))
            chunk = self.model.predict(self.see(images), shrink(goals, self.model.goal_size), state, draws)
            found.append(chunk.numpy()[: len(rows)])
        actions = np.concatenate(found).astype(np.float32)
        stamp = max(o.timestamp for o in observations)
        return ActionChunk(actions=actions, control_hz=self.embodiment.control_hz, timestamp=stamp)

    @staticmethod
    def _stacked(images: list[list[np.ndarray]]) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.stack(each) for each in images]))


@dataclass
class _Pursued:
    """What a lane pursues, and for how many steps it has."""

    subgoal: ImageSubgoal | VideoSubgoal
    steps: int = 0

    @property
    def goal(self) -> dict[str, np.ndarray]:
        """Camera -> the image to make true now: of a video the next frame."""
        if isinstance(self.subgoal, ImageSubgoal):
            return dict(self.subgoal.images)
        number = self.steps // self.subgoal.steps
        return {name: frames[min(number, len(frames) - 1)] for name, frames in self.subgoal.frames.items()}


class Pursuit:
    """Pursues image and video subgoals; a `Policy`, with `pursue`.

    Args:
        system: A policy towards pictures.
        executor: Turns its chunks into actions.
        album: Keeps what was seen, imagined, and came; None for nothing.
    """

    def __init__(self, system: SubgoalSystem, executor: Callable[..., Policy], album: Album | None = None) -> None:
        self.executor, self.album = executor(GoalChunks(system)), album
        self.embodiment: EmbodimentSpec = system.embodiment
        self.cameras = system.cameras
        self._pursued: dict[int, _Pursued] = {}

    def reset(self, lane: int, seed: int) -> None:
        """Start an episode: nothing is pursued."""
        self._pursued.pop(lane, None)
        self.executor.reset(lane, seed)
        if self.album is not None:
            self.album.begin(lane, seed)

    def pursue(self, lane: int, subgoal: Subgoal, observation: Observation) -> None:
        """Pursue a subgoal from now on.

        Raises:
            ConfigError: One that is neither an image nor a video.
            SpecMismatchError: Pictures that lack a camera of the robot.
        """
        if not isinstance(subgoal, (ImageSubgoal, VideoSubgoal)):
            raise ConfigError(f"this policy pursues pictures and reads no words, got {describe(subgoal)!r}")
        shown = subgoal.images if isinstance(subgoal, ImageSubgoal) else subgoal.frames
        missing = [name for name in self.cameras if name not in shown]
        if missing:
            raise SpecMismatchError(f"subgoal: expected pictures of {list(self.cameras)}, got {sorted(shown)}")
        self._pursued[lane] = _Pursued(subgoal)
        if self.album is not None:
            self.album.pursue(lane, observation, shown, subgoal.text)

    def act(self, observations: Sequence[Observation], lanes: Sequence[int]) -> np.ndarray:
        """Actions (n, a)."""
        idle = [lane for lane in lanes if lane not in self._pursued]
        if idle:
            raise ConfigError(f"lanes {idle} act before pursue(lane, subgoal, observation)")
        seen = []
        for observation, lane in zip(observations, lanes):
            pursued = self._pursued[lane]
            goal = {f"{GOAL}{name}": image for name, image in pursued.goal.items()}
            seen.append(replace(observation, images={**observation.images, **goal}))
            pursued.steps += 1
        return self.executor.act(seen, lanes)
