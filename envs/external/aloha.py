"""ALOHA in simulation (Zhao et al. 2023, gym-aloha): two ViperX arms, 14 joint targets at 50 Hz.

The published protocol: 400 steps, success when the suite's reward is 4 (the other arm holds the cube in the air; the
peg is in the socket). The suite draws three pictures of 640 x 480 px with shadows at every step; here its task runs
without them and our renderer draws what is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import ConfigError, did_you_mean
from ...spec import EmbodimentSpec, FeatureSpec
from ..demonstrations import Disturbable
from .base import Outcome, SuiteEnv, SuiteTask, camera_features, require_suite
from .cameras import SuiteCameras

CAMERAS = ("top", "angle", "front_close", "left_pillar", "right_pillar", "left_wrist", "right_wrist")
INSTRUCTIONS = {
    "transfer_cube": "Pick up the cube with the right arm and hand it over to the left arm",
    "insertion": "Insert the peg into the socket",
}
MAX_STEPS = 400
WON = 4
"""The suite's reward for the whole task."""
UNSTABLE = "the simulation became unstable"
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
ELEMENTS = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in JOINTS)
GRIPPERS = (6, 13)


class AlohaEnv(SuiteEnv):
    """One task of ALOHA.

    Args:
        task: One of `INSTRUCTIONS`.
        cameras: Camera -> edge, or height and width, of its picture [px].
        zoom: Camera -> how much nearer it looks: 1.6 shows the middle 62 % of the suite's picture.
        mesh_cell: Detail of the robots' meshes in pictures [m]; 0 draws every face.
        images, render_mode, render_size: As of `SuiteEnv`.
    """

    def __init__(
        self,
        *,
        task: str,
        cameras: Mapping[str, Any],
        zoom: Mapping[str, float] | None = None,
        mesh_cell: float = 0.006,
        images: bool = True,
        render_mode: str | None = None,
        render_size: int = 256,
    ) -> None:
        require_suite("gym_aloha", "gym-aloha")
        if task not in INSTRUCTIONS:
            raise ConfigError(f"ALOHA has no task {task!r}. {did_you_mean(task, INSTRUCTIONS)}")
        super().__init__(
            task=SuiteTask(name=task, max_steps=MAX_STEPS),
            spec=embodiment(cameras, zoom),
            images=images,
            render_mode=render_mode,
            render_size=render_size,
        )
        self.env: Any = _make(task)
        self.physics = self.env.physics
        self.model, self.data = self.physics.model.ptr, self.physics.data.ptr
        self.cameras = SuiteCameras(self.model, mesh_cell=mesh_cell, zoom=zoom)
        self._state: np.ndarray = np.zeros(len(ELEMENTS), np.float32)
        self._expert: Any = None

    @property
    def disturbable(self) -> Disturbable:
        """Angles of the arms [rad]; both grippers open by 1 and close by 0."""
        unit = np.full(len(ELEMENTS), 0.05)
        unit[list(GRIPPERS)] = 0.0
        return Disturbable(unit=unit, absolute=True, grippers=GRIPPERS, opened=1.0, closed=0.0)

    def begin(self, seed: int) -> str:
        """Things are placed by the suite's own draw of this seed."""
        self.env.task.seed = seed
        self._read(self.env.reset())
        self.cameras.refresh()
        if self._expert is not None:
            self._expert.reset()
        return INSTRUCTIONS[self.task.name]

    def advance(self, action: np.ndarray) -> Outcome:
        """One step of the suite: 20 ms."""
        from dm_control.rl.control import PhysicsError

        try:
            step = self.env.step(action.astype(np.float64))
        except PhysicsError:  # hands that were driven through the table
            return Outcome(success=False, failure=UNSTABLE)
        self._read(step)
        return Outcome(success=step.reward == WON, reward=float(step.reward))

    def read_state(self) -> np.ndarray:
        """Joint angles [rad] and openings (1 is open), left arm first."""
        return self._state

    def pictures(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """What cameras see."""
        return self.cameras.pictures(self.data, sizes)

    def expert_action(self) -> np.ndarray:
        """What our scripted expert would do."""
        if self.task.name != "transfer_cube":
            return super().expert_action()
        if self._expert is None:
            from .aloha_expert import TransferCubeExpert

            self._expert = TransferCubeExpert(self.model)
        found: np.ndarray = self._expert(self.data)
        return found

    def _read(self, step: Any) -> None:
        self._state = np.asarray(step.observation["qpos"], np.float32)


def embodiment(cameras: Mapping[str, Any], zoom: Mapping[str, float] | None = None) -> EmbodimentSpec:
    """Two ViperX 300s arms by absolute joint angles; 50 steps a second.

    For the environment, and for data that was recorded elsewhere. Arguments as of `AlohaEnv`.
    """
    units = tuple("1" if k in GRIPPERS else "rad" for k in range(len(ELEMENTS)))
    arm = ((-3.14158, 3.14158), (-1.85005, 1.25664), (-1.76278, 1.6057), (-3.14158, 3.14158), (-1.8675, 2.23402))
    limits = (*arm, (-3.14158, 3.14158), (0.0, 1.0)) * 2
    common: dict[str, Any] = {"names": ELEMENTS, "units": units, "rotation": "joint", "gripper": "open_is_1"}
    return EmbodimentSpec(
        name="aloha",
        robot="viperx_300s_pair",
        control_hz=50.0,
        cameras=camera_features(cameras, CAMERAS, zoom),
        state=FeatureSpec(name="state", shape=(len(ELEMENTS),), **common),
        action=FeatureSpec(
            name="action",
            shape=(len(ELEMENTS),),
            low=tuple(low for low, _ in limits),
            high=tuple(high for _, high in limits),
            **common,
        ),
    )


def _make(name: str) -> Any:
    """The suite's task in dm_control, without its pictures and without its global variable for where things are."""
    from dm_control import mujoco
    from dm_control.rl import control
    from gym_aloha.constants import ASSETS_DIR, DT, START_ARM_POSE
    from gym_aloha.tasks import sim
    from gym_aloha.utils import sample_box_pose, sample_insertion_pose

    theirs = {"transfer_cube": sim.TransferCubeTask, "insertion": sim.InsertionTask}[name]
    file = {"transfer_cube": "bimanual_viperx_transfer_cube.xml", "insertion": "bimanual_viperx_insertion.xml"}[name]

    class Blind(theirs):  # type: ignore[misc, valid-type]
        seed = 0

        def initialize_episode(self, physics: Any) -> None:
            drawn = sample_box_pose(self.seed) if name == "transfer_cube" else sample_insertion_pose(self.seed)
            things = np.concatenate(np.atleast_2d(drawn)) if name == "insertion" else drawn
            with physics.reset_context():
                physics.named.data.qpos[:16] = START_ARM_POSE
                np.copyto(physics.data.ctrl, START_ARM_POSE)
                physics.named.data.qpos[-len(things) :] = things

        def get_observation(self, physics: Any) -> dict[str, np.ndarray]:
            return {"qpos": self.get_qpos(physics)}

    physics = mujoco.Physics.from_xml_path(str(ASSETS_DIR / file))
    return control.Environment(
        physics, Blind(), time_limit=float("inf"), control_timestep=DT, n_sub_steps=None, flat_observation=False
    )
