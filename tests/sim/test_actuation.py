"""Control modes: limits, the way from a pose to an action and on to actuator targets, and bad actions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.errors import SpecMismatchError
from brachium.sim.actuation import EndEffectorDelta, JointPosition
from brachium.sim.kinematics import ArmKinematics
from brachium.sim.simulation import DOWN

EMBODIMENTS = ("arm6_ee", "arm7_ee", "arm6_joint", "arm7_joint")
COORDINATE = st.floats(-3.0, 3.0)


@pytest.fixture(params=EMBODIMENTS)
def arm(request, make_arm):
    return make_arm(request.param)


@pytest.fixture(scope="module")
def drivers(make_arm):
    """A driver of each embodiment, made once; tests reset it."""
    return {name: make_arm(name).control.driver(make_arm(name).robot) for name in EMBODIMENTS}


def turn_between(a, b):
    return 2.0 * np.arccos(np.clip(abs(a @ b), 0.0, 1.0))


@pytest.mark.parametrize("name", EMBODIMENTS)
@settings(max_examples=40, deadline=None)
@given(position=st.tuples(COORDINATE, COORDINATE, COORDINATE), gripper=st.sampled_from([0.0, 0.4, 1.0]))
def test_an_encoded_action_is_within_the_limits_of_its_spec(drivers, make_arm, name, position, gripper):
    arm, driver = make_arm(name), drivers[name]
    driver.reset(np.asarray(arm.robot.home))
    action = driver.encode(np.array(position), DOWN, gripper)
    spec = arm.spec.action
    assert action.shape == spec.shape
    assert action.dtype == np.float32
    assert np.all(action >= np.asarray(spec.low) - 1e-5)
    assert np.all(action <= np.asarray(spec.high) + 1e-5)
    assert action[-1] == np.float32(gripper)


def test_following_encoded_actions_leads_to_the_pose(arm):
    """Without physics: the arm is where it was told to be."""
    driver, kinematics = arm.control.driver(arm.robot), ArmKinematics(arm.robot)
    joints, rng = np.asarray(arm.robot.home), np.random.default_rng(0)
    driver.reset(joints)
    for _ in range(4):
        target = rng.uniform([0.26, -0.15, 0.03], [0.44, 0.15, 0.2])
        distance = np.linalg.norm(kinematics.pose(joints)[0] - target)
        for _ in range(25):
            joints = driver.command(driver.encode(target, DOWN, 1.0), joints)[:-1]
            now = np.linalg.norm(kinematics.pose(joints)[0] - target)
            assert now < distance + 2e-3
            distance = now
        assert distance < 2e-3
        assert turn_between(kinematics.pose(joints)[1], DOWN) < 0.02


def test_a_far_target_is_approached_on_a_straight_line(make_arm):
    arm = make_arm("arm6_ee")
    driver = arm.control.driver(arm.robot)
    wanted = np.array([0.2, -0.1, -0.15])
    action = driver.encode(driver.position + wanted, DOWN, 1.0)
    np.testing.assert_allclose(action[:3] / np.linalg.norm(action[:3]), wanted / np.linalg.norm(wanted), atol=1e-6)
    assert np.abs(action[:3]).max() == pytest.approx(arm.control.max_step)


@settings(max_examples=40, deadline=None)
@given(action=st.lists(st.floats(-50.0, 50.0), min_size=7, max_size=7))
def test_end_effector_commands_keep_step_box_and_leash(drivers, make_arm, action):
    arm, driver = make_arm("arm6_ee"), drivers["arm6_ee"]
    mode, joints = arm.control, np.asarray(arm.robot.home)
    driver.reset(joints)
    measured, _ = driver.kinematics.pose(joints)
    for _ in range(4):  # the arm does not move: the command must not run away from it
        before, orientation = driver.position.copy(), driver.quat.copy()
        targets = driver.command(np.array(action), joints)
        assert np.all(np.abs(driver.position - before) <= mode.max_step + 1e-9)
        assert np.all(np.abs(driver.position - measured) <= mode.leash + 1e-9)
        assert np.all(driver.position >= mode.low - 1e-9)
        assert np.all(driver.position <= mode.high + 1e-9)
        assert turn_between(driver.quat, orientation) <= np.sqrt(3.0) * mode.max_turn + 1e-6
        assert 0.0 <= targets[-1] <= arm.robot.gripper_stroke


@pytest.mark.parametrize("name", ["arm6_joint", "arm7_joint"])
def test_joint_commands_keep_speed_and_limits_and_do_not_wind_up(make_arm, name):
    arm = make_arm(name)
    driver, spec = arm.control.driver(arm.robot), arm.spec.action
    low, high = np.asarray(spec.low), np.asarray(spec.high)
    joints, far = np.asarray(arm.robot.home), high + 100.0
    for _ in range(60):
        targets = driver.command(far, joints)
        assert np.all(np.abs(targets[:-1] - joints) <= arm.control.max_speed + 1e-9)
        assert np.all(targets[:-1] <= high[:-1] + 1e-9)
        assert 0.0 <= targets[-1] <= arm.robot.gripper_stroke
        joints = targets[:-1]
    np.testing.assert_allclose(joints, high[:-1])
    back = driver.command(np.append(low[:-1], 0.0), joints)  # obeyed at once
    np.testing.assert_allclose(joints - back[:-1], np.minimum(arm.control.max_speed, (high - low)[:-1]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_and_changes_nothing(arm, bad):
    driver, joints = arm.control.driver(arm.robot), np.asarray(arm.robot.home)
    good = driver.encode(np.array([0.3, 0.05, 0.1]), DOWN, 1.0)
    wrong = good.copy()
    wrong[1] = bad
    with pytest.raises(SpecMismatchError, match="finite"):
        driver.command(wrong, joints)
    np.testing.assert_array_equal(driver.command(good, joints), arm.control.driver(arm.robot).command(good, joints))


@pytest.mark.parametrize("shape", [(), (3,), (1, 7), (8, 1), (0,)])
def test_a_wrong_shape_is_refused_with_both_shapes(arm, shape):
    driver = arm.control.driver(arm.robot)
    with pytest.raises(SpecMismatchError) as error:
        driver.command(np.zeros(shape), np.asarray(arm.robot.home))
    assert str(arm.spec.action.shape) in str(error.value)
    assert str(shape) in str(error.value)


def test_the_disturbance_leaves_gripper_and_uprightness_alone(arm):
    scale = arm.control.disturbance(arm.robot)
    assert scale.shape == arm.spec.action.shape
    assert scale[-1] == 0.0
    assert np.all(scale >= 0.0)
    assert np.any(scale > 0.0)
    if arm.spec.action.rotation == "axis_angle":
        assert not np.any(scale[3:6])


def test_disturbances_of_both_modes_move_the_tool_about_as_far(make_arm):
    """One standard deviation of joint noise moves the tool by centimetres, as that of end-effector noise does."""
    rng = np.random.default_rng(0)
    for robot in ("arm6", "arm7"):
        ee, joint = make_arm(f"{robot}_ee"), make_arm(f"{robot}_joint")
        reference = np.sqrt(3.0) * EndEffectorDelta().max_step
        kinematics, home = ArmKinematics(ee.robot), np.asarray(ee.robot.home)
        scale = JointPosition().disturbance(joint.robot)[:-1]
        moved = [
            np.linalg.norm(kinematics.pose(home + rng.normal(0, 1, len(home)) * scale)[0] - kinematics.pose(home)[0])
            for _ in range(300)
        ]
        assert 0.4 * reference < np.sqrt(np.mean(np.square(moved))) < 2.0 * reference
