"""Gymnasium-Robotics' Fetch arm (Plappert et al. 2018): reach, push, slide, pick and place, with experts of our own.

The published protocol: 50 steps, success if the goal is reached at the last of them; the observation is 25 numbers and
a goal of 3 (``observe=all``). With ``observe=gripper`` a policy gets the gripper alone and must see the rest: the goal
is drawn as the suite draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...errors import ConfigError, did_you_mean
from ...spec import EmbodimentSpec, FeatureSpec
from ..demonstrations import Disturbable
from .base import Outcome, SuiteEnv, SuiteTask, camera_features, require_suite
from .cameras import SuiteCameras, looking_at

CAMERAS = ("front", "side", "hand_front", "hand_side", "external_camera_0", "gripper_camera_rgb", "head_camera_rgb")
"""The first four are ours: the suite's hang on the robot, whose torso sinks while it works, or see nothing."""
IDS = {
    "reach": "FetchReach-v4",
    "push": "FetchPush-v4",
    "slide": "FetchSlide-v4",
    "pick_and_place": "FetchPickAndPlace-v4",
}
INSTRUCTIONS = {
    "reach": "Move the gripper to the red goal",
    "push": "Push the cube to the red goal",
    "slide": "Hit the puck so that it slides to the red goal",
    "pick_and_place": "Pick up the cube and bring it to the red goal",
}
OBSERVED = ("gripper", "all")
NUMBERS = (
    *(f"grip_{axis}" for axis in "xyz"),
    *(f"object_{axis}" for axis in "xyz"),
    *(f"relative_{axis}" for axis in "xyz"),
    *("finger_right", "finger_left"),
    *(f"rotation_{k}" for k in range(3)),
    *(f"object_velocity_{axis}" for axis in "xyz"),
    *(f"object_turning_{axis}" for axis in "xyz"),
    *(f"grip_velocity_{axis}" for axis in "xyz"),
    *("finger_velocity_right", "finger_velocity_left"),
)
"""The suite's own observation where there is an object."""
MAX_STEPS = 50
HAND = "robot0:grip"
"""The site between the fingers."""
REACH = 0.03
"""How far the gripper gets in one step at most [m]; an action of 1 asks for 0.05."""


class FetchEnv(SuiteEnv):
    """One task of the Fetch arm.

    Args:
        task: One of `IDS`.
        cameras: Camera -> edge of its picture [px]; ``front``, ``side`` and the two that move along with
            the hand, ``hand_front`` and ``hand_side``, are ours.
        observe: ``gripper`` (position and opening) or ``all`` that the suite observes, with the goal.
        mesh_cell: Detail of the robot's meshes in pictures [m]; 0 draws every face.
        images, render_mode, render_size: As of `SuiteEnv`.
    """

    def __init__(
        self,
        *,
        task: str,
        cameras: Mapping[str, int],
        observe: str = "gripper",
        mesh_cell: float = 0.008,
        images: bool = True,
        render_mode: str | None = None,
        render_size: int = 256,
    ) -> None:
        require_suite("gymnasium_robotics", "gymnasium-robotics")
        if task not in IDS:
            raise ConfigError(f"Fetch has no task {task!r}. {did_you_mean(task, IDS)}")
        if observe not in OBSERVED:
            raise ConfigError(f"unknown observe {observe!r}. {did_you_mean(observe, OBSERVED)}")
        super().__init__(
            task=SuiteTask(name=task, max_steps=MAX_STEPS),
            spec=fetch_spec(camera_features(cameras, CAMERAS), observe, has_object=task != "reach"),
            judged="last",
            images=images,
            render_mode=render_mode,
            render_size=render_size,
        )
        import gymnasium
        from farama_notifications import notifications

        notifications.pop("gymnasium_robotics", None)  # said at every import, of hands that are not used here
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)
        self.observe = observe
        made: Any = gymnasium.make(IDS[task])
        self.env: Any = made.unwrapped
        middle = (1.30, 0.75, 0.58)
        ours = {
            "front": looking_at(middle, distance=0.85, azimuth=180.0, elevation=-35.0),
            "side": looking_at(middle, distance=0.85, azimuth=90.0, elevation=-15.0),
            "hand_front": looking_at(middle, distance=0.45, azimuth=180.0, elevation=-50.0),
            "hand_side": looking_at(middle, distance=0.45, azimuth=90.0, elevation=-30.0),
        }
        self.cameras = SuiteCameras(
            self.env.model, mesh_cell=mesh_cell, free=ours, follow=dict.fromkeys(("hand_front", "hand_side"), HAND)
        )
        self._seen: dict[str, np.ndarray] = {}

    @property
    def disturbable(self) -> Disturbable:
        """Steps of the gripper; its fingers open by 1 and close by -1."""
        return Disturbable(unit=np.array([0.5, 0.5, 0.5, 0.0]), absolute=False, opened=1.0, closed=-1.0)

    def begin(self, seed: int) -> str:
        """Object and goal are drawn by the suite."""
        self._seen, _ = self.env.reset(seed=seed)
        self.cameras.refresh()
        return INSTRUCTIONS[self.task.name]

    def advance(self, action: np.ndarray) -> Outcome:
        """One step of the suite: 40 ms."""
        self._seen, reward, _, _, info = self.env.step(action.astype(np.float64))
        return Outcome(success=bool(info["is_success"]), reward=float(reward))

    def read_state(self) -> np.ndarray:
        """The gripper's position [m] and opening [m], or all that the suite observes and the goal."""
        seen = self._seen["observation"]
        if self.observe == "all":
            return np.concatenate([seen, self._seen["desired_goal"]])
        return np.append(seen[:3], self._opening())

    def pictures(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """What cameras see; the goal is a red ball, as in the suite's own pictures."""
        self.env.data.site("target0").xpos[:] = self._seen["desired_goal"]  # a site only: physics does not see it
        return self.cameras.pictures(self.env.data, sizes)

    def expert_action(self) -> np.ndarray:
        """What our scripted expert would do."""
        if self.task.name not in EXPERTS:
            return super().expert_action()
        seen = self._seen["observation"]
        target, fingers = EXPERTS[self.task.name](seen, self._seen["desired_goal"], self._opening())
        step = np.clip((target - seen[:3]) / REACH, -1.0, 1.0)
        return np.append(step, fingers).astype(np.float32)

    def _opening(self) -> float:
        """Distance between the fingers, from 0 to 0.1 [m]."""
        seen = self._seen["observation"]
        fingers = seen[9:11] if self.task.name != "reach" else seen[3:5]
        return float(fingers.sum())


def fetch_spec(cameras: tuple[FeatureSpec, ...], observe: str, *, has_object: bool) -> EmbodimentSpec:
    """The Fetch arm: the gripper moves by up to 5 cm a step, pointing down; 25 steps a second."""
    goal = tuple(f"goal_{axis}" for axis in "xyz")
    if observe == "gripper":
        names: tuple[str, ...] = ("x", "y", "z", "opening")
    elif has_object:
        names = (*NUMBERS, *goal)
    else:
        names = (*NUMBERS[:3], *NUMBERS[9:11], *NUMBERS[20:], *goal)
    plain = observe == "gripper"
    return EmbodimentSpec(
        name="fetch" if plain else f"fetch_{observe}" + ("" if has_object else "_reach"),
        robot="fetch",
        control_hz=25.0,
        cameras=cameras,
        state=FeatureSpec(
            name="state",
            shape=(len(names),),
            names=names,
            units=("m",) * len(names) if plain else ("1",) * len(names),
            frame="world",
            gripper="open_is_1" if plain else "none",
        ),
        action=FeatureSpec(
            name="action",
            shape=(4,),
            names=("dx", "dy", "dz", "gripper"),
            units=("5cm", "5cm", "5cm", "1"),
            low=(-1.0,) * 4,
            high=(1.0,) * 4,
            frame="world",
            reference="delta",
            gripper="open_is_1",
        ),
    )


Expert = Callable[[np.ndarray, np.ndarray, float], tuple[np.ndarray, float]]
"""Observation, goal and opening [m] -> where the gripper goes [m] and what the fingers do."""
CUBE = 0.05
"""Width of the object [m]."""
FINGERS = 0.012
"""From the middle of closed fingers to their side [m]."""


def reach(seen: np.ndarray, goal: np.ndarray, opening: float) -> tuple[np.ndarray, float]:
    """Straight to the goal."""
    return goal, -1.0


def pick_and_place(seen: np.ndarray, goal: np.ndarray, opening: float) -> tuple[np.ndarray, float]:
    """Over the cube with open fingers, down, close, carry; decided from what is, so what falls is fetched again."""
    grip, cube = seen[:3], seen[3:6]
    off = np.abs(cube - grip)
    around = off[:2].max() < 0.012 and off[2] < 0.012
    if around and opening < CUBE + 0.004:  # between closed fingers: carry
        return grip + (goal - cube), -1.0
    if around:
        return cube, -1.0
    if off[:2].max() < 0.012 or (off[:2].max() < 0.02 and off[2] < 0.03):
        return cube, 1.0
    return cube + np.array([0.0, 0.0, 0.06]), 1.0


def push(seen: np.ndarray, goal: np.ndarray, opening: float) -> tuple[np.ndarray, float]:
    """Behind the cube, seen from the goal, then through it."""
    grip, cube = seen[:3], seen[3:6]
    way = goal[:2] - cube[:2]
    length = float(np.linalg.norm(way))
    if length < 0.03:
        return grip, -1.0
    way = way / length
    apart, low = grip[:2] - cube[:2], cube[2]
    along, beside = float(apart @ way), float(apart @ np.array([-way[1], way[0]]))
    if along < -CUBE / 2 and abs(beside) < 0.025 and grip[2] < low + 0.03:  # behind it and low: through it
        contact = cube[:2] - way * (CUBE / 2 + FINGERS)
        return np.array([*(contact + way * min(0.35 * length, 0.03)), low]), -1.0
    behind = cube[:2] - way * (CUBE / 2 + FINGERS + 0.035)
    if np.linalg.norm(grip[:2] - behind) < 0.02:
        return np.array([*behind, low]), -1.0
    if along > -CUBE / 2 and np.linalg.norm(apart) < 0.09 and grip[2] < low + 0.06:  # beside or before it: up first
        return np.array([*grip[:2], low + 0.1]), -1.0
    return np.array([*behind, low + 0.09]), -1.0


EXPERTS: dict[str, Expert] = {"reach": reach, "push": push, "pick_and_place": pick_and_place}
