"""The driver for ROS 2 against a stand-in of rosbridge, judged by the journal of what reached its controllers."""

import contextlib
import os
import pickle
import re
import signal
import sys
import time

import numpy as np
import pytest

from brachium.errors import RobotError
from brachium.policies.executor import RecedingHorizon
from brachium.real_robot.body import body_of
from brachium.real_robot.controller import Controller
from brachium.real_robot.drivers.ros2 import Ros2, RosLink
from brachium.real_robot.eyes import Freshness
from brachium.real_robot.inference import Inference
from brachium.real_robot.pacing import Timing
from brachium.real_robot.ros_messages import RosCamera, command
from brachium.real_robot.safety.guard import Rules, SafetyGuard

from .test_controller import WavePolicy, embodiment
from .test_motion import assert_within

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # children must find it by the same name

from fake_rosbridge import CONTROLLER_ORDER, POLICY_ORDER, FakeRosbridge

HZ, COMMAND_HZ = 50.0, 100.0
PATIENCE_S = 0.5
"""More than on a robot: other tests run beside these, and what is tested is not this machine."""
GRIPPER = {"joint": "finger", "closed": 0.0, "open": 0.08}
OWN_GRIPPER = {**GRIPPER, "command": "forward_position_controller", "command_topic": "/gripper_controller/commands"}
COLOR = {"topic": "/camera/color/compressed", "type": "compressed", "height": 32, "width": 32}
FORWARD = {"command": "forward_position_controller", "command_joints": CONTROLLER_ORDER}
OPTIONS = {
    "joints": POLICY_ORDER,
    "low": [-2.0] * 3,
    "high": [2.0] * 3,
    "velocity": 1.0,
    "acceleration": 5.0,
    "jerk": 100.0,
    "state_age_s": PATIENCE_S,
    "watchdog_s": 2 * PATIENCE_S,
    "command_hz": COMMAND_HZ,
    "timeout_s": 4.0,
}


@pytest.fixture(scope="module")
def server():
    found = FakeRosbridge()
    yield found
    found.close()


@pytest.fixture
def fake(server):
    server.ask("reset")
    return server


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def ros2(address="ws://127.0.0.1:9090", **options):
    return Ros2(address=address, **{**OPTIONS, "gripper": OWN_GRIPPER, **FORWARD, **options})


@contextlib.contextmanager
def linked(fake, **options):
    """The link in this process: what it makes of a server needs no other one."""
    link = ros2(fake.address, **{"timeout_s": 4.0, **options})._link()
    try:
        link.open()
        yield link
    finally:
        if link._bridge is not None:
            link._bridge.close()


def run(robot, seconds=1.0, between=None, at=0.4):
    """A run of the controller; `between` is done `at` seconds after the first tick. Returns it and what was sent."""
    spec = embodiment(robot)
    policy = WavePolicy(spec)
    guard = SafetyGuard(robot.spec, 1 / HZ, rules=Rules(reading_age_s=0.9))
    inference, sent, began, did = Inference(policy), [], [], []
    apply = robot.apply
    robot.apply = lambda position: (sent.append(position.copy()), apply(position))
    controller = Controller(
        robot,
        body_of(robot, robot.spec, spec),
        inference,
        RecedingHorizon(policy, execute_horizon=2),
        guard,
        timing=Timing(control_hz=HZ, hold_s=1.5, first_s=5.0, silent_s=2.0, realtime=False),
        freshness=Freshness(age_s=0.9, skew_s=0.9, frozen_s=5.0),
    )

    def done():
        began.append(time.monotonic())
        if between is not None and not did and began[-1] - began[0] > at:
            did.append(True)
            between()
        return ""

    try:
        return controller.run("wave", seconds=seconds, done=done), np.array(sent), guard
    finally:
        inference.close()
        robot.apply = apply


def commands(journal, topic="forward_position_controller/commands"):
    """Positions of the arm (n, 3) in the policy's order, and when they came (n,), as the controller took them."""
    mine = [(at, [named[name] for name in POLICY_ORDER]) for at, where, named in journal if where == f"/{topic}"]
    return np.array([values for _, values in mine]).reshape(-1, 3), np.array([at for at, _ in mine])


def assert_were_sent(received, sent, share=0.5):
    """Each command that was received is one that the safety layer made, in order; few were skipped."""
    place = -1
    for row in received:
        later = np.flatnonzero((np.abs(sent[place + 1 :, : len(row)] - row) < 1e-9).all(1))
        assert len(later), f"{row} was never sent"
        place += 1 + int(later[0])
    assert len(received) > share * len(sent)


# -- before anything moves -------------------------------------------------------------------------------------------


def test_the_spec_is_known_before_connecting():
    robot = ros2(cameras={"front": COLOR})
    assert robot.spec.axes.names == (*POLICY_ORDER, "gripper")
    assert robot.spec.axes.units == ("rad", "rad", "rad", "1")
    assert robot.spec.camera_names == ("front",)
    assert robot.spec.velocity == (1.0, 1.0, 1.0, 4.0)
    assert len(robot.spec.describe()) == 4
    with pytest.raises(RobotError, match="not connected"):
        robot.read()
    robot.halt("nobody there")
    robot.disconnect()


def test_the_yaml_of_the_docs(root):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    text = (root / "docs" / "robots.md").read_text()
    robot = instantiate(OmegaConf.create(re.findall(r"my_arm.yaml -->\n```yaml\n(.*?)```", text, re.DOTALL)[0]))
    assert robot.spec.axes.names[-2:] == ("elbow_joint", "gripper")
    assert {camera.name: camera.shape for camera in robot.spec.cameras} == dict.fromkeys(
        ("front", "wrist"), (224, 224, 3)
    )
    assert pickle.loads(pickle.dumps(robot._link)).args[0].controllers == robot._link.args[0].controllers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"joints": ["a", "a", "b"]}, "each joint once"),
        ({"low": [0.0]}, "expected 4 low"),
        ({"velocity": 0.0}, "velocity limits above 0"),
        ({"command": "velocity_controller"}, "expected command to be one of"),
        ({"command_joints": ["shoulder", "elbow"]}, "command_joints: expected"),
        ({"command_topic": "commands"}, "full name of a topic"),
        ({"time_from_start_s": 0.0}, "time_from_start_s above 0"),
        ({"gripper": {**GRIPPER, "open": 0.0}}, "closed and open to differ"),
        ({"gripper": {**GRIPPER, "command": "forward_position_controller"}}, "command and command_topic"),
        ({"cameras": {"front": {**COLOR, "type": "h264"}}}, "expected type to be one of"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(Exception, match=message):
        ros2(**options)


@pytest.mark.parametrize(
    ("faults", "options", "message"),
    [
        ({"services": "fail"}, {"controller_manager": None}, "does not exist.*verify: false"),
        ({"services": "silent"}, {}, "no answer within 1 s.*verify: false"),
        ({}, {"state_topic": "/robot/joint_states"}, "expected a topic /robot/joint_states.*there are /joint_states"),
        ({"types": {"/joint_states": "std_msgs/msg/String"}}, {}, "expected sensor_msgs/msg/JointState, got std_msgs"),
        ({"types": {"/camera/color/compressed": "x/msg/Y"}}, {"cameras": {"front": COLOR}}, "got x/msg/Y"),
        ({"deaf": ("/forward_position_controller/commands",)}, {}, "nobody listens to"),
        ({"others": ("/teach_pendant",)}, {}, "/teach_pendant publishes to"),
        ({"inactive": "forward_position_controller"}, {}, "is inactive.*switch_controllers --activate"),
        ({"interface": "velocity"}, {}, "expected it to command positions, got elbow/velocity"),
        ({}, {"command_joints": None}, "moves joints elbow, wrist, shoulder; expected shoulder, .*set command_joints"),
        ({}, {"command_topic": "/arm/commands"}, "expected a controller arm, got forward_"),
        ({}, {"joints": ["shoulder", "elbow", "wrist_2"], "verify": False, "command_joints": None}, "expected joints"),
        ({"without": "wrist"}, {}, "expected joints wrist within 1 s; it names camera_tilt"),
        ({"mute": True}, {}, "nothing came: is the robot's driver running"),
        ({"null": "elbow"}, {}, "the position of joint elbow is not finite"),
        ({"blind": True}, {"cameras": {"front": COLOR}}, "camera front: no picture .*: no message came"),
        ({"bad_jpeg": True}, {"cameras": {"front": COLOR}}, "camera front: no picture .*JPEG that cannot be read"),
        ({"bad_jpeg": True, "garbage": True}, {"cameras": {"front": COLOR}}, "raise max_message_size"),
    ],
)
def test_what_is_not_as_expected_is_said_and_nothing_is_sent(fake, faults, options, message):
    fake.faults(**faults)
    with pytest.raises(RobotError, match=message), linked(fake, timeout_s=1.0, **options):
        pass
    assert fake.ask()["journal"] == []


def test_without_rosapi_it_can_be_connected_to_on_demand(fake):
    fake.faults(services="silent")
    with linked(fake, verify=False) as link:
        np.testing.assert_allclose(link.read().position, [0.1, 0.1, 0.1, 0.5], atol=1e-6)


def test_nobody_there_is_one_clear_line():
    robot = ros2("ws://127.0.0.1:9", timeout_s=1.0)
    with pytest.raises(
        RobotError, match=r"no rosbridge at ws://127\.0\.0\.1:9 .*On the robot type: ros2 launch"
    ) as caught:
        robot.connect()
    assert "\n" not in str(caught.value)
    assert robot.process_id is None
    with pytest.raises(RobotError, match="expected an address such as"):
        RosLink(ros2("somewhere:9090")._link.args[0]).open()


# -- what comes in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [
        {},
        {"reverse": True},
        {"skew_s": 3600.0},
        {"unstamped": True},
        {"empty_velocity": True},
        {"garbage": True},
        {"max_message_size": 200},
    ],
    ids=lambda faults: next(iter(faults), "well"),
)
def test_joints_are_found_by_name_whatever_the_stamps_and_pieces(fake, faults):
    fake.faults(**faults)
    fake.ask("at", {"shoulder": 0.3, "elbow": -0.2, "wrist": 1.1, "finger": 0.02, "camera_tilt": 9.0})
    with linked(fake) as link:
        first = link.read()
        np.testing.assert_allclose(first.position, [0.3, -0.2, 1.1, 0.25], atol=1e-6)
        np.testing.assert_allclose(first.velocity, 0.0, atol=0.05)
        assert until(lambda: link.read().timestamp > first.timestamp)
        assert time.monotonic() - link.read().timestamp < PATIENCE_S
        assert link.read().fault == ""


@pytest.mark.parametrize("max_message_size", [10**7, 1500])
@pytest.mark.parametrize("kind", ["compressed", "raw"])
def test_pictures_come_in_their_colours(fake, kind, max_message_size):
    fake.faults(max_message_size=max_message_size)
    topic = {"compressed": "/camera/color/compressed", "raw": "/camera/raw"}[kind]
    with linked(fake, cameras={"front": {**COLOR, "topic": topic, "type": kind, "delay_s": 0.05}}) as link:
        first = link.read().frames["front"]
        assert first.image.shape == (32, 32, 3)
        assert 0.05 <= time.monotonic() - first.timestamp < PATIENCE_S
        left, right = first.image[-8:, :6].mean((0, 1)), first.image[-8:, -6:].mean((0, 1))
        np.testing.assert_allclose(left, [200, 0, 0], atol=12)
        np.testing.assert_allclose(right, [0, 0, 200], atol=12)
        assert until(lambda: link.read().frames["front"].timestamp > first.timestamp)


def test_other_encodings():
    import base64

    import imageio.v3 as iio

    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    camera = RosCamera(topic="/x", type="raw", height=4, width=6)
    alpha = np.concatenate([image, image[:, :, :1]], 2)
    grey = image[:, :, :1]
    for encoding, rows, expected in (
        ("rgb8", image, image),
        ("rgba8", alpha, image),
        ("bgra8", alpha, image[:, :, ::-1]),
        ("mono8", grey, np.repeat(grey, 3, 2)),
    ):
        data = base64.b64encode(np.ascontiguousarray(rows).tobytes()).decode()
        message = {"height": 4, "width": 6, "step": 6 * rows.shape[2], "encoding": encoding, "data": data}
        np.testing.assert_array_equal(camera.frame(message, 0.0).image, expected)
        with pytest.raises(RobotError, match="expected 4 rows"):
            camera.frame({**message, "data": data[:-4]}, 0.0)
    for wrong, why in (
        ({"encoding": "16UC1"}, "expected an encoding"),
        ({"data": [1]}, "base64"),
        ({"data": "é"}, "."),
    ):
        with pytest.raises((RobotError, ValueError), match=why):
            camera.frame({**message, **wrong}, 0.0)
    png = {"format": "png", "data": base64.b64encode(iio.imwrite("<bytes>", image, extension=".png")).decode()}
    packed = RosCamera(topic="/x", type="compressed", height=4, width=6)
    np.testing.assert_array_equal(packed.frame(png, 0.0).image, image)
    with pytest.raises(RobotError, match="expected JPEG or PNG"):
        packed.frame({"format": "h264", "data": "AAAA"}, 0.0)


def test_a_trajectory_has_whole_numbers_of_time_and_no_stamp():
    message = command("joint_trajectory_controller", ["a"], np.array([1.0]), 1.05)
    assert message["header"]["stamp"] == {"sec": 0, "nanosec": 0}
    assert message["points"][0]["time_from_start"] == {"sec": 1, "nanosec": 50_000_000}


# -- a robot that is moved -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"cameras": {"front": COLOR}},
        {"command": "joint_trajectory_controller", "command_joints": None, "time_from_start_s": 0.04},
    ],
    ids=["forward", "trajectory"],
)
def test_a_run_inside_the_limits_and_then_at_rest(fake, options):
    fake.faults(garbage=True, max_message_size=400)
    robot = ros2(fake.address, **options)
    robot.connect()
    try:
        outcome, sent, guard = run(robot, 1.5, between=lambda: fake.faults(reverse=True, empty_velocity=True))
        assert outcome.ending == "time", outcome.why
        assert_within(sent, guard.limits, 1 / HZ)
        assert np.ptp(sent[:, 0]) > 0.2
        topic = "joint_trajectory_controller/joint_trajectory" if "command" in options else FORWARD_TOPIC
        assert until(lambda: np.abs(robot.read().position - sent[-1]).max() < 1e-3)
        found = fake.ask()
        received, _ = commands(found["journal"], topic)
        assert_were_sent(received, sent)
        assert found["ignored"] == []
        fingers = [named["finger"] for _, where, named in found["journal"] if where == "/gripper_controller/commands"]
        np.testing.assert_allclose(fingers[-1], 0.08 * sent[-1, 3], atol=1e-9)
        where = np.array([[position[name] for name in POLICY_ORDER] for _, position in found["path"]])
        assert np.abs(where).max() < 2.0
        child = robot.process_id
    finally:
        robot.disconnect()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    found = fake.ask()
    assert until(lambda: fake.ask()["clients"] == 0)
    np.testing.assert_allclose(commands(found["journal"], topic)[0][-1], sent[-1, :3], atol=2e-3)
    assert {position["camera_tilt"] for _, position in found["path"]} == {0.1}, "what is not ours stays"


FORWARD_TOPIC = "forward_position_controller/commands"


@pytest.mark.parametrize(
    ("faults", "why"),
    [
        ({"mute": True}, "nothing new came"),
        ({"frozen": True}, "its stamps stand still"),
        ({"null": "wrist"}, "the position of joint wrist is not finite"),
        ("drop", "connection to rosbridge is lost"),
        ("stand still", "nothing new came"),
    ],
    ids=str,
)
def test_faults_end_the_run_and_nothing_is_commanded_any_more(fake, faults, why):
    robot = ros2(fake.address)
    robot.connect()

    def between():
        if faults == "drop":
            fake.ask("drop")
        elif faults == "stand still":  # half open: nobody reads, nobody closes
            os.kill(fake.process.pid, signal.SIGSTOP)
        else:
            fake.faults(**faults)

    try:
        outcome, sent, guard = run(robot, 20.0, between)
        assert outcome.ending == "robot"
        # A command may find the child gone a moment before its last word is read: the reason then comes with `read`.
        assert why in outcome.why or ("the link is lost" in outcome.why and until(lambda: why in said(robot)))
        assert outcome.seconds < 6.0
        assert_within(sent, guard.limits, 1 / HZ)
        before = None if faults == "stand still" else len(fake.ask()["journal"])
        with contextlib.suppress(RobotError):
            assert robot.read().fault
            robot.apply(np.array([0.5, 0.5, 0.5, 0.5]))  # as no loop would: the link must refuse too
        time.sleep(0.2)
    finally:
        os.kill(fake.process.pid, signal.SIGCONT)
        robot.disconnect()
    assert robot.process_id is None
    assert until(lambda: fake.ask()["clients"] == 0), "nothing that was on its way comes later"
    journal = fake.ask()["journal"]
    received, _ = commands(journal)
    assert_were_sent(received, sent, 0.2)
    assert before is None or len(journal) == before


@pytest.mark.parametrize(
    ("faults", "why"),
    [
        ({"without": "elbow"}, "the state of joint elbow is"),
        ({"short": True}, "5 names and 4 positions"),
        ({"skew_s": -30.0}, "went back by"),
        ({"status": "publish: unknown"}, "rosbridge complains: publish: unknown"),
    ],
    ids=str,
)
def test_what_joint_states_may_not_do(fake, faults, why):
    with linked(fake) as link:
        assert link.read().fault == ""
        fake.faults(**faults)
        assert until(lambda: why in link.read().fault)


def said(robot):
    """Why the robot does not move."""
    try:
        return robot.read().fault
    except RobotError as error:
        return str(error)


def moved(fake, robot, ticks=40):
    """Move by the safety layer, towards a target that is far."""
    robot.connect()
    guard = SafetyGuard(robot.spec, 1 / HZ)
    guard.start(robot.read(), time.monotonic())
    for _ in range(ticks):
        robot.send(guard.command(np.array([1.5, 0.1, 0.1, 0.0]), robot.read(), time.monotonic()))
        time.sleep(1 / HZ)
    return guard


@pytest.mark.parametrize("how", ["halt", "watchdog", "disconnect"])
def test_a_robot_under_way_is_brought_to_rest_inside_its_limits(fake, how):
    robot = ros2(fake.address)
    guard = moved(fake, robot)
    try:
        if how == "halt":
            robot.halt("by hand")
        if how != "disconnect":
            assert until(lambda: ("halted: by hand" if how == "halt" else "watchdog") in robot.read().fault)
            assert until(lambda: np.abs(robot.read().velocity).max() < 1e-3)
    finally:
        robot.disconnect()
    assert until(lambda: fake.ask()["clients"] == 0)
    found = fake.ask()
    path, _ = commands(found["journal"])
    last = np.flatnonzero((np.abs(path - guard.motion.position[:3]) < 1e-9).all(1))[0]
    braking = path[last:]
    assert len(braking) >= 4
    speed = np.diff(braking, axis=0) * COMMAND_HZ
    assert (np.abs(speed) <= guard.limits.velocity[:3] * 1.01).all()
    assert (np.abs(np.diff(speed, axis=0)) * COMMAND_HZ <= guard.limits.acceleration[:3] * 1.01).all()
    np.testing.assert_allclose(speed[-1], 0.0, atol=0.02)
    fingers = [named["finger"] for _, where, named in found["journal"] if where == "/gripper_controller/commands"]
    assert fingers[-1] == pytest.approx(0.08 * guard.motion.position[-1], abs=1e-6), "a gripper goes on holding"
    time.sleep(0.3)
    final = fake.ask()["position"]
    np.testing.assert_allclose([final[name] for name in POLICY_ORDER], braking[-1], atol=1e-3)


def test_a_robot_that_is_connected_and_never_moved_is_sent_nothing(fake):
    robot = ros2(fake.address)
    robot.connect()
    robot.halt("why not")
    assert until(lambda: robot.read().fault)
    robot.disconnect()
    assert fake.ask()["journal"] == []
