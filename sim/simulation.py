"""One running world: a model, its data, a driver for the arm, cameras, and the positions of things."""

from __future__ import annotations

from collections.abc import Mapping

import mujoco
import numpy as np

from ..errors import SpecMismatchError
from ..spec import DETAIL
from .camera import project, thread_renderer
from .embodiment import SimEmbodiment
from .kinematics import ArmKinematics
from .scene import FIXED_KINDS, Scene
from .world import build_model

DOWN = np.array([0.0, 1.0, 0.0, 0.0])
"""Tool quaternion (wxyz) that points straight down with the hand's x axis forward."""


class Simulation:
    """A scene with a robot in it, advanced one action at a time.

    Args:
        embodiment: Robot, control mode, cameras, rate.
        timestep: Physics step [s], changed a little where a control period is no multiple of it.
    """

    def __init__(self, embodiment: SimEmbodiment, *, timestep: float = 0.004) -> None:
        self.embodiment = embodiment
        self.driver = embodiment.control.driver(embodiment.robot)
        self.substeps = max(1, round(1.0 / (embodiment.control_hz * timestep)))
        self._timestep = 1.0 / (embodiment.control_hz * self.substeps)  # whole physics steps fill a control period
        self._start = ArmKinematics(embodiment.robot, iterations=60)
        self.scene = Scene()
        self.load(self.scene)

    def load(self, scene: Scene, tool_position: np.ndarray | None = None, gripper: float = 1.0) -> None:
        """Build the scene and put the tool at `tool_position` [m], pointing down (home when None)."""
        robot = self.embodiment.robot
        self.scene = scene
        self.model = build_model(robot, scene, self._timestep)
        self.data = mujoco.MjData(self.model)
        self._qpos = np.array([self.model.joint(j).qposadr[0] for j in robot.joints])
        self._actuators = np.array([self.model.actuator(n).id for n in (*robot.joints, robot.gripper)])
        self._gripper_qpos = self.model.joint(robot.gripper_joint).qposadr[0]
        self._site = self.model.site(robot.site).id
        joints = np.asarray(robot.home, float)
        if tool_position is not None:
            joints = self._start.solve(tool_position, DOWN, joints)
        self.data.qpos[self._qpos] = joints
        for name in ("finger_left", "finger_right"):
            self.data.joint(name).qpos[0] = gripper * robot.gripper_stroke
        self.data.ctrl[self._actuators] = np.append(joints, gripper * robot.gripper_stroke)
        mujoco.mj_forward(self.model, self.data)
        self.driver.reset(joints)

    def settle(self) -> None:
        """Recompute positions after the state was written by hand."""
        mujoco.mj_forward(self.model, self.data)

    def step(self, action: np.ndarray) -> None:
        """Apply one action for one control period."""
        self.data.ctrl[self._actuators] = self.driver.command(action, self.data.qpos[self._qpos])
        mujoco.mj_step(self.model, self.data, nstep=self.substeps)

    @property
    def time(self) -> float:
        """Simulated time [s]."""
        return float(self.data.time)

    @property
    def tool_position(self) -> np.ndarray:
        """Tool centre point (3,) [m]."""
        return self.data.site_xpos[self._site].copy()

    @property
    def gripper_opening(self) -> float:
        """Measured opening, 0 closed to 1 open."""
        return float(self.data.qpos[self._gripper_qpos] / self.embodiment.robot.gripper_stroke)

    @property
    def state(self) -> np.ndarray:
        """Proprioception as in the embodiment's spec: float32 (s,)."""
        matrix = self.data.site_xmat[self._site].reshape(3, 3)
        return np.concatenate(
            [
                self.data.site_xpos[self._site],
                matrix[:, 0],
                matrix[:, 1],
                [self.gripper_opening],
                self.data.qpos[self._qpos],
            ]
        ).astype(np.float32)

    def position(self, name: str) -> np.ndarray:
        """Centre of an item (3,) [m]; of a drawer, its handle."""
        if self.kind(name) == "drawer":
            return self.data.site("drawer_handle").xpos.copy()
        position = self.data.body(name).xpos.copy()
        if self.kind(name) in FIXED_KINDS:
            position[2] += next(i for i in self.scene.items if i.name == name).height
        return position

    def kind(self, name: str) -> str:
        """Kind of an item."""
        for item in self.scene.items:
            if item.name == name:
                return item.kind
        raise SpecMismatchError(f"no item {name!r} in the scene; it has {[i.name for i in self.scene.items]}")

    def upright(self, name: str) -> bool:
        """Whether a free object stands within 25 degrees of upright."""
        return bool(abs(self.data.body(name).xmat[8]) > 0.906)

    def speed(self, name: str) -> float:
        """Speed of a free object [m/s]."""
        address = self.model.joint(name).dofadr[0]
        return float(np.linalg.norm(self.data.qvel[address : address + 3]))

    @property
    def drawer_opening(self) -> float:
        """How far the drawer is out [m]."""
        return float(self.data.joint("drawer").qpos[0])

    def images(self) -> dict[str, np.ndarray]:
        """Render every camera of the embodiment: uint8 (height, width, 3)."""
        size = self.embodiment.image_size
        outputs = {name: np.empty((size, size, 3), np.uint8) for name in self.embodiment.cameras}
        return thread_renderer(size, size).render(self.model, self.data, outputs)

    def details(self, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Render some cameras in more detail (`detail_feature`); sizes are of the camera's name [px]."""
        outputs = {name: np.empty((size, size, 3), np.uint8) for name, size in sizes.items()}
        if not outputs:
            return {}
        most = max(sizes.values())
        found = thread_renderer(most, most).render(self.model, self.data, outputs)
        return {name + DETAIL: image for name, image in found.items()}

    def masks(self) -> dict[str, np.ndarray]:
        """What each camera of the embodiment sees: int32 (height, width), index of the scene's item, -1 for none."""
        size = self.embodiment.image_size
        outputs = {name: np.empty((size, size), np.int32) for name in self.embodiment.cameras}
        thread_renderer(size, size).segment(self.model, self.data, outputs)
        item_of = np.full(self.model.nbody, -1, np.int32)
        for index, item in enumerate(self.scene.items):
            item_of[self.model.body(item.name).id] = index
        roots = self.model.body_rootid[self.model.geom_bodyid]  # items stand in the world: each is a root of its own
        owner = np.append(item_of[roots], np.int32(-1))  # the last is for pixels that show no geom
        return {name: owner[ids] for name, ids in outputs.items()}

    def picture(self, camera: str, size: int) -> np.ndarray:
        """Render one camera at another size, for people to look at: uint8 (size, size, 3)."""
        outputs = {camera: np.empty((size, size, 3), np.uint8)}
        return thread_renderer(size, size).render(self.model, self.data, outputs)[camera]

    def project(self, names: tuple[str, ...]) -> np.ndarray:
        """Where items are: float32 (k, 3 + 3 n), each row (x, y, z [m], then u, v in 0..1 and depth [m] a camera)."""
        points = np.array([self.position(name) for name in names]).reshape(-1, 3)
        parts = [points]
        parts += [project(self.model, self.data, camera, points) for camera in self.embodiment.cameras]
        return np.concatenate(parts, axis=1).astype(np.float32)
