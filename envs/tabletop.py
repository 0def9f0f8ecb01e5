"""The table-top environment: any task of `tasks/`, any simulated embodiment, as a Gymnasium environment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from ..errors import ConfigError, did_you_mean
from ..sim.embodiment import SimEmbodiment
from ..sim.randomize import DomainRandomization
from ..sim.scene import OBJECT_KINDS
from ..sim.simulation import DOWN, Simulation
from ..spec import EmbodimentSpec
from .demonstrations import Disturbable
from .language import SPLITS
from .tasks.base import OUT_OF_TIME, Episode, Task

CHARSET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!?'\"-_()/"
MAX_INSTRUCTION = 128
OPTIONS = ("split", "misname")


class TabletopEnv(gymnasium.Env[dict[str, Any], np.ndarray]):
    """One task on the table.

    Observations: ``state`` float32 (s,), one uint8 image (height, width, 3) a camera, ``instruction`` (text).
    Actions: as in the embodiment's spec, in its units. Reward: 1 at success, else 0. An episode terminates at success
    or failure and is truncated after the task's `max_steps`. ``info`` has ``success``, ``task``, ``split`` (on reset)
    and ``failure`` (on steps): why the episode failed, in a few words, else empty.

    The same seed and options give the same episode, bit for bit, whatever was run before.

    Args:
        task: What is asked.
        embodiment: Robot, control mode, cameras, rate.
        randomization: How much looks vary.
        split: Which instructions: one of `language.SPLITS`; ``reset(options={"split": ...})`` overrides it.
        images: Whether to render cameras; without them observations hold the state and instruction only.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's convention)

    def __init__(
        self,
        *,
        task: Task,
        embodiment: SimEmbodiment,
        randomization: DomainRandomization | None = None,
        split: str = "train",
        images: bool = True,
        render_mode: str | None = None,
        render_size: int = 256,
    ) -> None:
        self.task, self.embodiment = task, embodiment
        self.randomization = randomization or DomainRandomization()
        self.images, self.render_mode, self.render_size = images, render_mode, render_size
        self.split = _checked_split(split)
        self.sim = Simulation(embodiment)
        spec = embodiment.spec
        action = spec.action
        self.action_space = spaces.Box(
            np.asarray(action.low, np.float32), np.asarray(action.high, np.float32), dtype=np.float32
        )
        parts: dict[str, spaces.Space[Any]] = {
            "state": spaces.Box(-np.inf, np.inf, spec.state.shape, np.float32),
            "instruction": spaces.Text(MAX_INSTRUCTION, min_length=0, charset=CHARSET),
        }
        if images:
            parts |= {c.name: spaces.Box(0, 255, c.shape, np.uint8) for c in spec.cameras}
        self.observation_space = spaces.Dict(parts)
        self.episode: Episode | None = None
        self._steps = 0

    @property
    def spec_embodiment(self) -> EmbodimentSpec:
        """What this environment's robot sees, feels and accepts."""
        return self.embodiment.spec

    @property
    def disturbable(self) -> Disturbable:
        """What of an action may be disturbed in demonstrations."""
        return disturbable(self.embodiment)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw and load an episode.

        Options: ``split`` (one of `language.SPLITS`), and ``misname``: the instruction names things of the scene drawn
        at random, while success stays what it was; for telling whether a policy listens.
        """
        options = options or {}
        for option in options:
            if option not in OPTIONS:  # a typing error would silently evaluate something else
                raise ConfigError(f"unknown reset option {option!r}. {did_you_mean(str(option), OPTIONS)}")
        super().reset(seed=seed)
        split = _checked_split(options.get("split", self.split))
        self.episode = self.task.sample(self.np_random, split)
        if options.get("misname"):
            self.episode = misname(self.task, self.episode, split, seed)
        scene = self.randomization.apply(self.episode.scene, self.np_random)
        self.sim.load(scene, np.asarray(self.episode.tool_start))
        if self.episode.drawer_start:
            self.sim.data.joint("drawer").qpos[0] = self.episode.drawer_start
            self.sim.settle()
        self._steps = 0
        return self._observe(), self._info(split=split)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Apply one action for one control period."""
        if self.episode is None:
            raise ConfigError("step() before reset(); call env.reset(seed=...) first")
        self.sim.step(action)
        self._steps += 1
        success = self.task.success(self.sim, self.episode)
        failure = "" if success else self.task.failure(self.sim, self.episode)
        terminated = success or bool(failure)
        truncated = not terminated and self._steps >= self.task.max_steps
        info = self._info(success=success, failure=failure or (OUT_OF_TIME if truncated else ""))
        return self._observe(), float(success), terminated, truncated, info

    def expert_action(self) -> np.ndarray:
        """What the scripted expert would do now: an action (a,) in the embodiment's units."""
        if self.episode is None:
            raise ConfigError("expert_action() before reset(); call env.reset(seed=...) first")
        position, gripper = self.task.expert(self.sim, self.episode)
        return self.sim.driver.encode(position, DOWN, gripper)

    def render(self) -> np.ndarray:
        """The front camera at `render_size`, for people: uint8 (size, size, 3)."""
        return self.sim.picture(self.embodiment.cameras[0], self.render_size)

    def _observe(self) -> dict[str, Any]:
        images = self.sim.images() if self.images else {}
        instruction = self.episode.instruction if self.episode else ""
        return {"state": self.sim.state, "instruction": instruction, **images}

    def _info(self, success: bool = False, **extra: Any) -> dict[str, Any]:
        return {"success": success, "task": self.task.name, **extra}


def disturbable(embodiment: SimEmbodiment) -> Disturbable:
    """What of the actions of an embodiment may be disturbed."""
    unit = embodiment.control.disturbance(embodiment.robot)
    return Disturbable(unit=unit, absolute=embodiment.spec.action.reference == "absolute")


def misname(task: Task, episode: Episode, split: str, seed: int | None) -> Episode:
    """The same episode with an instruction about an object and a goal drawn from what stands on the table."""
    rng = np.random.default_rng([seed or 0, 0x315])
    kinds = {item.name: item.kind for item in episode.scene.items}
    named = {}
    for role, true in episode.roles.items():
        alike = [n for n, kind in kinds.items() if kind == kinds[true] or {kind, kinds[true]} <= set(OBJECT_KINDS)]
        named[role] = alike[int(rng.integers(len(alike)))]
    if episode.roles.get("goal") == episode.roles.get("object"):
        named["goal"] = named["object"]
    return replace(episode, instruction=task.phrasings.sample(rng, split, named))


def _checked_split(split: str) -> str:
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}. {did_you_mean(str(split), SPLITS)}")
    return split
