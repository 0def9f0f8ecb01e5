"""LIBERO (Liu et al. 2023, hf-libero): a Panda arm and household things, 130 tasks in five suites.

The published protocol (OpenVLA, openpi, LeRobot): the suite's 50 fixed initial states a task, ten steps of waiting for
things to settle, 20 Hz, LeRobot's limit of steps a suite, success as soon as the goal holds; the state is the gripper's
position, axis-angle and fingers, pictures are ``agentview`` and ``robot0_eye_in_hand``, turned by half a turn from
robosuite's bottom-up rows, which leaves left and right exchanged.

Scenes and meshes are not in the wheel. They come from ``lerobot/libero-assets`` on Hugging Face, or with a checkout of
LIBERO's repository (``libero/libero/assets``); the adapter takes their folder and never downloads by itself.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError, NotFoundError, did_you_mean
from ...identity import digest
from ...spec import EmbodimentSpec, FeatureSpec
from ..demonstrations import Disturbable
from .base import Outcome, SuiteEnv, SuiteTask, camera_features, require_suite
from .cameras import SuiteCameras

CAMERAS = ("agentview", "robot0_eye_in_hand", "frontview", "birdview", "sideview")
MAX_STEPS = {"libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Limits of LeRobot's evaluation [steps]; other evaluations cut the first suite off at 220."""
WAIT = 10
"""Steps without motion at the beginning, as published."""
STILL = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
ASSETS = "LIBERO_ASSETS"
"""Environment variable that names the folder of scenes and meshes."""
_ALONE = threading.RLock()
"""What LIBERO does by global variables is done by one thread at a time."""
COLLISIONS = 0
"""Group of geoms that robosuite collides by and does not draw."""


class LiberoEnv(SuiteEnv):
    """One task of LIBERO.

    Args:
        suite: One of `MAX_STEPS`.
        task: Its number in the suite, or its name.
        cameras: Camera -> edge of its picture [px].
        assets: Folder of scenes and meshes; null for the environment variable ``LIBERO_ASSETS``, or the wheel's.
        mesh_cell: Detail of meshes in pictures [m]; 0 draws every face.
        images, render_mode, render_size: As of `SuiteEnv`.
    """

    def __init__(
        self,
        *,
        suite: str,
        task: int | str,
        cameras: Mapping[str, int],
        assets: str | None = None,
        mesh_cell: float = 0.004,
        images: bool = True,
        render_mode: str | None = None,
        render_size: int = 256,
    ) -> None:
        require_suite("libero", "hf-libero")
        if suite not in MAX_STEPS:
            raise ConfigError(f"LIBERO has no suite {suite!r}. {did_you_mean(suite, MAX_STEPS)}")
        prepare(assets)
        which = _task(suite, task)
        super().__init__(
            task=SuiteTask(name=which.name, max_steps=MAX_STEPS[suite]),
            spec=embodiment(cameras),
            images=images,
            render_mode=render_mode,
            render_size=render_size,
        )
        self.language, self.mesh_cell = str(which.language), mesh_cell
        with _ALONE:
            self.env = _make(which)
            self.states = _initial_states(which)
        self.cameras: SuiteCameras | None = None
        self._seen: dict[str, np.ndarray] = {}

    @property
    def disturbable(self) -> Disturbable:
        """Steps of the gripper; its fingers close by 1 and open by -1."""
        unit = np.array([0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0])
        return Disturbable(unit=unit, absolute=False, opened=-1.0, closed=1.0)

    def begin(self, seed: int) -> str:
        """The initial state of number `seed`, in turn."""
        with _ALONE:  # where fixtures stand is drawn from NumPy's global generator
            self.env.seed(seed)
            self.env.reset()
        self.cameras = None  # a reset builds another model
        self.env.set_init_state(self.states[seed % len(self.states)])
        for _ in range(WAIT):
            self._seen, _, _, _ = self.env.step(STILL)
        return self.language

    def advance(self, action: np.ndarray) -> Outcome:
        """One step of the suite: 50 ms."""
        self._seen, reward, _, _ = self.env.step(action.astype(np.float64))
        return Outcome(success=bool(self.env.check_success()), reward=float(reward))

    def read_state(self) -> np.ndarray:
        """Position [m], axis-angle [rad] and fingers [m] of the gripper."""
        from robosuite.utils.transform_utils import quat2axisangle

        turned = quat2axisangle(self._seen["robot0_eef_quat"].copy())
        return np.concatenate([self._seen["robot0_eef_pos"], turned, self._seen["robot0_gripper_qpos"]])

    def pictures(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """What cameras see, left and right exchanged, as in the published data."""
        sim = self.env.sim
        if self.cameras is None:
            model = getattr(sim.model, "_model", sim.model)
            self.cameras = SuiteCameras(
                model, mesh_cell=self.mesh_cell, sites=False, mirrored=CAMERAS, hidden=(COLLISIONS,)
            )
        return self.cameras.pictures(getattr(sim.data, "_data", sim.data), sizes)

    def other_instruction(self, rng: np.random.Generator) -> str:
        """The instruction of another task of LIBERO."""
        others = sorted({one.language for one in _all_tasks() if one.language != self.language})
        return str(others[int(rng.integers(len(others)))])

    def close(self) -> None:
        """Close the suite's environment."""
        self.env.close()


def embodiment(cameras: Mapping[str, Any]) -> EmbodimentSpec:
    """LIBERO's Panda arm: the gripper moves and turns by deltas; 20 steps a second.

    For the environment, and for data that was recorded elsewhere. Arguments as of `LiberoEnv`.
    """
    way = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
    return EmbodimentSpec(
        name="panda_libero",
        robot="panda",
        control_hz=20.0,
        cameras=camera_features(cameras, CAMERAS),
        state=FeatureSpec(
            name="state",
            shape=(8,),
            names=("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right"),
            units=("m", "m", "m", "rad", "rad", "rad", "m", "m"),
            frame="world",
            rotation="axis_angle",
        ),
        action=FeatureSpec(
            name="action",
            shape=(7,),
            names=way,
            units=("1",) * 7,
            low=(-1.0,) * 7,
            high=(1.0,) * 7,
            frame="world",
            reference="delta",
            rotation="axis_angle",
            gripper="closed_is_1",
        ),
    )


def suite(
    *,
    suite: str,
    cameras: Mapping[str, int],
    assets: str | None = None,
    mesh_cell: float = 0.004,
    images: bool = True,
) -> dict[str, Callable[..., LiberoEnv]]:
    """Factories of a suite's tasks, by task name; the arguments are `LiberoEnv`'s."""
    require_suite("libero", "hf-libero")
    if suite not in MAX_STEPS:
        raise ConfigError(f"LIBERO has no suite {suite!r}. {did_you_mean(suite, MAX_STEPS)}")
    prepare(assets)
    made: dict[str, Any] = {"suite": suite, "cameras": dict(cameras), "assets": assets}
    made |= {"mesh_cell": mesh_cell, "images": images}
    return {task.name: partial(LiberoEnv, task=task.name, **made) for task in _tasks(suite)}


def prepare(assets: str | None) -> None:
    """Tell LIBERO where its files are, before it is imported: else it asks at the keyboard, and downloads.

    Raises:
        NotFoundError: There are no scenes and meshes.
    """
    from importlib.util import find_spec

    found = find_spec("libero")
    root = Path(next(iter(found.submodule_search_locations or ()))) / "libero" if found else Path()
    folder = Path(assets or os.environ.get(ASSETS) or root / "assets")
    if not (folder / "scenes").is_dir():
        raise NotFoundError(
            f"LIBERO's scenes and meshes are not in {folder}: they are not in the wheel. Get them once (a checkout of "
            "LIBERO has them in libero/libero/assets; on Hugging Face they are lerobot/libero-assets), then set "
            f"{ASSETS}=FOLDER, or type env.assets=FOLDER (suite.assets, protocol.suite.assets)"
        )
    home = Path(tempfile.gettempdir()) / f"brachium-libero-{os.getuid()}-{digest(root, length=8)}"
    home.mkdir(mode=0o700, exist_ok=True)
    if home.stat().st_uid != os.getuid():
        raise ConfigError(f"{home} belongs to somebody else; set LIBERO_CONFIG_PATH to a folder of your own")
    config = Path(os.environ.setdefault("LIBERO_CONFIG_PATH", str(home))) / "config.yaml"
    if not config.exists():
        lines = {
            "benchmark_root": root,
            "bddl_files": root / "bddl_files",
            "init_states": root / "init_files",
            "datasets": root.parent / "datasets",
            "assets": root / "assets",  # not asked for: the folder is set below
        }
        temporary = config.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        temporary.write_text("".join(f"{key}: {path}\n" for key, path in lines.items()))
        temporary.replace(config)
    import libero.libero

    libero.libero._assets_path_cache = str(folder)


def _tasks(suite: str) -> list[Any]:
    from libero.libero import benchmark

    with _ALONE, contextlib.redirect_stdout(io.StringIO()):  # it announces the order of its tasks each time
        return list(benchmark.get_benchmark_dict()[suite]().tasks)


def _all_tasks() -> list[Any]:
    return [task for name in MAX_STEPS for task in _tasks(name)]


def _task(suite: str, task: int | str) -> Any:
    tasks = _tasks(suite)
    if isinstance(task, int):
        if not 0 <= task < len(tasks):
            raise ConfigError(f"{suite}: expected a task from 0 to {len(tasks) - 1}, got {task}")
        return tasks[task]
    named = {one.name: one for one in tasks}
    if task not in named:
        raise ConfigError(f"{suite} has no task {task!r}. {did_you_mean(task, named)}")
    return named[task]


def _make(task: Any) -> Any:
    """The suite's environment without pictures of its own."""
    from libero.libero import get_libero_path
    from libero.libero.envs.env_wrapper import ControlEnv

    return ControlEnv(
        bddl_file_name=str(Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file),
        use_camera_obs=False,
        has_renderer=False,
        has_offscreen_renderer=False,
    )


def _initial_states(task: Any) -> np.ndarray:
    """The task's fixed initial states (50, n)."""
    import torch
    from libero.libero import get_libero_path

    path = Path(get_libero_path("init_states")) / task.problem_folder / task.init_states_file
    with torch.serialization.safe_globals(_numpy_globals()):
        return np.asarray(torch.load(path, weights_only=True))


def _numpy_globals() -> list[Any]:
    """What an array in a file of torch is made of; nothing else is let in."""
    from numpy._core import multiarray

    made: Any = multiarray._reconstruct
    return [(made, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, type(np.dtype(np.float64))]
