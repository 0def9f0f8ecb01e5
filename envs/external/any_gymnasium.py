"""Any environment of Gymnasium by its id: what is state, what is picture and what is success stands in a YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from ...errors import ConfigError, did_you_mean
from ...spec import EmbodimentSpec, FeatureSpec
from ..demonstrations import Disturbable
from .base import Outcome, SuiteEnv, SuiteTask, camera_features

RENDERED = "render"
"""The camera that is the environment's own ``render()``."""
NO_LIMIT = -1
"""As Gymnasium calls it."""


class GymnasiumEnv(SuiteEnv):
    """An environment that was registered with Gymnasium, with continuous actions.

    Args:
        id: As given to ``gymnasium.make``.
        instruction: What a policy is told.
        control_hz: Steps a second.
        max_steps: Length of an episode.
        cameras: Camera -> edge of its picture [px]. ``render`` is what the environment renders; any other name is a key
            of the observation (dots go into nested ones) whose picture is scaled to that size.
        state: Keys of the observation that make up the state, one after the other; none for all that is no picture.
        success: Key of ``info`` that tells success; empty to go by the reward.
        reward_above: Where `success` is empty: a step's reward above this is success.
        judged: ``ever`` or ``last``.
        options: Arguments of ``gymnasium.make``.
        imports: Modules that register it when they are imported.
        images, render_mode, render_size: As of `SuiteEnv`.
    """

    def __init__(
        self,
        *,
        id: str,
        instruction: str,
        control_hz: float,
        max_steps: int,
        cameras: Mapping[str, int],
        state: Sequence[str] = (),
        success: str = "is_success",
        reward_above: float = 0.0,
        judged: str = "ever",
        options: Mapping[str, Any] | None = None,
        imports: Sequence[str] = (),
        images: bool = True,
        render_mode: str | None = None,
        render_size: int = 256,
    ) -> None:
        self.env = _make(id, dict(options or {}), imports, draws=RENDERED in cameras)
        self.state_keys, self.success_key, self.reward_above = tuple(state), success, reward_above
        self.says = instruction
        self._seen, _ = self.env.reset(seed=0)
        self._require_action(id)
        found = _leaves(self._seen)
        known = (RENDERED, *(key for key, value in found.items() if _is_picture(value)))
        for key in self.state_keys:
            if key not in found:
                raise ConfigError(f"{id}: no observation {key!r}. {did_you_mean(key, found)}")
        plain = re.sub(r"[^A-Za-z0-9-]+", "_", id)  # it names files and layers
        action = self.env.action_space
        dim = int(np.prod(action.shape))
        super().__init__(
            task=SuiteTask(name=plain, max_steps=max_steps),
            spec=EmbodimentSpec(
                name=plain,
                robot=id,
                control_hz=control_hz,
                cameras=camera_features(cameras, known),
                state=FeatureSpec(name="state", shape=(len(self.read_state()),)),
                action=FeatureSpec(
                    name="action",
                    shape=(dim,),
                    low=tuple(action.low.reshape(-1).tolist()) if np.isfinite(action.low).all() else (),
                    high=tuple(action.high.reshape(-1).tolist()) if np.isfinite(action.high).all() else (),
                ),
            ),
            judged=judged,
            images=images,
            render_mode=render_mode,
            render_size=render_size,
        )

    @property
    def disturbable(self) -> Disturbable:
        """A tenth of each action's range."""
        low, high = self.spec_embodiment.action.low, self.spec_embodiment.action.high
        unit = 0.1 * (np.asarray(high) - np.asarray(low)) if low and high else np.zeros(self.spec_embodiment.action.dim)
        return Disturbable(unit=unit, absolute=False, grippers=())

    def begin(self, seed: int) -> str:
        """The environment's own episode of this seed."""
        self._seen, _ = self.env.reset(seed=seed)
        return self.says

    def advance(self, action: np.ndarray) -> Outcome:
        """One step of the environment."""
        shaped = action.reshape(self.env.action_space.shape).astype(self.env.action_space.dtype)
        self._seen, reward, terminated, ended, info = self.env.step(shaped)
        if self.success_key:
            if self.success_key not in info:
                raise ConfigError(
                    f"{self.task.name}: no {self.success_key!r} in info, which has {sorted(info)}: set env.success to "
                    "one of them, or to '' and env.reward_above to a number"
                )
            success = bool(info[self.success_key])
        else:
            success = float(reward) > self.reward_above
        return Outcome(success=success, reward=float(reward), over=bool(terminated or ended))

    def read_state(self) -> np.ndarray:
        """What was chosen of the observation, in one row."""
        found = _leaves(self._seen)
        keys = self.state_keys or [key for key, value in found.items() if not _is_picture(value)]
        parts = [np.asarray(found[key], np.float32).reshape(-1) for key in keys]
        return np.concatenate(parts) if parts else np.zeros(1, np.float32)

    def pictures(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """Rendered, or from the observation; scaled."""
        import cv2

        found = {}
        for name, (height, width) in sizes.items():
            seen = np.asarray(self.env.render() if name == RENDERED else _leaves(self._seen)[name])
            if not _is_picture(seen):
                raise ConfigError(
                    f"{self.task.name}: camera {name!r} gave {seen.dtype} {seen.shape}, expected a picture, uint8 "
                    "(height, width, 3): set env.cameras to a picture of the observation, or env.options.render_mode"
                )
            found[name] = cv2.resize(seen, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)
        return found

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _require_action(self, id: str) -> None:
        from gymnasium.spaces import Box

        if not isinstance(self.env.action_space, Box):
            raise ConfigError(f"{id}: expected continuous actions (Box), got {self.env.action_space}")


def _make(id: str, options: dict[str, Any], imports: Sequence[str], *, draws: bool) -> Any:
    """The environment with the wrappers that it was registered with, but for the limit of its steps, which is ours; a
    ConfigError that says what to type where there is none."""
    import gymnasium

    for module in imports:
        try:
            import_module(module)
        except ImportError as error:
            raise ConfigError(f"env.imports: no module {module!r} ({error}). Install what registers {id}") from error
    if draws:
        options = {"render_mode": "rgb_array", **options}
    try:
        return gymnasium.make(id, max_episode_steps=NO_LIMIT, disable_env_checker=True, **options)
    except (gymnasium.error.Error, ImportError) as error:
        hint = did_you_mean(id, gymnasium.registry) if id not in gymnasium.registry else ""
        raise ConfigError(f"Gymnasium cannot make {id!r}: {error} {hint[:200]}") from error
    except TypeError as error:
        raise ConfigError(f"Gymnasium cannot make {id!r} with env.options={options}: {error}") from error


def _leaves(seen: Any, prefix: str = "") -> dict[str, Any]:
    """Arrays of a nested observation by dotted key; of a plain one as ``observation``."""
    if not isinstance(seen, Mapping):
        return {prefix or "observation": seen}
    found: dict[str, Any] = {}
    for key, value in seen.items():
        found |= _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _is_picture(value: Any) -> bool:
    array = np.asarray(value)
    return array.ndim == 3 and array.shape[-1] == 3 and array.dtype == np.uint8
