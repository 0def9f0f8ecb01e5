"""Drivers in processes of their own: what a vendor's package may do, and what the control loop sees of it."""

import functools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from memory_link import BlindCamera, MemoryLink

from brachium.errors import RobotError
from brachium.real_robot.cameras import CameraSet, OpenCVCamera, camera_specs, fitted
from brachium.real_robot.driver_process import ProcessRobot
from brachium.real_robot.safety.guard import SafetyGuard
from brachium.real_robot.spec import RobotSpec
from brachium.spec import FeatureSpec

WATCHDOG_S = 0.5


def spec(cameras=(), dof=2):
    return RobotSpec(
        name="memory",
        axes=FeatureSpec(
            name="axes",
            shape=(dof,),
            names=("a", "b", "c")[:dof],
            units=("rad",) * dof,
            low=(-1.0,) * dof,
            high=(1.0,) * dof,
        ),
        velocity=(1.0,) * dof,
        acceleration=(10.0,) * dof,
        jerk=(100.0,) * dof,
        command_hz=100.0,
        state_hz=100.0,
        cameras=cameras,
        watchdog_s=WATCHDOG_S,
    )


@pytest.fixture
def robot(tmp_path):
    found = ProcessRobot(spec(), functools.partial(MemoryLink, tmp_path), start_s=20.0)
    yield found
    found.disconnect()


def events(folder, kind=""):
    lines = (folder / "events").read_text().splitlines() if (folder / "events").exists() else []
    return [line.split() for line in lines if kind in line]


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def drive(robot, guard, steps, target=0.5):
    for _ in range(steps):
        now = time.monotonic()
        robot.send(guard.command(np.array([target, 0.0]), robot.read(), now))
        time.sleep(0.02)


def started(robot):
    robot.connect()
    guard = SafetyGuard(robot.spec, 0.02)
    guard.start(robot.read(), time.monotonic())
    return guard


def test_it_moves_and_closes_in_order(robot, tmp_path):
    with pytest.raises(RobotError, match="not connected"):
        robot.read()
    guard = started(robot)
    drive(robot, guard, 20)
    assert until(lambda: abs(robot.read().position[0] - guard.motion.position[0]) < 1e-6)
    assert robot.read().position[0] > 0.01
    robot.disconnect()
    robot.disconnect()
    assert [event[1] for event in events(tmp_path)][-2:] == ["stop", "close"]


@pytest.mark.parametrize(
    ("trouble", "message"),
    [("refuse", "Is it switched on"), ("bug", "ValueError: of the package"), ("mute", "no reading within 8 s")],
)
def test_what_cannot_be_opened_says_why(tmp_path, trouble, message):
    (tmp_path / "trouble").write_text(trouble)
    robot = ProcessRobot(spec(), functools.partial(MemoryLink, tmp_path), start_s=8.0)
    with pytest.raises(RobotError, match=message) as caught:
        robot.connect()
    assert "vendor says hello" in str(caught.value)
    assert robot.process_id is None


@pytest.mark.parametrize(
    ("trouble", "why"), [("segfault", "ended"), ("lost", "cable is out"), ("hang", "says nothing")]
)
def test_a_package_that_breaks_is_a_lost_robot_and_never_a_lost_controller(robot, tmp_path, trouble, why):
    guard = started(robot)
    drive(robot, guard, 5)
    child = robot.process_id
    (tmp_path / "trouble").write_text(trouble)

    def lost():
        try:
            robot.read()
        except RobotError as error:
            return why in str(error)
        return False

    assert until(lost)
    with pytest.raises(RobotError, match=why):
        robot.send(guard.command(np.array([0.5, 0.0]), guard_reading(guard), time.monotonic()))
    robot.halt("whatever")
    robot.disconnect()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def guard_reading(guard):
    from brachium.real_robot.spec import Reading

    return Reading(position=guard.motion.position.copy(), velocity=np.zeros(2), timestamp=time.monotonic())


def test_a_fault_stays_until_the_link_is_opened_anew(robot, tmp_path):
    guard = started(robot)
    drive(robot, guard, 5)
    (tmp_path / "trouble").write_text("fault")
    assert until(lambda: "protective" in robot.read().fault)
    (tmp_path / "trouble").write_text("")
    moved = len(events(tmp_path, "move"))
    robot.apply(np.array([0.3, 0.0]))  # as no loop would: the child must refuse too
    time.sleep(0.2)
    assert "protective" in robot.read().fault
    assert len(events(tmp_path, "move")) == moved
    robot.disconnect()
    robot.connect()
    assert robot.read().fault == ""


def test_a_halt_stops(robot, tmp_path):
    guard = started(robot)
    drive(robot, guard, 5)
    robot.halt("by hand")
    assert until(lambda: robot.read().fault == "halted: by hand")
    assert events(tmp_path, "stop")


def test_a_loop_that_goes_silent_is_noticed(robot, tmp_path):
    guard = started(robot)
    time.sleep(WATCHDOG_S + 0.3)
    assert robot.read().fault == "", "nothing has been commanded yet"
    drive(robot, guard, 5)
    assert until(lambda: "watchdog" in robot.read().fault, WATCHDOG_S + 2.0)
    last, stop = events(tmp_path, "move")[-1], events(tmp_path, "stop")[-1]
    assert WATCHDOG_S - 0.05 < float(stop[0]) - float(last[0]) < WATCHDOG_S + 1.0


def test_between_two_runs_nobody_commands_and_nothing_is_wrong(robot, tmp_path):
    guard = started(robot)
    drive(robot, guard, 5)
    robot.rest()
    time.sleep(WATCHDOG_S + 0.4)
    assert robot.read().fault == ""
    assert not events(tmp_path, "stop")
    assert robot.read().position[0] == pytest.approx(guard.motion.position[0], abs=1e-9)
    drive(robot, guard, 5)
    assert until(lambda: "watchdog" in robot.read().fault, WATCHDOG_S + 2.0)


def test_a_child_that_is_asked_to_end_brings_the_robot_to_rest_first(robot, tmp_path):
    guard = started(robot)
    drive(robot, guard, 5)
    child = robot.process_id
    assert os.getpgid(child) != os.getpgid(0), "Ctrl-C and a closed terminal reach the control loop alone"
    os.kill(child, signal.SIGTERM)
    assert until(lambda: events(tmp_path, "close"))
    assert [event[1] for event in events(tmp_path)][-2:] == ["stop", "close"]


PARENT = """
import functools, sys, time
import numpy as np
from brachium.real_robot.driver_process import ProcessRobot
from memory_link import MemoryLink
from test_driver_process import drive, spec, started

if __name__ == "__main__":
    robot = ProcessRobot(spec(), functools.partial(MemoryLink, sys.argv[1], camera=False))
    guard = started(robot)
    print("ready", robot.process_id, flush=True)
    drive(robot, guard, 100000)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_controller_that_is_killed_or_frozen_stops_the_robot(tmp_path, how):
    (tmp_path / "parent.py").write_text(PARENT)
    here = os.path.dirname(os.path.abspath(__file__))
    support = os.path.join(os.path.dirname(here), "support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, support])}
    words = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path)]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert parent.stdout.readline().startswith("ready")
        assert until(lambda: len(events(tmp_path, "move")) > 5)
        parent.send_signal(how)
        at = time.monotonic()
        assert until(lambda: events(tmp_path, "stop"))
        assert float(events(tmp_path, "stop")[0][0]) - at < WATCHDOG_S + 1.0
        moved = len(events(tmp_path, "move"))
        time.sleep(0.2)
        assert len(events(tmp_path, "move")) == moved
    finally:
        parent.kill()
        parent.wait()
    assert until(lambda: events(tmp_path, "close"))


def test_a_robot_that_is_another_than_its_yaml_says(tmp_path):
    robot = ProcessRobot(spec(dof=3), functools.partial(MemoryLink, tmp_path))
    with pytest.raises(RobotError, match="expected 3 axes"):
        robot.connect()


def video(path, size=(48, 64), frames=40):
    import imageio.v3 as iio

    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    iio.imwrite(path, np.stack([np.roll(base, k, axis=1) for k in range(frames)]), fps=30)
    return path


def test_cameras_beside_the_robot(tmp_path):
    """One from a file, one of the link's own; pictures come at their pace, with the time they were taken."""
    side = OpenCVCamera(device=str(video(tmp_path / "side.mp4")), height=32, width=32)
    cameras = (*camera_specs({"side": side}), FeatureSpec(name="own", shape=(4, 4, 3), dtype="uint8"))
    link = functools.partial(MemoryLink, tmp_path, camera=True)
    robot = ProcessRobot(spec(cameras), link, cameras={"side": side})
    robot.connect()
    try:
        seen = {"side": set(), "own": set()}
        begin = time.monotonic()
        while time.monotonic() - begin < 0.8:
            reading = robot.read()
            for name, frame in reading.frames.items():
                assert -0.01 < time.monotonic() - frame.timestamp < 1.5
                seen[name].add(frame.timestamp)
            time.sleep(0.005)
        assert 5 < len(seen["side"]) < 40
        assert 5 < len(seen["own"]) < 40
        assert reading.frames["side"].image.shape == (32, 32, 3)
        assert until(lambda: robot.read().fault), "the file is over"
        assert "camera side: the camera at" in robot.read().fault
        assert not events(tmp_path, "stop"), "at rest it stays where it is"
    finally:
        robot.disconnect()


def test_a_camera_whose_package_fails_says_so():
    class Torn(OpenCVCamera):
        def open(self):
            pass

        def grab(self):
            raise ZeroDivisionError("a bug of the package")

    cameras = CameraSet({"side": Torn(device=0, height=4, width=4)})
    cameras.open()
    assert until(cameras.broken)
    assert cameras.broken() == {"side": "ZeroDivisionError: a bug of the package"}
    cameras.close()


def test_a_camera_that_opens_and_shows_nothing_says_why_at_once(tmp_path):
    side = BlindCamera(device=0, height=32, width=32)
    link = functools.partial(MemoryLink, tmp_path)
    robot = ProcessRobot(spec(camera_specs({"side": side})), link, cameras={"side": side}, start_s=20.0)
    begin = time.monotonic()
    with pytest.raises(RobotError, match="camera side: the camera at 0 is not open"):
        robot.connect()
    assert time.monotonic() - begin < 15.0, "it waited for what never comes"


def test_a_camera_that_is_not_there(tmp_path):
    side = OpenCVCamera(device="/dev/video97", height=32, width=32)
    robot = ProcessRobot(
        spec(camera_specs({"side": side})), functools.partial(MemoryLink, tmp_path), cameras={"side": side}
    )
    with pytest.raises(RobotError, match="camera side: no camera at '/dev/video97'"):
        robot.connect()
    assert not events(tmp_path), "the robot is not touched"


def test_pictures_are_cut_and_scaled():
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, 8:56] = 200
    whole = fitted(image, (24, 24, 3))
    np.testing.assert_array_equal(whole, np.full((24, 24, 3), 200))
    assert fitted(image, (24, 24, 3), crop=False)[:, 0].max() == 0
    np.testing.assert_array_equal(fitted(image, (48, 64, 3)), image)
