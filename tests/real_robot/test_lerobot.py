"""Robots of LeRobot: a plugin in memory with its journal, and LeRobot's own SO-101 on a stand-in for its servo bus."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from brachium.cli.compose import load
from brachium.errors import RobotError
from brachium.policies.executor import RecedingHorizon
from brachium.real_robot.body import body_of
from brachium.real_robot.controller import Controller
from brachium.real_robot.drivers.lerobot import LeRobot
from brachium.real_robot.drivers.lerobot_units import AxisMap, LeRobotAxis, normalised_scale
from brachium.real_robot.eyes import Freshness
from brachium.real_robot.inference import Inference
from brachium.real_robot.pacing import Timing
from brachium.real_robot.safety.guard import Rules, SafetyGuard
from brachium.spec import ActionChunk, EmbodimentSpec, FeatureSpec

HERE = Path(__file__).resolve().parent
HZ = 25.0
MOTION = {"velocity": 1.5, "acceleration": 10.0, "jerk": 200.0}
TURN = {"low": -1.5, "high": 1.5, **MOTION}
AXES = [
    {"name": "shoulder", "key": "shoulder.pos", "unit": "degrees", **TURN},
    {"name": "elbow", "key": "elbow.pos", "unit": "degrees", **TURN},
    {"name": "grip", "key": "gripper.pos", "unit": "percent", "gripper": True, "low": 0.0, "high": 1.0, **MOTION},
]
needs_feetech = pytest.mark.skipif(
    importlib.util.find_spec("scservo_sdk") is None, reason="no Feetech SDK (brachium[feetech])"
)


# -- units -------------------------------------------------------------------------------------------------------------


def axis(**options):
    return LeRobotAxis(**{"name": "a", "key": "a.pos", "unit": "degrees", **TURN, **options})


@pytest.mark.parametrize(
    ("options", "key", "position"),
    [
        ({}, 90.0, math.pi / 2),
        ({"unit": "radians"}, 0.3, 0.3),
        ({"unit": "metres"}, 0.3, 0.3),
        ({"scale": -math.pi / 180, "offset": 1.0}, 180.0, 1.0 - math.pi),
        ({"unit": "normalised", "scale": 0.01, "offset": 0.5}, -100.0, -0.5),
        ({"unit": "percent", "gripper": True, "low": 0.0, "high": 1.0}, 25.0, 0.25),
        ({"unit": "degrees", "gripper": True, "low": 0.0, "high": 1.0, "scale": -1 / 65}, -65.0, 1.0),
    ],
)
def test_a_key_is_so_much_in_the_unit_of_the_axis(options, key, position):
    one = axis(**options)
    assert one.from_key(key) == pytest.approx(position)
    assert one.to_key(position) == pytest.approx(key)
    assert one.axis_unit == ("1" if options.get("gripper") else "m" if options.get("unit") == "metres" else "rad")


def test_a_share_of_a_calibrated_range_is_half_of_it_each_way():
    scale = normalised_scale(1000, 3000, 4096)
    assert 200 * scale == pytest.approx(2000 / 4095 * 2 * math.pi)
    axis(unit="normalised", scale=-scale).check_calibration(1000, 3000, 4096)
    with pytest.raises(RobotError, match=r"calibration says 0\.01534.*Set scale: 0\.01534"):
        axis(unit="normalised", scale=0.02).check_calibration(1000, 3000, 4096)
    axis().check_calibration(1000, 3000, 4096)
    with pytest.raises(RobotError, match=r"-1\.5 \.\. 1\.5 rad, the calibration has -0\.767.*Narrow"):
        axis().check_calibration(1500, 2500, 4096)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([], "expected axes"),
        ([{**AXES[0], "unit": "degree"}], "Did you mean 'degrees'"),
        ([{**AXES[0], "unit": "normalised"}], "expected a scale .rad per unit of the key.*use_degrees"),
        ([{**AXES[0], "unit": "percent"}], "expected a scale"),
        ([{**AXES[2], "unit": "degrees"}], "expected a scale .1 per unit of the key.*open - closed"),
        ([{**AXES[2], "high": 100.0}], "from 0 .closed. to 1"),
        ([AXES[2], AXES[0]], "as the last axis"),
        ([AXES[0], AXES[0]], "every name once"),
        ([{**AXES[0], "velocty": 1.0}], "Did you mean 'velocity'"),
        ([{k: v for k, v in AXES[0].items() if k != "jerk"}], "expected jerk, got none"),
        ([{**AXES[0], "scale": 0.0}], "other than 0"),
        ([{**AXES[0], "low": "x"}], "could not convert"),
    ],
)
def test_axes_that_do_not_fit_are_named(axes, message):
    with pytest.raises(RobotError, match=message):
        AxisMap(axes)


def test_an_observation_must_be_whole_and_finite():
    axes = AxisMap(AXES)
    seen = {"gripper.pos": 50.0, "shoulder.pos": 90.0, "elbow.pos": 0.0, "front": None}
    np.testing.assert_allclose(axes.to_axes(seen), [math.pi / 2, 0.0, 0.5])
    assert axes.to_keys(axes.to_axes(seen)) == pytest.approx({k: seen[k] for k in axes.keys})
    with pytest.raises(RobotError, match=r"expected the keys \['elbow.pos'\]"):
        axes.to_axes({"gripper.pos": 50.0, "shoulder.pos": 90.0})
    with pytest.raises(RobotError, match=r"finite values, got \{'elbow.pos': nan\}"):
        axes.to_axes({**seen, "elbow.pos": math.nan})


def test_the_spec_is_known_without_lerobot(monkeypatch):
    monkeypatch.setitem(sys.modules, "lerobot", None)
    robot = load("robot/so101")
    assert robot.spec.axes.names[-1] == "gripper"
    assert robot.spec.axes.units == ("rad",) * 5 + ("1",)
    assert robot.spec.cameras[0].shape == (224, 224, 3)
    with pytest.raises(RobotError, match="not connected"):
        robot.read()
    robot.halt("nobody there")
    robot.disconnect()
    with pytest.raises(RobotError, match="expected config with LeRobot's type"):
        LeRobot(config={"port": "x"}, axes=AXES)
    with pytest.raises(RobotError, match="camera 'front': expected key, height, width"):
        LeRobot(config={"type": "x"}, axes=AXES, cameras={"front": {"hight": 3}})


# -- the link, in this process -----------------------------------------------------------------------------------------


@pytest.fixture
def plugin(monkeypatch):
    """What the plugin's module is found by."""
    pytest.importorskip("lerobot")
    monkeypatch.syspath_prepend(HERE / "lerobot_plugins")
    return ("lerobot_robot_fakearm",)


@pytest.fixture
def make_link(plugin, tmp_path):
    from brachium.real_robot.drivers.lerobot_link import CameraMap, LeRobotLink

    def make(axes=AXES, cameras=None, **config):
        views = {"front": {"height": 16, "width": 16}} if cameras is None else cameras
        maps = {name: CameraMap.build(name, given) for name, given in views.items()}
        whole = {"type": "fakearm", "folder": str(tmp_path), "calibration_dir": str(tmp_path), "id": "a", **config}
        return LeRobotLink(whole, AxisMap(axes), maps, failures=2, packages=plugin)

    return make


def journal(folder, kind=""):
    file = folder / "journal"
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if not kind or line[1] == kind]


def test_it_reads_moves_and_keeps_its_torque(make_link, tmp_path):
    link = make_link()
    link.open()
    begin = time.monotonic()
    state = link.read()
    np.testing.assert_allclose(state.position, [0.0, math.radians(10.0), 0.5])
    frame = state.frames["front"]
    assert frame.image.shape == (16, 16, 3)
    assert (frame.image[..., 0] == 200).all()
    assert (frame.image[..., 2] == 0).all()
    assert begin - 1e-3 <= frame.timestamp <= time.monotonic()
    link.move(np.array([0.1, -0.2, 0.75]))
    sent = np.array(journal(tmp_path, "send")[-1][2:], float)
    np.testing.assert_allclose(sent, [math.degrees(0.1), math.degrees(-0.2), 75.0], atol=1e-6)
    time.sleep(0.12)
    assert link.read().velocity[0] > 0.05
    link.close()
    link.close()
    assert [line[1:] for line in journal(tmp_path)][-1] == ["disconnect", "torque=on"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "fakearn"}, "LeRobot has no robot 'fakearn'. Did you mean 'fakearm'"),
        ({"speed": 3}, "config of 'fakearm' does not fit.*speed"),
        ({"use_degrees": False}, "'shoulder.pos' is in degrees, the robot says normalised"),
        ({"calibrated": False}, "not calibrated.*lerobot-calibrate --robot.type=fakearm --robot.id=a"),
        ({"disable_torque_on_disconnect": True}, "expected disable_torque_on_disconnect: false"),
        ({"axes": AXES[:2]}, r"expected an axis for each, got none for \['gripper.pos'\]"),
        ({"axes": [{**AXES[0], "key": "sholder.pos"}, *AXES[1:]]}, r"expected the keys \['sholder.pos'\]"),
        ({"axes": [{**AXES[0], "high": 2.0}, *AXES[1:]]}, "Narrow low and high"),
        ({"cameras": {"side": {"height": 8, "width": 8}}}, "camera 'side': expected a camera 'side'"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_moves(make_link, tmp_path, options, message):
    with pytest.raises(RobotError, match=message):
        make_link(**options).open()
    assert not journal(tmp_path, "send")


def test_shares_of_the_calibrated_range_need_the_scale_of_the_calibration(make_link, tmp_path):
    scale = 2000 / 200 * 2 * math.pi / 4095
    body = [{**one, "unit": "normalised", "scale": scale} for one in AXES[:2]]
    link = make_link(axes=[*body, AXES[2]], use_degrees=False)
    link.open()
    link.move(np.array([math.pi / 4, 0.0, 0.5]))  # an eighth of a turn: 512 of 4095 counts
    assert float(journal(tmp_path, "send")[-1][2]) == pytest.approx(100 * 512 / 1000, rel=1e-3)
    wrong = [{**one, "unit": "normalised", "scale": 1.1 * scale} for one in AXES[:2]]
    with pytest.raises(RobotError, match="Set scale"):
        make_link(axes=[*wrong, AXES[2]], use_degrees=False).open()


@pytest.mark.parametrize("timed", [True, False])
def test_pictures_are_rgb_and_have_the_time_they_were_taken(make_link, tmp_path, timed):
    link = make_link(color_mode="bgr", timed=timed)
    link.open()
    first = link.read().frames["front"]
    assert (first.image[..., 0] == 200).all(), "red first, though the camera gives blue first"
    (tmp_path / "trouble").write_text("frozen")
    frozen = link.read().frames["front"]
    time.sleep(0.05)
    again = link.read().frames["front"]
    if timed:  # the same picture stays as old as it is
        assert again.timestamp == frozen.timestamp
    else:  # nobody knows; whether its pixels change is looked at elsewhere
        assert again.timestamp > frozen.timestamp


def test_a_goal_that_lerobot_limits_is_a_fault(make_link, tmp_path):
    link = make_link(max_relative_target=5.0)
    link.open()
    link.read()
    link.move(np.array([0.05, math.radians(10.0), 0.5]))
    assert not link.read().fault
    link.move(np.array([0.5, math.radians(10.0), 0.5]))
    state = link.read()
    assert "told shoulder = 0.5, the robot took 0.1373 rad" in state.fault


def test_readings_may_fail_a_few_times_and_grow_old_meanwhile(make_link, tmp_path):
    link = make_link()
    link.open()
    good = link.read()
    for trouble in ("bus", "nan"):
        (tmp_path / "trouble").write_text(trouble)
        assert link.read() is good
        assert link.read() is good
        (tmp_path / "trouble").write_text("")
        assert link.read().timestamp > good.timestamp
        good = link.read()
    (tmp_path / "trouble").write_text("bus")
    assert link.read() is link.read()
    with pytest.raises(RobotError, match="Failed to sync read"):
        link.read()


def test_a_stop_holds_what_rests_and_stops_what_moves(make_link, tmp_path):
    link = make_link()
    link.open()
    link.read()
    link.stop()
    assert not journal(tmp_path, "send"), "nothing was commanded yet"
    link.move(np.array([0.3, 0.2, 0.2]))
    arm = link.robot.position
    arm.update(shoulder=math.degrees(0.1), elbow=math.degrees(0.19), gripper=60.0)
    for _ in range(3):
        arm["shoulder"] += 3.0  # it moves; the elbow sags a little; the gripper holds something
        time.sleep(0.06)
        where = link.read().position
    link.stop()
    sent = np.array(journal(tmp_path, "send")[-1][2:], float)
    np.testing.assert_allclose(sent, [math.degrees(where[0]), math.degrees(0.2), 20.0], atol=1e-6)


def test_plugins_are_found_by_the_name_of_their_distribution(make_link, plugin, tmp_path, monkeypatch):
    from brachium.real_robot.drivers import lerobot_make

    (tmp_path / "site" / "lerobot_robot_other-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "lerobot_robot_other-1.0.dist-info" / "METADATA").write_text("Name: lerobot_robot_other\n")
    (tmp_path / "site" / "lerobot_robot_other.py").write_text("import no_such_vendor")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(RobotError, match=r"cannot import lerobot_robot_other: .*no_such_vendor"):
        lerobot_make.import_plugins("lerobot_robot_")


def test_a_vendors_package_that_is_missing_is_named(tmp_path, plugin):
    from brachium.real_robot.drivers import lerobot_make

    config = {"type": "koch_follower", "port": "x", "calibration_dir": str(tmp_path)}
    if importlib.util.find_spec("dynamixel_sdk") is not None:
        pytest.skip("Dynamixel's package is installed")
    with pytest.raises(RobotError, match=r"koch_follower: .*dynamixel"):
        lerobot_make.make_robot(config, ())


# -- the whole driver --------------------------------------------------------------------------------------------------


class Wave:
    """Absolute targets that swing away from where the robot was seen first, and back."""

    noise_dim, takes_guidance, action_horizon = 2, True, 8

    def __init__(self, spec, size):
        self.embodiment, self.size, self.begin = spec, np.asarray(size), None

    def predict(self, observations, noise, guidance=None):
        if self.begin is None:
            self.begin = observations[0].timestamp, observations[0].state.astype(float)
        t = observations[0].timestamp + np.arange(8) / self.embodiment.control_hz - self.begin[0]
        actions = self.begin[1] + self.size * (1 - np.cos(1.2 * t))[:, None]
        return ActionChunk(actions=actions[None].astype(np.float32), control_hz=self.embodiment.control_hz)


def embodiment(robot):
    axes = robot.spec.axes
    common = {"shape": axes.shape, "names": axes.names, "units": axes.units, "gripper": axes.gripper}
    return EmbodimentSpec(
        name="lerobot",
        robot=robot.spec.name,
        control_hz=10.0,
        cameras=robot.spec.cameras,
        state=FeatureSpec(name="state", **common),
        action=FeatureSpec(name="action", low=axes.low, high=axes.high, **common),
    )


def run(robot, size, seconds, between=None):
    """A run through the control loop and the safety layer; `between` is done half a second after its first tick."""
    spec = embodiment(robot)
    policy = Wave(spec, size)
    guard = SafetyGuard(robot.spec, 1 / HZ, rules=Rules(reading_age_s=0.6))
    inference = Inference(policy)
    controller = Controller(
        robot,
        body_of(robot, robot.spec, spec),
        inference,
        RecedingHorizon(policy, execute_horizon=2),
        guard,
        timing=Timing(control_hz=HZ, hold_s=1.0, silent_s=1.5, realtime=False),
        freshness=Freshness(age_s=0.6, skew_s=0.6),
    )
    began, did = [], []

    def done():
        began.append(time.monotonic())
        if between is not None and not did and began[-1] - began[0] > 0.5:
            did.append(True)
            between()
        return ""

    outcome = controller.run("go", seconds=seconds, done=done)
    inference.close()
    return outcome


def driver(plugin, folder, **options):
    config = {"type": "fakearm", "folder": str(folder), "calibration_dir": str(folder), "id": "a"}
    config |= options.pop("config", {})
    cameras = {"front": {"key": "front", "height": 16, "width": 16}}
    return LeRobot(
        config=config, axes=AXES, cameras=cameras, rate_hz=2 * HZ, watchdog_s=1.0, packages=plugin, **options
    )


def settle(robot, sent, atol):
    """Wait until the robot says that it is where it was last sent, by its journal: (k, j) positions."""
    end = time.monotonic() + 5.0
    while np.abs(sent()[-1] - robot.read().position).max() > atol and time.monotonic() < end:
        time.sleep(0.05)
    np.testing.assert_allclose(sent()[-1], robot.read().position, atol=atol)
    return sent()


def is_gone(child):
    try:
        os.kill(child, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_a_run_within_the_limits_and_another_whose_bus_is_lost(plugin, tmp_path):
    robot = driver(plugin, tmp_path)
    robot.connect()
    try:
        child = robot.process_id
        start = np.array([0.0, math.radians(10.0), 0.5])
        np.testing.assert_allclose(robot.read().position, start, atol=1e-6)
        outcome = run(robot, [0.3, -0.2, 0.2], 1.5)
        assert outcome.ending == "time", outcome.why

        def commands():
            return np.array([line[2:] for line in journal(tmp_path, "send")], float) * [np.pi / 180, np.pi / 180, 0.01]

        sent = settle(robot, commands, 1e-3)
        moments = np.array([line[0] for line in journal(tmp_path, "send")], float)
        limits = robot.spec.limits
        assert len(sent) > 10
        assert np.abs(sent[-1] - start).max() > 0.1
        assert (sent >= limits.low - 1e-6).all()
        assert (sent <= limits.high + 1e-6).all()
        between = np.diff(moments)[:, None] + 4 / HZ  # some come late, and the next in time
        assert (np.abs(np.diff(sent, axis=0)) <= limits.velocity * between).all()

        outcome = run(robot, [0.3, -0.2, 0.2], 20.0, between=lambda: (tmp_path / "trouble").write_text("bus"))
        assert outcome.ending == "robot", outcome.why
        with pytest.raises(RobotError, match="Failed to sync read"):
            robot.read()
        count = len(journal(tmp_path, "send"))
        with pytest.raises(RobotError, match="lost"):
            robot.apply(start)
        robot.disconnect()
        assert is_gone(child)
        assert len(journal(tmp_path, "send")) == count
    finally:
        robot.disconnect()


@pytest.mark.slow
def test_a_robot_that_is_limited_by_lerobot_ends_at_fault_and_a_plain_end_keeps_the_torque(plugin, tmp_path):
    robot = driver(plugin, tmp_path, config={"max_relative_target": 0.5})  # [degrees] a command
    robot.connect()
    try:
        outcome = run(robot, [0.6, 0.0, 0.0], 20.0)
        assert outcome.ending == "robot", outcome.why
        assert "LeRobot limits it" in outcome.why
        count = len(journal(tmp_path, "send"))
        robot.apply(np.zeros(3))  # as no loop would: the child must refuse too
        time.sleep(0.3)
        assert len(journal(tmp_path, "send")) == count
        robot.disconnect()
        assert journal(tmp_path)[-1][1:] == ["disconnect", "torque=on"]
    finally:
        robot.disconnect()


# -- an SO-101 on a bus of servos --------------------------------------------------------------------------------------

RANGES = [(700, 3400), (800, 3200), (900, 3100), (900, 3200), (0, 4095), (2000, 3500)]


@pytest.fixture
def bus(tmp_path):
    """Path of the terminal, with a calibration file that fits."""
    names = load("robot/so101").axes.names
    calibration = {
        name: {"id": k + 1, "drive_mode": 0, "homing_offset": 0, "range_min": low, "range_max": high}
        for k, (name, (low, high)) in enumerate(zip(names, RANGES))
    }
    (tmp_path / "mine.json").write_text(json.dumps(calibration))
    words = [sys.executable, str(HERE / "feetech_bus.py"), str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    yield process.stdout.readline().strip()
    process.kill()
    process.wait()


def so101_axes():
    return load("robot/so101").inside_lerobot()["axes"]


def patiently(connect):
    """LeRobot gives a servo 50 ms to answer, which is little for a stand-in on a busy machine: once more, then."""
    for _ in range(8):
        try:
            return connect()
        except RobotError as error:
            if "camera" in str(error).lower():
                raise
    return connect()


@needs_feetech
@pytest.mark.slow
def test_lerobots_so101_moves_its_servos_within_the_limits(bus, tmp_path):
    config = {"type": "so101_follower", "port": bus, "id": "mine", "calibration_dir": str(tmp_path)}
    robot = LeRobot(config=config, axes=so101_axes(), rate_hz=50.0, watchdog_s=1.0)
    patiently(robot.connect)
    try:
        np.testing.assert_allclose(robot.read().position, [0, 0, 0, 0, 0, 0.5], atol=2e-3)
        outcome = run(robot, [0.3, -0.2, 0.2, 0.1, 0.5, 0.2], 1.5)
        assert outcome.ending == "time", outcome.why
        middle, span = np.mean(RANGES, axis=1), np.diff(RANGES, axis=1)[:, 0]

        def commands():
            goals = np.array([line[2:] for line in journal(tmp_path, "goal")], float)
            sent = (goals - middle) * 2 * np.pi / 4095
            sent[:, 5] = (goals[:, 5] - RANGES[5][0]) / span[5]
            return sent

        sent = settle(robot, commands, 0.01)
        assert len(sent) > 10
        assert (sent >= robot.spec.limits.low).all()
        assert (sent <= robot.spec.limits.high).all()
        assert np.abs(np.diff(sent, axis=0)).max() < 5 * 3.0 / HZ
        assert np.abs(sent[-1] - [0, 0, 0, 0, 0, 0.5])[4] > 0.2

        outcome = run(robot, [0.3, -0.2, 0.2, 0.1, 0.5, 0.0], 20.0, between=lambda: (tmp_path / "mute").touch())
        assert outcome.ending == "robot", outcome.why
        count = len(journal(tmp_path, "goal"))
        robot.disconnect()
        time.sleep(0.2)
        assert len(journal(tmp_path, "goal")) == count
        assert all(line[3] == "1" for line in journal(tmp_path, "torque")[-6:]), "torque stays"
    finally:
        robot.disconnect()


@needs_feetech
def test_a_wrong_port_is_one_clear_line(tmp_path):
    from brachium.real_robot.drivers.lerobot_link import LeRobotLink

    config = {"type": "so101_follower", "port": str(tmp_path / "nothing"), "calibration_dir": str(tmp_path)}
    with pytest.raises(RobotError, match=r"so101_follower: .*[Cc]ould not (open|connect)[^\n]*nothing[^\n]*$"):
        LeRobotLink(config, AxisMap(so101_axes()), {}).open()


@needs_feetech
def test_a_camera_of_lerobot_is_found_and_one_that_is_not_there_is_said(bus, tmp_path):
    from brachium.real_robot.drivers.lerobot_link import CameraMap, LeRobotLink

    camera = {"type": "opencv", "index_or_path": str(tmp_path / "none"), "width": 64, "height": 48, "fps": 30}
    config = {"type": "so101_follower", "port": bus, "id": "mine", "calibration_dir": str(tmp_path)}
    view = CameraMap.build("front", {"height": 16, "width": 16})
    link = LeRobotLink({**config, "cameras": {"front": camera}}, AxisMap(so101_axes()), {"front": view})
    with pytest.raises(RobotError, match=r"so101_follower: .*OpenCVCamera.*none"):
        patiently(link.open)
    link.robot.bus.disconnect(False)
    with pytest.raises(RobotError, match=r"does not fit.*opencb"):
        LeRobotLink({**config, "cameras": {"front": {**camera, "type": "opencb"}}}, AxisMap(so101_axes()), {}).open()
