"""The driver of Universal Robots arms against a stand-in for their controller, judged by what the stand-in received."""

import contextlib
import importlib.util
import os
import re
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest

from brachium.errors import ConfigError, RobotError
from brachium.policies.executor import RecedingHorizon
from brachium.real_robot.body import body_of
from brachium.real_robot.cameras import OpenCVCamera
from brachium.real_robot.controller import Controller
from brachium.real_robot.drivers import ur_rtde
from brachium.real_robot.drivers.ur_rtde import FULL_TURN, JOINTS, ControllerClock, URRtde, probe
from brachium.real_robot.eyes import Freshness
from brachium.real_robot.inference import Inference
from brachium.real_robot.pacing import Timing
from brachium.real_robot.safety.guard import Rules, SafetyGuard
from brachium.real_robot.safety.zones import model_check
from brachium.sim.robot import RobotModel
from brachium.spec import ActionChunk, EmbodimentSpec, FeatureSpec

from .fake_ur import PLAYING, SERVO_STOP, STOP_SCRIPT, STOPPED, FakeURProcess
from .test_motion import assert_within

HZ = 50.0
START = (0.0, -1.57, 1.57, -1.57, -1.57, 0.0)
PATIENT = {"silent_s": 0.4, "watchdog_s": 0.6}
"""Several times the driver's own: other tests run beside these."""

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("rtde_control") is None or sys.platform != "linux",
    reason="ur_rtde is not installed (there are wheels for Python 3.12 on x86-64), or 127.0.0.2 is not this computer",
)


@pytest.fixture
def host(request):
    """An address of its own for each test: the controller's ports are fixed."""
    number = sum(map(ord, request.node.name))
    return f"127.{20 + os.getpid() % 200}.{number // 200 % 200}.{2 + number % 200}"


@pytest.fixture
def controller(host, request):
    with FakeURProcess(host=host, **getattr(request, "param", {})) as found:
        yield found


@pytest.fixture
def robot(host, controller):
    found = URRtde(host=host, **PATIENT)
    found.connect()
    yield found
    found.disconnect()


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


class Sway:
    """Absolute targets: all joints on a slow wave round where they start."""

    noise_dim, takes_guidance, action_horizon, begin = 6, True, 10, None

    def __init__(self, spec):
        self.embodiment = spec

    def predict(self, observations, noise, guidance=None):
        now = observations[0].timestamp
        self.begin = now if self.begin is None else self.begin
        t = now - self.begin + (np.arange(10) + 1) / self.embodiment.control_hz
        rows = np.array(START) + 0.3 * np.sin(1.5 * t)[:, None] * np.array([1, -1, 1, -1, 1, -1])
        return ActionChunk(actions=rows[None].astype(np.float32), control_hz=self.embodiment.control_hz)


def run(robot, seconds=1.0, *, between=None, at=0.3):
    """A run of the real loop; `between` is done `at` seconds after the first tick. Also returns every command."""
    axes = {"shape": (6,), "names": JOINTS, "units": ("rad",) * 6}
    spec = EmbodimentSpec(
        name="ur",
        robot="ur",
        control_hz=10.0,
        cameras=(),
        state=FeatureSpec(name="state", **axes),
        action=FeatureSpec(name="action", **axes),
    )
    policy = Sway(spec)
    guard = SafetyGuard(robot.spec, 1 / HZ, rules=Rules(reading_age_s=0.9))
    inference = Inference(policy)
    loop = Controller(
        robot,
        body_of(robot, robot.spec, spec),
        inference,
        RecedingHorizon(policy, execute_horizon=2),
        guard,
        timing=Timing(control_hz=HZ, hold_s=2.0, silent_s=1.0, realtime=False),
        freshness=Freshness(age_s=0.9),
    )
    sent, began, did, apply = [], [], [], robot.apply
    robot.apply = lambda position: (sent.append(position), apply(position))

    def done():
        began.append(time.monotonic())
        if between is not None and not did and began[-1] - began[0] > at:
            did.append(True)
            between()
        return ""

    outcome = loop.run("sway", seconds=seconds, done=done)
    robot.apply = apply
    inference.close()
    return outcome, guard, np.array(sent)


def assert_journal_within(journal, sent, limits):
    """What the controller received is what was commanded, in order; some may be left out, and all are within limits."""
    assert_within(sent, limits, 1 / HZ)
    received = np.array([row[1] for row in journal])
    assert len(received) > 5
    assert (received >= limits.low).all()
    assert (received <= limits.high).all()
    last = -1
    for row in received:
        after = np.flatnonzero((sent[last + 1 :] == row).all(1))
        assert len(after), "a target that nobody commanded, or twice"
        if last >= 0:
            ticks = after[0] + 1
            assert (np.abs(row - sent[last]) <= limits.velocity * ticks / HZ + 1e-6).all()
        last += 1 + after[0]


# -- without the package -----------------------------------------------------------------------------------------------


def test_the_spec_is_known_before_connecting():
    side = OpenCVCamera(device="/dev/video97", height=24, width=32)
    robot = URRtde(host="nowhere.invalid", velocity=[1.0] * 3 + [2.0] * 3, cameras={"side": side})
    assert robot.spec.axes.names == JOINTS
    assert robot.spec.velocity == (1.0, 1.0, 1.0, 2.0, 2.0, 2.0)
    assert robot.spec.cameras[0].shape == (24, 32, 3)
    assert robot.spec.watchdog_s == 0.2
    assert not robot.spec.has_gripper
    assert "rtde_control" not in sys.modules
    with pytest.raises(RobotError, match="not connected"):
        robot.read()
    robot.halt("nobody there")
    robot.disconnect()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": [-7.0] * 6}, "within"),
        ({"low": [1.0] * 6, "high": [0.0] * 6}, "low limits below"),
        ({"velocity": [1.0] * 5}, "velocity limit for each of 6"),
        ({"lookahead_s": 0.5}, "lookahead_s from 0.03 to 0.2"),
        ({"gain": 50}, "gain from 100 to 2000"),
        ({"rate_hz": 1000.0}, "rate_hz"),
        ({"silent_s": 0.3}, "silent_s below watchdog_s"),
        ({"gripper": "2f85"}, "no gripper axis yet"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(RobotError, match=message):
        URRtde(host="nowhere.invalid", **options)


def test_the_config_gives_an_arm_whose_elbow_stays_within_half_a_turn():
    from brachium.cli.compose import load

    robot = load("robot/ur_rtde", "host=nowhere.invalid")
    assert robot.spec.limits.high[2] == 3.1415
    assert robot.spec.limits.high[0] == FULL_TURN
    assert robot.spec.velocity == (1.05,) * 6


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rtde_control", None)
    link = URRtde(host="nowhere.invalid")._link()
    with pytest.raises(RobotError, match=r"uv pip install 'brachium\[ur\]'"):
        link.open()


def test_ages_are_told_across_clocks():
    """Another clock that drifts, packets that take 1 to 9 ms, and then all of them 80 ms more."""
    rng, clock, errors = np.random.default_rng(0), ControllerClock(), []
    for k in range(20_000):
        measured = 5000.0 + k * 8e-3
        heard = measured + rng.uniform(1e-3, 9e-3) + (0.08 if k >= 19_000 else 0.0)
        stamp = clock.local((measured - 4000.0) * (1 + 3e-5), heard)
        assert stamp <= heard
        errors.append(stamp - measured)
    assert np.abs(errors[100:19_000]).max() < 4e-3
    assert np.abs(errors[19_000:]).max() < 8e-3, "a delay is an age, not another clock"


def test_what_is_no_controller_is_told_from_one(host, monkeypatch):
    monkeypatch.setattr(ur_rtde, "PROBE_S", 0.5)
    with pytest.raises(RobotError, match=r"no controller at .* Is it switched on and wired\?"):
        probe(host)
    with socket.create_server((host, 30004)) as server:
        with pytest.raises(RobotError, match="no answer at port 30004"):
            probe(host)
        server.settimeout(5.0)
        server.accept()[0].close()  # the one before

        def greet():
            peer = server.accept()[0]
            peer.sendall(b"SSH-2.0-OpenSSH")
            peer.recv(16)
            peer.close()

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(RobotError, match=r"expected a controller of Universal Robots .* got the answer b'SSH"):
            probe(host)
        thread.join()


ARM = """
<mujoco><compiler angle="radian" autolimits="true"/>
  <default><joint axis="0 1 0" range="-6.2832 6.2832"/><geom type="capsule"/></default>
  <worldbody><body name="shoulder_link" pos="0 0 0.163"><joint name="shoulder_pan_joint" axis="0 0 1"/>
    <geom fromto="0 0 -0.08 0 0 0" size="0.06"/>
    <body name="upper_arm_link" pos="0 0.138 0"><joint name="shoulder_lift_joint"/>
      <geom fromto="0 0 0 0.425 0 0" size="0.05"/>
      <body name="forearm_link" pos="0.425 -0.131 0"><joint name="elbow_joint"/>
        <geom fromto="0 0 0 0.392 0 0" size="0.04"/>
        <body name="wrist_1_link" pos="0.392 0 0"><joint name="wrist_1_joint"/>
          <geom fromto="0 0 0 0 0.127 0" size="0.04"/>
          <body name="wrist_2_link" pos="0 0.127 0"><joint name="wrist_2_joint" axis="0 0 -1"/>
            <geom fromto="0 0 0 0 0 -0.1" size="0.04"/>
            <body name="wrist_3_link" pos="0 0 -0.1"><joint name="wrist_3_joint"/>
              <geom fromto="0 0 0 0 0.06 0" size="0.03"/><site name="flange" pos="0 0.1 0"/>
  </body></body></body></body></body></body></worldbody></mujoco>
"""
"""Capsules along the links of a UR5e (its published lengths)."""


def test_zones_are_checked_on_a_model_without_a_gripper(tmp_path):
    (tmp_path / "ur5e.xml").write_text(ARM)
    model = RobotModel(
        name="ur5e",
        file=str(tmp_path / "ur5e.xml"),
        joints=JOINTS,
        home=START,
        gripper_stroke=0.0,
        gripper_joint="",
        site="flange",
    )
    robot = URRtde(host="nowhere.invalid", model=model)
    pole = {"name": "pole", "shape": "cylinder", "size": [0.05, 1.0], "position": [-0.5, 0.0, 0.5]}
    room = {"low": [-1.0, -1.0, 0.1], "high": [1.0, 1.0, 1.0]}
    check = model_check(robot.spec, robot.model, workspace=room, keep_out=[pole])
    assert check.check(np.array(START)) == ""
    assert "workspace from 0.1 m" in check.check(np.array([0.0, 0.3, 0.3, 0.0, 0.0, 0.0]))
    assert "pole" in check.check(np.array([3.14, -0.8, 0.8, -1.57, -1.57, 0.0]))
    assert "workspace to 1 m" in check.check(np.array([0.0, -1.57, 0.0, -1.57, -1.57, 0.0]))
    anywhere = model_check(robot.spec, robot.model)
    assert "shoulder_link would touch wrist_1_link" in anywhere.check(np.array([0.0, -1.57, 3.1, -1.57, -1.57, 0.0])), (
        "folded on itself"
    )
    assert "the table would touch" in anywhere.check(np.array([0.0, 0.3, 0.3, 0.0, 0.0, 0.0]))
    with pytest.raises(ConfigError, match="need a MuJoCo model"):
        model_check(robot.spec, None, workspace=room)


# -- with it -----------------------------------------------------------------------------------------------------------


@needs_package
def test_it_moves_as_it_is_told_and_leaves_the_arm_at_rest(robot, controller):
    child = robot.process_id
    time.sleep(1.5 * PATIENT["watchdog_s"])
    assert robot.read().fault == "", "one that nobody commands yet stays connected"
    outcome, guard, sent = run(robot, 1.2)
    assert outcome.ending == "time", outcome.why
    journal = controller.targets()
    assert_journal_within(journal, sent, guard.limits)
    assert {tuple(row[2:]) for row in journal} == {(1 / 125.0, 0.1, 300.0)}
    assert np.ptp([row[1] for row in journal], axis=0).min() > 0.1
    reading = robot.read()
    assert time.monotonic() - reading.timestamp < 0.2
    np.testing.assert_allclose(reading.position, controller.state()["position"], atol=1e-3)
    np.testing.assert_allclose(reading.position, sent[-1], atol=1e-2)
    assert controller.state()["watchdog_hz"] == pytest.approx(1 / PATIENT["watchdog_s"])
    robot.disconnect()
    robot.disconnect()
    assert until(lambda: controller.state()["clients"] == 0)
    after = controller.state()
    assert (after["moves"], after["runtime"], after["uploads"]) == ("hold", STOPPED, 1)
    words = [detail for _, what, detail in controller.events() if what == "command"]
    assert words[-2:] == [SERVO_STOP, STOP_SCRIPT]
    assert not [event for event in controller.events() if event[1] in ("bad package", "watchdog")]
    assert not is_running(child)


PAUSES, PLAYS_ON = {}, {"on_protective": "playing"}


@needs_package
@pytest.mark.parametrize(
    ("controller", "trouble", "why"),
    [
        (PAUSES, ("protective_stop",), "protective stop"),
        (PLAYS_ON, ("protective_stop",), "protective stop"),
        (PAUSES, ("emergency_stop",), "emergency stop"),
        (PAUSES, ("stop_program",), "program is stopped"),
        (PAUSES, ("cut", "close"), "connection was closed"),
        (PAUSES, ("cut", "close, open"), "closed|stopped|refused|process ended"),
        (PAUSES, ("cut", "control"), "closed|stopped|refused|process ended"),
        (PAUSES, ("cut", "silent"), "nothing came for"),
    ],
    indirect=["controller"],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_trouble_ends_the_run_and_no_command_comes_after_it(robot, controller, trouble, why):
    child = robot.process_id
    outcome, guard, sent = run(robot, 20.0, between=lambda: getattr(controller, trouble[0])(*trouble[1:]))
    assert outcome.ending == "robot", outcome.why
    assert re.search(why, outcome.why), outcome.why
    assert outcome.seconds < 5.0
    assert until(lambda: controller.state()["moves"] == "hold")
    before, targets = controller.state(), controller.targets()
    assert_journal_within(targets, sent, guard.limits)
    controller.restore() if trouble[0] == "cut" else controller.clear()  # a person puts it right, and resumes
    with contextlib.suppress(RobotError):
        robot.apply(np.array(START) + 0.2)  # as no loop would
    time.sleep(0.3)
    after = controller.state()
    np.testing.assert_allclose(after["position"], before["position"], atol=1e-9)
    assert after["moves"] == "hold"
    if trouble[1:] not in [("close, open",), ("control",)]:  # there the package may have started its program anew
        assert after["runtime"] == STOPPED
        assert after["uploads"] == 1
    if trouble[1:] != ("silent",):  # there what was under way comes late, to a program that has ended
        assert len(controller.targets()) == len(targets)
    robot.disconnect()
    assert not is_running(child)


@needs_package
def test_a_driver_that_is_killed_leaves_the_arm_to_its_controllers_watchdog(robot, controller):
    outcome, _, _ = run(robot, 20.0, between=lambda: os.kill(robot.process_id, signal.SIGKILL))
    assert outcome.ending == "robot"
    assert "its process ended" in outcome.why
    assert until(lambda: controller.state()["runtime"] == STOPPED)
    assert [event for event in controller.events() if event[1] == "watchdog"]
    assert until(lambda: controller.state()["moves"] == "hold")


@needs_package
def test_a_loop_that_goes_silent_stops_the_arm_until_it_is_connected_anew(robot, controller):
    robot.rest = lambda: None  # as if the loop had died
    run(robot, 0.3)
    assert until(lambda: "watchdog: no command" in robot.read().fault)
    assert until(lambda: controller.state()["moves"] == "hold")
    assert controller.state()["runtime"] == PLAYING, "it was stopped by the driver, not by the controller"
    assert [detail for _, what, detail in controller.events() if what == "command"][-1] == SERVO_STOP
    robot.disconnect()
    assert controller.state()["runtime"] == STOPPED
    robot.connect()
    assert robot.read().fault == ""


@needs_package
@pytest.mark.parametrize("controller", [{"remote": False}], indirect=True)
def test_an_arm_that_is_not_ready_is_left_alone_and_says_what_to_do(host, controller):
    controller.emergency_stop()
    with pytest.raises(RobotError, match=r"emergency stop \(safety mode 7\). See the pendant"):
        URRtde(host=host, **PATIENT).connect()
    controller.clear()
    with pytest.raises(RobotError, match="On the pendant, switch from Local to Remote Control"):
        URRtde(host=host, **PATIENT).connect()
    assert controller.state()["uploads"] == 0


@needs_package
def test_an_arm_that_another_program_controls_is_left_to_it(host, robot, controller):
    with pytest.raises(RobotError, match="Another program controls the robot"):
        URRtde(host=host, **PATIENT).connect()
    assert robot.read().fault == ""
    assert controller.state()["uploads"] == 1


@needs_package
def test_a_wrong_address_gives_one_line(host):
    robot = URRtde(host=host, **PATIENT)
    with pytest.raises(RobotError, match="robot 'ur': no controller at") as caught:
        robot.connect()
    assert len(str(caught.value).splitlines()) == 1
    assert robot.process_id is None
