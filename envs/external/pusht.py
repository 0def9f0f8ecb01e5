"""PushT (Florence et al. 2021; Chi et al. 2023; gym-pusht): push a T onto its outline, seen from above.

The published protocol: 300 steps at 10 Hz, the action is where the pusher shall go, success where 95 % of the outline
is covered; Diffusion Policy's figure is the mean of the largest coverage, which is this environment's reward.
Demonstrations are human (``brachium convert data=replay_buffer`` or ``data=lerobot``); there is no scripted expert.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...spec import EmbodimentSpec, FeatureSpec
from ..demonstrations import Disturbable
from .base import Outcome, SuiteEnv, SuiteTask, camera_features, require_suite

CAMERAS = ("image",)
INSTRUCTION = "Push the T onto the green outline"
MAX_STEPS = 300
SIDE = 512.0
"""Edge of the field [px]."""


class PushTEnv(SuiteEnv):
    """PushT.

    Args:
        cameras: ``image`` and its edge [px].
        images, render_mode, render_size: As of `SuiteEnv`.
    """

    def __init__(
        self,
        *,
        cameras: Mapping[str, int],
        images: bool = True,
        render_mode: str | None = None,
        render_size: int = 256,
    ) -> None:
        require_suite("gym_pusht", "gym-pusht", mujoco=False)
        super().__init__(
            task=SuiteTask(name="pusht", max_steps=MAX_STEPS),
            spec=embodiment(cameras),
            images=images,
            render_mode=render_mode,
            render_size=render_size,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pygame's, of pkg_resources
            from gym_pusht.envs.pusht import PushTEnv as Theirs

        self.env: Any = Theirs(obs_type="state", render_mode="rgb_array")
        self._seen = np.zeros(5)

    @property
    def disturbable(self) -> Disturbable:
        """Where the pusher goes [px]."""
        return Disturbable(unit=np.full(2, 20.0), absolute=True, grippers=())

    def begin(self, seed: int) -> str:
        """Pusher and T are placed by the suite."""
        self._seen, _ = self.env.reset(seed=seed)
        return INSTRUCTION

    def advance(self, action: np.ndarray) -> Outcome:
        """One step of the suite: 100 ms."""
        self._seen, reward, _, _, info = self.env.step(action.astype(np.float64))
        return Outcome(success=bool(info["is_success"]), reward=float(reward))

    def read_state(self) -> np.ndarray:
        """Where the pusher is [px]."""
        found: np.ndarray = self._seen[:2]
        return found

    def pictures(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """The field from above, without the mark at the last action that the suite draws for people."""
        found = {}
        for name, (height, width) in sizes.items():
            self.env.observation_height, self.env.observation_width = height, width
            self.env.obs_type = "pixels"
            found[name] = np.ascontiguousarray(self.env.get_obs(), np.uint8)
            self.env.obs_type = "state"
        return found


def embodiment(cameras: Mapping[str, Any]) -> EmbodimentSpec:
    """A round pusher that goes where it is sent; 10 steps a second.

    For the environment, and for data that was recorded elsewhere. Arguments as of `PushTEnv`.
    """
    common: dict[str, Any] = {"shape": (2,), "names": ("x", "y"), "units": ("px", "px"), "frame": "image"}
    return EmbodimentSpec(
        name="pusht",
        robot="pusher",
        control_hz=10.0,
        cameras=camera_features(cameras, CAMERAS),
        state=FeatureSpec(name="state", **common),
        action=FeatureSpec(name="action", low=(0.0, 0.0), high=(SIDE, SIDE), **common),
    )
