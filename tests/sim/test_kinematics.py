"""Forward and inverse kinematics against MuJoCo, published link parameters, and geometry by hand."""

import mujoco
import numpy as np
import pytest

from brachium.envs.tasks.base import HIGH, LOW
from brachium.sim.kinematics import ArmKinematics
from brachium.sim.simulation import DOWN

ARMS = ("arm6_ee", "arm7_ee")


@pytest.fixture(params=ARMS)
def robot(request, make_arm):
    return make_arm(request.param).robot


def limits(robot):
    model = mujoco.MjModel.from_xml_path(str(robot.path))
    return np.array([model.joint(name).range for name in robot.joints])


def random_joints(robot, rng, spread=np.inf):
    low, high = limits(robot).T
    home = np.asarray(robot.home)
    return rng.uniform(np.maximum(low, home - spread), np.minimum(high, home + spread))


def turn_between(a, b):
    """Angle between two orientations [rad]."""
    return 2.0 * np.arccos(np.clip(abs(a @ b), 0.0, 1.0))


def test_forward_kinematics_is_the_site_pose_of_mujoco(robot):
    model = mujoco.MjModel.from_xml_path(str(robot.path))
    data, kinematics, rng = mujoco.MjData(model), ArmKinematics(robot), np.random.default_rng(0)
    for _ in range(50):
        joints = random_joints(robot, rng)
        for name, angle in zip(robot.joints, joints):
            data.joint(name).qpos[0] = angle
        mujoco.mj_forward(model, data)
        position, quat = kinematics.pose(joints)
        np.testing.assert_allclose(position, data.site(robot.site).xpos, atol=1e-12)
        matrix = np.zeros(9)
        mujoco.mju_quat2Mat(matrix, quat)
        np.testing.assert_allclose(matrix, data.site(robot.site).xmat, atol=1e-9)


def test_arm7_has_the_published_link_parameters(make_arm):
    """Modified Denavit-Hartenberg table of the Franka arm, then its flange and our hand."""
    a = (0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088)
    d = (0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0)
    alpha = np.array([0, -1, 1, 1, -1, 1, 1]) * np.pi / 2

    def turn_x(t):
        return np.array([[1, 0, 0, 0], [0, np.cos(t), -np.sin(t), 0], [0, np.sin(t), np.cos(t), 0], [0, 0, 0, 1]])

    def turn_z(t):
        return np.array([[np.cos(t), -np.sin(t), 0, 0], [np.sin(t), np.cos(t), 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])

    def shift(x, z):
        matrix = np.eye(4)
        matrix[0, 3], matrix[2, 3] = x, z
        return matrix

    robot, rng = make_arm("arm7_ee").robot, np.random.default_rng(1)
    kinematics = ArmKinematics(robot)
    for _ in range(50):
        joints = random_joints(robot, rng)
        pose = shift(-0.1, 0.0)  # the base stands behind the origin
        for k in range(7):
            pose = pose @ turn_x(alpha[k]) @ shift(a[k], 0.0) @ turn_z(joints[k]) @ shift(0.0, d[k])
        pose = pose @ shift(0.0, 0.107) @ turn_z(-np.pi / 4) @ shift(0.0, 0.115)  # flange, hand, finger tips
        position, quat = kinematics.pose(joints)
        matrix = np.zeros(9)
        mujoco.mju_quat2Mat(matrix, quat)
        np.testing.assert_allclose(position, pose[:3, 3], atol=1e-6)
        np.testing.assert_allclose(matrix.reshape(3, 3), pose[:3, :3], atol=1e-6)


def test_arm6_without_forearm_roll_is_a_planar_chain(make_arm):
    robot, rng = make_arm("arm6_ee").robot, np.random.default_rng(2)
    kinematics = ArmKinematics(robot)
    for _ in range(50):
        joints = random_joints(robot, rng)
        joints[3] = 0.0
        waist, shoulder, elbow, _, wrist, _ = joints
        angles = np.cumsum([shoulder, elbow, wrist])
        lengths = np.array([0.30, 0.28, 0.15])
        out, up = lengths @ np.sin(angles), 0.15 + lengths @ np.cos(angles)
        expected = [out * np.cos(waist), out * np.sin(waist), up]
        np.testing.assert_allclose(kinematics.pose(joints)[0], expected, atol=1e-9)


def test_inverse_kinematics_reaches_what_can_be_reached(robot):
    solver, check, rng = ArmKinematics(robot, iterations=60), ArmKinematics(robot), np.random.default_rng(3)
    low, high = limits(robot).T
    for _ in range(150):
        position, quat = check.pose(random_joints(robot, rng, spread=0.8))
        found = solver.solve(position, quat, np.asarray(robot.home))
        reached, orientation = check.pose(found)
        assert np.linalg.norm(reached - position) < 1e-3
        assert turn_between(orientation, quat) < 1e-2
        assert np.all(found >= low - 1e-6)
        assert np.all(found <= high + 1e-6)


def test_the_tool_points_down_everywhere_that_things_stand(robot):
    solver = ArmKinematics(robot, iterations=60)
    for x in np.linspace(LOW[0], HIGH[0], 5):
        for y in np.linspace(LOW[1], HIGH[1], 5):
            for z in (0.014, 0.10, 0.16):
                position, quat = solver.pose(solver.solve(np.array([x, y, z]), DOWN, np.asarray(robot.home)))
                assert np.linalg.norm(position - [x, y, z]) < 1e-3, (x, y, z)
                assert turn_between(quat, DOWN) < 1e-2, (x, y, z)


@pytest.mark.parametrize("target", [(2.0, 0.0, 0.3), (0.3, -1.5, 0.1), (0.05, 0.0, 0.02), (0.0, 0.0, 3.0)])
def test_out_of_reach_comes_no_worse_and_stays_within_the_limits(robot, target):
    kinematics = ArmKinematics(robot)
    low, high = limits(robot).T
    joints, target = np.asarray(robot.home), np.array(target)

    def distance(q):  # what is minimised: metres, and a fifth of the angle
        position, quat = kinematics.pose(q)
        return np.hypot(np.linalg.norm(position - target), 0.2 * turn_between(quat, DOWN))

    first = before = distance(joints)
    for _ in range(12):
        joints = kinematics.solve(target, DOWN, joints)
        assert np.all(joints >= low - 1e-6)
        assert np.all(joints <= high + 1e-6)
        assert distance(joints) <= before + 2e-3  # what mink minimises couples the two a little
        before = distance(joints)
    assert before < 0.95 * first


def test_no_jump_of_the_joints_when_a_path_leaves_the_reachable_space(robot):
    kinematics = ArmKinematics(robot)
    joints = ArmKinematics(robot, iterations=60).solve(np.array([0.3, 0.1, 0.1]), DOWN, np.asarray(robot.home))
    for x in np.arange(0.3, 1.2, 0.01):
        following = kinematics.solve(np.array([x, 0.1, 0.1]), DOWN, joints)
        assert np.abs(following - joints).max() < 0.5, x
        joints = following


def test_a_solution_depends_on_the_seed_and_the_target_only(robot):
    kinematics, rng = ArmKinematics(robot), np.random.default_rng(4)
    arguments = np.array([0.35, -0.1, 0.08]), DOWN, np.asarray(robot.home)
    fresh = kinematics.solve(*arguments)
    for _ in range(5):
        kinematics.solve(rng.uniform(-1, 1, 3), DOWN, random_joints(robot, rng))
    np.testing.assert_array_equal(kinematics.solve(*arguments), fresh)
