"""Forward and inverse kinematics of an arm, on a model of the robot alone. Inverse kinematics is mink's."""

from __future__ import annotations

import mink
import mujoco
import numpy as np

from .robot import RobotModel
from .world import robot_model


class ArmKinematics:
    """Joint angles from tool poses and back.

    Differential inverse kinematics: quadratic programs over joint velocities (mink), iterated until the pose error
    is small. One object a world: it keeps scratch data and is not thread-safe.
    """

    def __init__(
        self,
        robot: RobotModel,
        *,
        iterations: int = 4,
        position_tolerance: float = 5e-4,
        rotation_tolerance: float = 5e-3,
    ) -> None:
        self.robot = robot
        self.model = robot_model(robot)
        self.configuration = mink.Configuration(self.model)
        self._qpos = np.array([self.model.joint(j).qposadr[0] for j in robot.joints])
        self._site = self.model.site(robot.site).id
        self._task = mink.FrameTask(
            robot.site, "site", position_cost=1.0, orientation_cost=0.2, lm_damping=1e-6, gain=1.0
        )
        self._posture = mink.PostureTask(self.model, cost=1e-4)
        self._limits = [mink.ConfigurationLimit(self.model)]
        self._iterations = iterations
        self._position_tolerance, self._rotation_tolerance = position_tolerance, rotation_tolerance
        home = self.model.qpos0.copy()
        home[self._qpos] = robot.home
        self._posture.set_target(home)

    def pose(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tool position (3,) [m] and quaternion wxyz (4,) in the base frame at joint angles [rad]."""
        self._set(joints)
        data = self.configuration.data
        quat = np.zeros(4)
        mujoco.mju_mat2Quat(quat, data.site_xmat[self._site])
        return data.site_xpos[self._site].copy(), quat

    def solve(self, position: np.ndarray, quat: np.ndarray, seed: np.ndarray) -> np.ndarray:
        """Joint angles [rad] that bring the tool to `position` [m] and `quat` (wxyz), starting from `seed`.

        Out of reach, or where full Newton steps do not converge, a pose is returned that is nearer than the seed's, and
        no nearer one lies close by; joint limits hold in any case. Position counts five times as much as rotation.
        """
        self._set(seed)
        target = mink.SE3.from_rotation_and_translation(mink.SO3(np.asarray(quat, float)), np.asarray(position, float))
        self._task.set_target(target)
        for _ in range(self._iterations):
            if self._arrived():
                break
            self.configuration.integrate_inplace(self._velocity(1e-8), 1.0)
        if not self._arrived():
            self._set(seed)
            self._descend(max(16, self._iterations))
        return self.configuration.q[self._qpos].copy()

    def _velocity(self, damping: float) -> np.ndarray:
        return mink.solve_ik(
            self.configuration, [self._task, self._posture], 1.0, "daqp", damping=damping, limits=self._limits
        )

    def _arrived(self) -> bool:
        error = self._task.compute_error(self.configuration)
        close = np.linalg.norm(error[:3]) < self._position_tolerance
        return bool(close and np.linalg.norm(error[3:]) < self._rotation_tolerance)

    def _cost(self) -> float:
        return float(np.linalg.norm(self._task.compute_error(self.configuration) * self._task.cost))

    def _descend(self, iterations: int) -> None:
        """Damped steps within a trust radius [rad], each of which brings the tool nearer to the target.

        Newton's full steps overshoot at joint limits and stretched arms; a policy may well ask for such poses.
        """
        radius, cost = 0.3, self._cost()
        for _ in range(iterations):
            if radius < 1e-3 or self._arrived():
                break
            q, velocity = self.configuration.q.copy(), self._velocity(1e-5)
            longest = float(np.abs(velocity).max())
            self.configuration.integrate_inplace(velocity, min(1.0, radius / max(longest, 1e-9)))
            nearer = self._cost()
            if nearer < cost:
                cost, radius = nearer, min(2.0 * radius, 1.0)
            else:
                self.configuration.update(q)
                radius *= 0.4

    def _set(self, joints: np.ndarray) -> None:
        q = self.configuration.q.copy()
        q[self._qpos] = joints
        self.configuration.update(q)
