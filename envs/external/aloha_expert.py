"""A scripted expert for ALOHA's cube transfer: the right arm picks the cube up, the left one takes it in the air.

It decides from what is, not from how far it has come, so it goes on after a disturbance and fetches a cube that fell.
Where the hands meet and how they are turned is as in the scripted policy of ALOHA (Zhao et al. 2023).
"""

from __future__ import annotations

from typing import Any

import mink
import mujoco
import numpy as np

from .aloha import GRIPPERS

PINCH = 0.135
"""From a gripper's link to between its fingertips, along its first axis [m]."""
MEET = np.array([0.0, 0.5, 0.27])
"""Where the cube is handed over [m]."""
WAIT = 0.12
"""How far before that the left hand waits [m]."""
ABOVE = 0.09
"""How far before the cube the right hand takes aim [m]."""
STEP, TURN = 0.006, 0.05
"""Longest step of a hand [m], [rad]."""
LAG = 0.06
"""How far ahead of itself a hand is sent at most [m]."""
LEVEL = 0.03
"""Cost of a forearm's roll. Where the wrist is straight, half a turn of the forearm and of the wrist undo each other:
left alone, hands pick up either way, and a policy of absolute joint angles learns neither."""
HELD = 0.78
"""Opening below which fingers with the cube between them hold it."""


class TransferCubeExpert:
    """Joint targets from the state of the simulation.

    Args:
        model: The suite's.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        self.model = model
        self.configuration = mink.Configuration(model)
        self.tasks = {
            side: mink.FrameTask(f"vx300s_{side}/gripper_link", "body", 1.0, 0.15, lm_damping=1e-4)
            for side in ("left", "right")
        }
        self.limits = [mink.ConfigurationLimit(model)]
        self.joints = {
            side: np.array([int(model.joint(name).qposadr[0]) for name in _names(side)]) for side in ("left", "right")
        }
        costs = np.full(model.nv, 1e-3)
        self.rolls = np.array([int(model.joint(f"vx300s_{side}/forearm_roll").qposadr[0]) for side in self.joints])
        costs[[int(model.joint(f"vx300s_{side}/forearm_roll").dofadr[0]) for side in self.joints]] = LEVEL
        self.posture = mink.PostureTask(model, cost=costs)
        self.fingers = {side: int(model.joint(f"vx300s_{side}/left_finger").qposadr[0]) for side in ("left", "right")}
        self.box = int(model.joint("red_box_joint").qposadr[0])
        down = np.deg2rad(-60.0)
        self.turned = {
            "right": _about(1, down) @ np.diag([-1.0, -1.0, 1.0]),
            "left": _about(0, np.pi / 2),
        }
        self.reset()

    def reset(self) -> None:
        """Begin an episode."""
        self.hands: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.asked: dict[str, np.ndarray] = {}

    def __call__(self, data: mujoco.MjData) -> np.ndarray:
        """The action (14,) for the present state."""
        cube = data.qpos[self.box : self.box + 3].copy()
        right, left = self._pinch(data, "right"), self._pinch(data, "left")
        opening = {side: self._opening(data, side) for side in ("left", "right")}
        near = np.linalg.norm(cube - right) < 0.03
        holds = near and opening["right"] < HELD
        action = np.zeros(14)
        goal_left, hand_left = MEET - np.array([WAIT, 0.0, 0.0]), 1.0
        if holds:
            goal_right, hand_right = right + (MEET - cube), 0.0
            if np.linalg.norm(cube - MEET) < 0.025:  # it is there: come and take it
                aligned = np.linalg.norm((left - cube)[1:]) < 0.015
                beside = left[0] > cube[0] - 0.06
                before = np.array([cube[0] - WAIT, cube[1], cube[2]])
                goal_left = cube if aligned or beside else before
                if np.linalg.norm(left - cube) < 0.02:
                    hand_left = 0.0
        else:
            axis = self.turned["right"][:, 0]
            goal_right, hand_right = cube - axis * ABOVE, 1.0
            away = right - cube
            beside = np.linalg.norm(away - axis * (away @ axis))
            if beside < 0.012 or (np.linalg.norm(away) < 0.05 and beside < 0.02):
                goal_right = cube
            if np.linalg.norm(away) < 0.012 or (near and opening["right"] < 0.9):
                hand_right = 0.0
        targets = {"right": goal_right, "left": goal_left}
        joints = self._solve(data, targets)
        action[0:6], action[7:13] = joints["left"], joints["right"]
        action[GRIPPERS[0]], action[GRIPPERS[1]] = hand_left, hand_right
        return action.astype(np.float32)

    def _solve(self, data: mujoco.MjData, goals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Joint angles one step towards where the fingertips shall be."""
        q = data.qpos.copy()
        for side, where in self.joints.items():
            q[where] = self.asked.get(side, q[where])
        self.configuration.update(q)
        for side, goal in goals.items():
            place, rotation = self._hand(data, side)
            turn = mink.SO3.from_matrix(self.turned[side] @ rotation.T).log()
            rotation = mink.SO3.exp(_at_most(turn, TURN)).as_matrix() @ rotation
            place = place + _at_most(goal - place, STEP)
            self.hands[side] = (place, rotation)
            target: Any = mink.SE3.from_rotation_and_translation(
                mink.SO3.from_matrix(rotation), place - rotation[:, 0] * PINCH
            )
            self.tasks[side].set_target(target)
        usual = q.copy()
        usual[self.rolls] = 0.0
        self.posture.set_target(usual)
        for _ in range(3):
            velocity = mink.solve_ik(
                self.configuration, [*self.tasks.values(), self.posture], 1.0, "daqp", damping=1e-6, limits=self.limits
            )
            self.configuration.integrate_inplace(velocity, 1.0)
        self.asked = {side: self.configuration.q[where].copy() for side, where in self.joints.items()}
        return {side: self.asked[side] + self._behind(data, side) for side in self.joints}

    def _hand(self, data: mujoco.MjData, side: str) -> tuple[np.ndarray, np.ndarray]:
        """Where a hand was sent last, and how turned: servos lag, and what is asked of them must not jump back. Where
        the hand is, when it is far from there: something has held it up."""
        now = self._pinch(data, side)
        place, rotation = self.hands.get(side, (now, data.body(f"vx300s_{side}/gripper_link").xmat.reshape(3, 3)))
        return now + _at_most(place - now, LAG), rotation

    def _behind(self, data: mujoco.MjData, side: str) -> np.ndarray:
        """How far gravity pulls each joint below what is commanded [rad]: torque by the servo's stiffness."""
        first = 0 if side == "left" else 8
        stiffness = self.model.actuator_gainprm[first : first + 6, 0]
        dof = self.model.jnt_dofadr[[self.model.joint(j).id for j in _names(side)]]
        found: np.ndarray = data.qfrc_bias[dof] / stiffness
        return found

    def _pinch(self, data: mujoco.MjData, side: str) -> np.ndarray:
        body = data.body(f"vx300s_{side}/gripper_link")
        found: np.ndarray = body.xpos + body.xmat.reshape(3, 3)[:, 0] * PINCH
        return found

    def _opening(self, data: mujoco.MjData, side: str) -> float:
        """0 closed, 1 open, as the suite's own observation says."""
        from gym_aloha.constants import normalize_puppet_gripper_position

        return float(normalize_puppet_gripper_position(data.qpos[self.fingers[side]]))


def _names(side: str) -> list[str]:
    names = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
    return [f"vx300s_{side}/{name}" for name in names]


def _at_most(way: np.ndarray, length: float) -> np.ndarray:
    """A vector, no longer than a length."""
    found: np.ndarray = way * min(1.0, length / max(float(np.linalg.norm(way)), 1e-9))
    return found


def _about(axis: int, angle: float) -> np.ndarray:
    """The rotation by an angle [rad] about x, y or z."""
    found: np.ndarray = mink.SO3.exp(np.eye(3)[axis] * angle).as_matrix()
    return found
