"""The cheapest environment that LeRobot's evaluation takes, as a plugin: a point that is told where to go.

Writes what it showed and what it was told into the file that TOYREACH_JOURNAL names.
"""

import os
import pickle
from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE


class ToyReach(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's)
    task_description = task = "reach the blue ball"

    def __init__(self, episode_length=6, size=32, actions=2, render_mode="rgb_array"):
        self._max_episode_steps, self._size, self.render_mode = episode_length, size, render_mode
        self.observation_space = gym.spaces.Dict(
            pixels=gym.spaces.Dict(front=gym.spaces.Box(0, 255, (size, size, 3), np.uint8)),
            agent_pos=gym.spaces.Box(-9.0, 9.0, (2,), np.float32),
        )
        self.action_space = gym.spaces.Box(-9.0, 9.0, (actions,), np.float32)
        self.journal = []

    def render(self):
        image = np.full((self._size, self._size, 3), 40, np.uint8)
        row, column = np.clip((self._place + 1.0) / 2.0 * (self._size - 1), 0, self._size - 1).astype(int)
        image[row, column] = (self._step * 30 + 100) % 256
        return image

    def _see(self):
        self._seen = {"pixels": {"front": self.render()}, "agent_pos": self._place.astype(np.float32)}
        return self._seen

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._seed = seed if seed is not None else getattr(self, "_seed", None)
        self._place, self._step = self.np_random.uniform(-0.5, 0.5, 2), 0
        return self._see(), {"is_success": False}

    def step(self, action):
        if (path := os.environ.get("TOYREACH_JOURNAL")) and self._step < self._max_episode_steps:
            row = {"seed": self._seed, "step": self._step, "action": np.array(action), **self._seen}
            with open(path, "ab") as file:
                pickle.dump(row, file)
        self._place = self._place + 0.3 * (np.asarray(action, float)[:2] - self._place)
        self._step += 1
        return self._see(), 0.0, False, self._step >= self._max_episode_steps, {"is_success": False}


@EnvConfig.register_subclass("toyreach")
@dataclass
class ToyReachEnv(EnvConfig):
    task: str | None = "Reach-v0"
    fps: int = 10
    episode_length: int = 6
    size: int = 32
    actions: int = 2
    camera: str = "front"
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {"agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(2,))}
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE, "pixels/front": f"{OBS_IMAGES}.front"}
    )

    def __post_init__(self):
        self.features["pixels/front"] = PolicyFeature(type=FeatureType.VISUAL, shape=(self.size, self.size, 3))
        self.features[ACTION] = PolicyFeature(type=FeatureType.ACTION, shape=(self.actions,))

    @property
    def gym_id(self):
        return "lerobot_env_toyreach/Reach-v0"

    @property
    def gym_kwargs(self):
        return {"episode_length": self.episode_length, "size": self.size, "actions": self.actions}


gym.register("lerobot_env_toyreach/Reach-v0", entry_point=ToyReach)
