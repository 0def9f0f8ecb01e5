"""Meta-World (Yu et al. 2019, v3): fifty tasks of a Sawyer arm, its scripted experts, LeRobot's protocol.

The protocol of the published vision-language-action figures (SmolVLA, Shukor et al. 2025, and what followed it): camera
``corner2`` at LeRobot's place, the hand's position and the gripper's opening as state, objects and goals drawn anew
each episode, 500 steps, success as soon as the suite says so. What is not as published: pictures are small, drawn
without shadows and sky by thinned meshes; by the YAMLs ``corner2`` is cropped and two cameras at the hand are added.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from ...errors import ConfigError, did_you_mean
from ...spec import EmbodimentSpec, FeatureSpec
from ..demonstrations import Disturbable
from .base import Outcome, SuiteEnv, SuiteTask, camera_features, require_suite
from .cameras import SuiteCameras

CAMERAS = ("corner", "corner2", "corner3", "topview", "behindGripper", "gripperPOV")
CORNER2 = (0.75, 0.075, 0.7)
"""Where LeRobot's data sets were recorded from with ``corner2`` [m]."""
SPLITS = ("mt10", "mt25", "mt50", *(f"ml{n}_{part}" for n in (10, 25, 45) for part in ("train", "test")))
"""Sets of tasks; MT1 is one task by its name."""
MAX_STEPS = 500


class MetaWorldEnv(SuiteEnv):
    """One task of Meta-World.

    Args:
        task: Its name, such as ``pick-place``.
        cameras: Camera -> edge of its picture [px], in the order in which a model sees them.
        zoom: Camera -> how much nearer it looks: 1.6 shows the middle 62 % of the suite's picture.
        mesh_cell: Detail of the robot's meshes in pictures [m]; 0 draws every face.
        images, render_mode, render_size: As of `SuiteEnv`.
    """

    def __init__(
        self,
        *,
        task: str,
        cameras: Mapping[str, int],
        zoom: Mapping[str, float] | None = None,
        mesh_cell: float = 0.008,
        images: bool = True,
        render_mode: str | None = None,
        render_size: int = 256,
    ) -> None:
        require_suite("metaworld", "metaworld")
        name = checked_task(task)
        super().__init__(
            task=SuiteTask(name=name, max_steps=MAX_STEPS),
            spec=sawyer_spec(camera_features(cameras, CAMERAS, zoom)),
            images=images,
            render_mode=render_mode,
            render_size=render_size,
        )
        from metaworld import Task
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        made = ALL_V3_ENVIRONMENTS[f"{name}-v3"]
        self.env: Any = made()
        told = {"env_cls": made, "rand_vec": np.zeros(0), "partially_observable": False}
        self.env.set_task(Task(env_name=f"{name}-v3", data=pickle.dumps(told)))
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True
        self.env.model.camera("corner2").pos = CORNER2
        self.cameras = SuiteCameras(self.env.model, mesh_cell=mesh_cell, turned=("corner2",), zoom=zoom)
        warnings.filterwarnings("ignore", "Constant", module="metaworld")  # its experts ask for more than a step
        self._seen = np.zeros(39)
        self._expert: Any = None

    @property
    def disturbable(self) -> Disturbable:
        """Steps of the hand; the gripper is pressed shut by 1 and open by -1."""
        return Disturbable(unit=np.array([1.0, 1.0, 1.0, 0.0]), absolute=False, opened=-1.0, closed=1.0)

    def begin(self, seed: int) -> str:
        """Objects and goal are drawn from the task's whole space."""
        self.env.seed(seed)
        self._seen, _ = self.env.reset()
        mujoco.mj_kinematics(self.env.model, self.env.data)  # the suite moves the goal after its last look
        self.cameras.refresh()
        return descriptions()[f"{self.task.name}-v3"]

    def advance(self, action: np.ndarray) -> Outcome:
        """One step of the suite: 12.5 ms."""
        self._seen, reward, _, _, info = self.env.step(action)
        return Outcome(success=bool(info["success"]), reward=float(reward))

    def read_state(self) -> np.ndarray:
        """Position of the hand [m], opening of the gripper (1 is open)."""
        found: np.ndarray = self._seen[:4]
        return found

    def pictures(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """What cameras see."""
        return self.cameras.pictures(self.env.data, sizes)

    def expert_action(self) -> np.ndarray:
        """What the suite's own scripted policy would do."""
        if self._expert is None:
            self._expert = _expert(self.task.name)
        action = np.asarray(self._expert.get_action(self._seen), np.float32)
        return np.clip(action, -1.0, 1.0)

    def other_instruction(self, rng: np.random.Generator) -> str:
        """The instruction of another task."""
        mine = descriptions()[f"{self.task.name}-v3"]
        others = sorted({text for text in descriptions().values() if text != mine})
        return others[int(rng.integers(len(others)))]


def sawyer_spec(cameras: tuple[FeatureSpec, ...]) -> EmbodimentSpec:
    """The Sawyer arm of Meta-World: the hand moves by up to 1 cm a step, upright; 80 steps a second."""
    return EmbodimentSpec(
        name="sawyer_metaworld",
        robot="sawyer",
        control_hz=80.0,
        cameras=cameras,
        state=FeatureSpec(
            name="state",
            shape=(4,),
            names=("x", "y", "z", "gripper"),
            units=("m", "m", "m", "1"),
            frame="world",
            gripper="open_is_1",
        ),
        action=FeatureSpec(
            name="action",
            shape=(4,),
            names=("dx", "dy", "dz", "gripper"),
            units=("cm", "cm", "cm", "1"),
            low=(-1.0,) * 4,
            high=(1.0,) * 4,
            frame="world",
            reference="delta",
            gripper="closed_is_1",
        ),
    )


def suite(
    *,
    tasks: str,
    cameras: Mapping[str, int],
    zoom: Mapping[str, float] | None = None,
    mesh_cell: float = 0.008,
    images: bool = True,
) -> dict[str, Callable[..., MetaWorldEnv]]:
    """Factories of a set of tasks, by task name.

    Args:
        tasks: One of `SPLITS`, or names of tasks with commas between them.
        cameras, zoom, mesh_cell, images: As of `MetaWorldEnv`.
    """
    made: dict[str, Any] = {"cameras": dict(cameras), "zoom": dict(zoom or {})}
    made |= {"mesh_cell": mesh_cell, "images": images}
    return {name: partial(MetaWorldEnv, task=name, **made) for name in task_names(tasks)}


def task_names(tasks: str) -> tuple[str, ...]:
    """Names of the tasks of a set."""
    require_suite("metaworld", "metaworld")
    from metaworld import env_dict

    which, _, part = tasks.partition("_")
    if tasks not in SPLITS:
        if re.match(r"m[lt]\d", tasks):
            raise ConfigError(f"unknown set of tasks {tasks!r}. {did_you_mean(tasks, SPLITS)}")
        return tuple(checked_task(name.strip()) for name in tasks.split(","))
    found = getattr(env_dict, f"{which.upper()}_V3")
    found = found[part] if part else found
    return tuple(name.removesuffix("-v3") for name in found)


def checked_task(name: str) -> str:
    """A task's name without its version."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    plain = name.removesuffix("-v3").replace("_", "-")
    known = [one.removesuffix("-v3") for one in ALL_V3_ENVIRONMENTS]
    if plain not in known:
        raise ConfigError(f"Meta-World has no task {name!r}. {did_you_mean(plain, known)}")
    return plain


def descriptions() -> dict[str, str]:
    """Task -> instruction, as in LeRobot's data sets and evaluations, which a published policy was trained with."""
    told: dict[str, str] = _lerobots()["TASK_DESCRIPTIONS"]
    return told


def difficulty_groups() -> dict[str, list[str]]:
    """Group -> tasks of MT50, from easy to very hard, as LeRobot's evaluation has them (Seo et al. 2023): published
    figures of vision-language-action policies are the mean of these groups' rates."""
    found: dict[str, list[str]] = _lerobots()["DIFFICULTY_TO_TASKS"]
    return {name: [task.removesuffix("-v3") for task in tasks] for name, tasks in found.items()}


@cache
def _lerobots() -> dict[str, Any]:
    """What LeRobot knows of the tasks."""
    found = importlib.util.find_spec("lerobot")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("Meta-World's instructions come with lerobot, which is missing. Type: pip install lerobot")
    path = Path(found.submodule_search_locations[0]) / "envs" / "metaworld_config.json"
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return told


def _expert(task: str) -> Any:
    """The suite's scripted policy for a task."""
    from metaworld import policies

    made: Any = policies.ENV_POLICY_MAP[f"{task}-v3"]
    return made()
