"""People at devices: what hands mean, and what becomes of it in a store."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from brachium.errors import ConfigError, RobotError, SpecMismatchError
from brachium.real_robot.drivers.mock import MockRobot
from brachium.real_robot.teleop.evdev import EV_ABS, EV_KEY, EV_REL, EVENT, EventDevice, find_device
from brachium.real_robot.teleop.keyboard import Keyboard
from brachium.real_robot.teleop.pilot import Pilot, Reach
from brachium.real_robot.teleop.teleoperator import Hand, Teleoperator
from brachium.spec import FeatureSpec

PERIOD = 0.02


class Scripted(Teleoperator):
    """Hands from a function of the time since it was first looked at."""

    name = "script"

    def __init__(self, hand, kind="twist"):
        self.kind, self._hand, self._begin = kind, hand, None

    def describe(self):
        return [("nothing", "a script moves it")]

    def connect(self):
        pass

    def read(self):
        self._begin = self._begin or time.monotonic()
        return self._hand(time.monotonic() - self._begin)

    def disconnect(self):
        pass


def twist(**values):
    found = np.zeros(6)
    for name, value in values.items():
        found[["x", "y", "z", "rx", "ry", "rz"].index(name)] = value
    return found


@pytest.fixture(scope="module")
def arm():
    from brachium.cli.compose import load
    from brachium.real_robot.drivers.mujoco_twin import MujocoTwin

    return MujocoTwin(env=load("env/tabletop/reach"))


def pilot_of(robot, hand, **options):
    kind = options.pop("kind", "twist")
    return Pilot(Scripted(lambda t: hand, kind), robot.spec, robot.model, **options)


def moved(pilot, start, ticks, follow=True):
    """Targets of some ticks; what is commanded follows at once, or stays."""
    commanded, found = np.array(start, float), []
    for _ in range(ticks):
        assert pilot.takes_over()
        found.append(pilot.target(commanded, PERIOD))
        if follow:
            commanded = found[-1]
    return np.array(found)


def home(robot):
    return np.array([*robot.model.home, 1.0])


@pytest.mark.parametrize(("name", "axis", "sign"), [("x", 0, 1), ("y", 1, -1), ("z", 2, 1)])
def test_the_tool_goes_the_way_that_is_pushed_at_the_speed_that_is_said(arm, name, axis, sign):
    from brachium.sim.kinematics import ArmKinematics

    pilot = pilot_of(arm, Hand(twist=twist(**{name: sign}), active=True), reach=Reach(speed=0.1))
    path = moved(pilot, home(arm), 50)
    kinematics = ArmKinematics(arm.model)
    before, quat = kinematics.pose(home(arm)[:-1])
    after, turned = kinematics.pose(path[-1, :-1])
    wanted = np.zeros(3)
    wanted[axis] = sign * 0.1 * 50 * PERIOD
    np.testing.assert_allclose(after - before, wanted, atol=2e-3)
    np.testing.assert_allclose(np.abs(quat @ turned), 1.0, atol=1e-4)
    steps = np.diff(path, axis=0)
    assert np.abs(steps).max() > 0
    assert (np.abs(np.diff(steps, axis=0)) < 0.01).all(), "an even motion, so that it has a velocity"


def test_the_tool_turns(arm):
    from brachium.sim.kinematics import ArmKinematics

    pilot = pilot_of(arm, Hand(twist=twist(rz=1.0), active=True), reach=Reach(turn=0.5))
    path = moved(pilot, home(arm), 40)
    kinematics = ArmKinematics(arm.model)
    (before, quat), (after, turned) = (kinematics.pose(p[:-1]) for p in (home(arm), path[-1]))
    np.testing.assert_allclose(after, before, atol=2e-3)
    assert 2 * np.arccos(min(1.0, abs(float(quat @ turned)))) == pytest.approx(0.5 * 40 * PERIOD, abs=0.02)


def test_the_wish_stays_near_the_command_and_inside_the_limits(arm):
    """A robot that is held up does not shoot off when it is let go."""
    pilot = pilot_of(arm, Hand(twist=twist(x=1.0, z=1.0), grip="close", active=True), reach=Reach(leash=0.03))
    path = moved(pilot, home(arm), 400, follow=False)
    from brachium.sim.kinematics import ArmKinematics

    kinematics = ArmKinematics(arm.model)
    here, _ = kinematics.pose(home(arm)[:-1])
    assert np.linalg.norm(kinematics.pose(path[-1, :-1])[0] - here) < 0.035
    limits = arm.spec.limits
    far = moved(pilot_of(arm, Hand(twist=twist(x=1.0), active=True), reach=Reach(speed=1.0)), home(arm), 400)
    for found in (path, far):
        assert (found >= limits.low - 1e-12).all()
        assert (found <= limits.high + 1e-12).all()
        assert (np.abs(np.diff(found, axis=0))[:, :-1] <= limits.velocity[:-1] * PERIOD + 1e-9).all()


def test_a_gripper_takes_its_time(arm):
    pilot = pilot_of(arm, Hand(twist=np.zeros(6), grip="close", active=True), reach=Reach(grip_s=0.4))
    path = moved(pilot, home(arm), 30)
    np.testing.assert_allclose(path[9, -1], 0.5, atol=1e-9)
    np.testing.assert_allclose(path[19:, -1], 0.0, atol=1e-9)
    np.testing.assert_allclose(path[:, :-1], home(arm)[None, :-1].repeat(30, 0), atol=1e-12)


def test_what_was_said_of_the_gripper_is_forgotten_between_two_take_overs(arm):
    """Else the first nudge of a correction would drop what the policy holds."""
    hand = {"now": Hand(twist=np.zeros(6), grip="open", active=True)}
    pilot = Pilot(Scripted(lambda t: hand["now"]), arm.spec, arm.model, hold_s=0.05)
    closed = np.array([*arm.model.home, 0.0])
    assert pilot.takes_over()
    assert pilot.target(closed, PERIOD)[-1] > 0.0
    hand["now"] = Hand(twist=np.zeros(6))
    time.sleep(0.1)
    assert not pilot.takes_over()
    hand["now"] = Hand(twist=twist(x=1.0), active=True)
    path = moved(pilot, closed, 20)
    np.testing.assert_array_equal(path[:, -1], 0.0)
    hand["now"] = Hand(twist=np.zeros(6), grip="toggle", active=True)
    assert moved(pilot, closed, 1)[-1, -1] > 0.0, "a closed gripper opens at the first press"


@pytest.mark.parametrize("way", [{"rz": 1.0}, {"x": 1.0}])
def test_a_robot_that_is_slow_or_held_up_stops_when_it_is_let_go(arm, way):
    limits = arm.spec.limits.scaled(0.05)
    hand = {"now": Hand(twist=twist(**way), active=True)}
    pilot = Pilot(Scripted(lambda t: hand["now"]), arm.spec, arm.model, always=True, limits=limits)
    path = moved(pilot, home(arm), 200, follow=False)
    assert (np.abs(path - home(arm))[:, :-1] <= 0.15 * limits.velocity[:-1] + 1e-9).all()


def test_without_a_model_the_axes_move():
    robot = MockRobot()
    pilot = pilot_of(robot, Hand(twist=twist(y=-0.5), active=True), reach=Reach(share=0.5))
    path = moved(pilot, np.zeros(4), 50)
    np.testing.assert_allclose(path[-1], [0.0, -0.5 * 0.5 * 2.0 * 50 * PERIOD, 0.0, 0.0], atol=1e-9)


def test_a_leader_arm_is_approached_slowly_and_then_followed():
    robot = MockRobot()
    there = np.array([0.6, -0.3, 0.2, 1.0])
    pilot = pilot_of(robot, Hand(twist=np.zeros(6), axes=there, active=True), kind="axes", reach=Reach(approach=0.1))
    path = moved(pilot, np.zeros(4), 300)
    assert np.abs(np.diff(path, axis=0))[:, :3].max() <= 0.1 * 2.0 * PERIOD * 2 + 1e-9
    np.testing.assert_allclose(path[-1], there, atol=1e-12)
    jumped = Hand(twist=np.zeros(6), axes=there - [2.0, 0, 0, 0], active=True)
    pilot._device._hand = lambda t: jumped
    after = moved(pilot, there, 5)
    assert np.abs(after[2:] - there).max() < 0.2, "a leader that jumps is approached anew"


def test_a_leader_beyond_a_limit_is_followed_to_the_limit_and_its_gripper_is_no_jump():
    robot = MockRobot()
    there = np.array([3.0, 0.1, 0.0, 1.0])  # the robot goes to 2.0
    hand = {"now": Hand(twist=np.zeros(6), axes=there, active=True)}
    pilot = Pilot(Scripted(lambda t: hand["now"], "axes"), robot.spec, None, hold_s=0.05)
    path = moved(pilot, np.zeros(4), 600)
    np.testing.assert_allclose(path[-1], [2.0, 0.1, 0.0, 1.0], atol=1e-9)
    hand["now"] = Hand(twist=np.zeros(6), axes=np.array([1.99, 0.1, 0.0, 0.0]), active=True)
    after = moved(pilot, path[-1], 25)
    np.testing.assert_allclose(after[0, :3], [1.99, 0.1, 0.0], atol=1e-9)
    np.testing.assert_allclose(after[-1, 3], 0.0, atol=1e-9)


def test_the_arm_is_the_persons_until_it_has_come_to_the_leader():
    robot = MockRobot()
    hand = {"now": Hand(twist=np.zeros(6), axes=np.array([1.0, 0.0, 0.0, 1.0]), active=True)}
    pilot = Pilot(Scripted(lambda t: hand["now"], "axes"), robot.spec, None, hold_s=0.01)
    moved(pilot, np.zeros(4), 1)
    hand["now"] = Hand(twist=np.zeros(6), axes=np.array([1.0, 0.0, 0.0, 1.0]))  # it is held still
    time.sleep(0.05)
    commanded = np.zeros(4)
    ticks = 0
    while pilot.takes_over():
        commanded, ticks = pilot.target(commanded, PERIOD), ticks + 1
    assert ticks > 100, "1 rad at a fifth of 2 rad/s"
    assert commanded[0] > 0.97


def test_a_leader_with_other_axes_is_refused():
    class Leader(Scripted):
        feature = FeatureSpec(name="axes", shape=(4,), names=("a", "b", "c", "gripper"), units=("rad",) * 3 + ("1",))

    with pytest.raises(SpecMismatchError, match="leads other axes"):
        Pilot(Leader(None, "axes"), MockRobot().spec, None)


@pytest.mark.parametrize("axes", [np.full(4, np.nan), np.zeros(3)])
def test_a_leader_that_says_nonsense_is_refused(axes):
    robot = MockRobot()
    pilot = pilot_of(robot, Hand(twist=np.zeros(6), axes=axes, active=True), kind="axes")
    pilot.takes_over()
    with pytest.raises(RobotError, match="finite axes"):
        pilot.target(np.zeros(4), PERIOD)


def test_who_takes_over_has_charge_while_moving_and_a_little_longer():
    hand = {"now": Hand(twist=np.zeros(6))}
    pilot = Pilot(Scripted(lambda t: hand["now"]), MockRobot().spec, None, hold_s=0.1)
    assert not pilot.takes_over()
    hand["now"] = Hand(twist=twist(x=1.0), active=True, keys=("mark",))
    assert pilot.takes_over()
    hand["now"] = Hand(twist=np.zeros(6))
    assert pilot.takes_over()
    time.sleep(0.15)
    assert not pilot.takes_over()
    assert list(pilot.events) == ["mark"]


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def keyboard():
    from brachium.cli.compose import load

    return load("teleop/keyboard")


def test_keys_of_a_terminal(keyboard, monkeypatch):
    main, side = pty.openpty()
    with open(side, closefd=True) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        with keyboard:
            os.write(main, b"w")
            hand = wait_for(keyboard, lambda hand: hand.active)
            np.testing.assert_array_equal(hand.twist, twist(x=1.0))
            assert not wait_for(keyboard, lambda hand: not hand.active).active
            os.write(main, b" yw")
            hand = wait_for(keyboard, lambda hand: hand.active)
            assert hand.grip == "toggle"
            assert hand.keys == ("success",)
            assert keyboard.read().keys == (), "said once"
            os.write(main, b"\x1b[A\x1b[3~\x1bOP")  # arrow, delete, F1
            time.sleep(0.2)
            assert keyboard.read().keys == ()
            os.write(main, b"\x1b")
            assert wait_for(keyboard, lambda hand: bool(hand.keys)).keys == ("stop",)
        keyboard.disconnect()
    os.close(main)


def wait_for(device, condition, seconds=5.0):
    until = time.monotonic() + seconds
    while True:
        hand = device.read()
        if condition(hand) or time.monotonic() > until:
            return hand
        time.sleep(0.005)


def test_a_keyboard_needs_a_terminal(keyboard, monkeypatch):
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(RobotError, match="needs a terminal"):
            keyboard.connect()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": {"w": "up"}, "keys": {}}, "expected directions"),
        ({"directions": {"w": "+x"}, "keys": {"y": "fine"}}, "expected keys"),
        ({"directions": {"w": "+x"}, "keys": {"w": "stop"}}, "mean two things"),
    ],
)
def test_keyboards_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Keyboard(**options)


def event(kind, code, value):
    return EVENT.pack(0, 0, kind, code, value)


@pytest.fixture
def pad(tmp_path):
    path = tmp_path / "event0"
    os.mkfifo(path)
    device = EventDevice(
        name="pad",
        device=str(path),
        axes={"-x": "y", "-y": "x"},
        buttons={"a": "toggle", "y": "success"},
        hold="right",
        dead=0.1,
        full_scale=1000.0,
        curve=1.0,
    )
    device.connect()
    writer = os.open(path, os.O_WRONLY)
    yield device, writer
    device.disconnect()
    os.close(writer)


def test_sticks_and_buttons(pad):
    device, writer = pad
    os.write(writer, event(EV_ABS, 1, -1000) + event(EV_ABS, 0, 50))
    time.sleep(0.1)
    hand = device.read()
    assert not hand.active, "nobody holds the dead man's switch"
    np.testing.assert_array_equal(hand.twist, np.zeros(6))
    os.write(writer, event(EV_KEY, 311, 1))
    hand = wait_for(device, lambda hand: hand.active)
    np.testing.assert_allclose(hand.twist, twist(x=1.0), atol=1e-12)
    os.write(writer, event(EV_ABS, 1, -550))
    hand = wait_for(device, lambda hand: hand.twist[0] < 1.0)
    np.testing.assert_allclose(hand.twist, twist(x=0.5), atol=1e-12)
    os.write(writer, event(EV_KEY, 308, 1) + event(EV_KEY, 308, 2) + event(EV_KEY, 304, 1))
    hand = wait_for(device, lambda hand: bool(hand.keys))
    assert hand.keys == ("success",)
    assert hand.grip == "toggle"
    assert device.read().grip == "", "said once"
    os.write(writer, event(EV_KEY, 311, 0))
    assert not wait_for(device, lambda hand: not hand.active).active


def test_relative_axes_fade_when_they_are_let_go(tmp_path):
    path = tmp_path / "event1"
    os.mkfifo(path)
    mouse = EventDevice(name="mouse", device=str(path), axes={"+z": "z"}, buttons={}, dead=0.0, curve=1.0)
    mouse.connect()
    writer = os.open(path, os.O_WRONLY)
    os.write(writer, event(EV_REL, 2, 175))
    np.testing.assert_allclose(wait_for(mouse, lambda hand: hand.active).twist, twist(z=0.5))
    assert not wait_for(mouse, lambda hand: not hand.active).active
    os.close(writer)
    mouse._thread.join(5.0)
    with pytest.raises(RobotError, match="the device is gone"):
        mouse.read()
    mouse.disconnect()


def test_a_device_that_is_gone_stops_the_session():
    class Gone(Scripted):
        def read(self):
            raise RobotError("unplugged")

    pilot = Pilot(Gone(None), MockRobot().spec, None, always=True)
    assert not pilot.takes_over()
    assert list(pilot.events) == ["stop"]
    assert pilot.failed == "unplugged"


LISTING = """I: Bus=0018 Vendor=06cb
N: Name="Synaptics TouchPad"
H: Handlers=mouse1 event4
B: KEY=e520 10000 0 0 0 0

I: Bus=0003 Vendor=256f Product=c635 Version=0110
N: Name="3Dconnexion SpaceMouse Compact"
H: Handlers=mouse2 event17
B: KEY=3 0 0 0 0

I: Bus=0003 Vendor=045e
N: Name="X-Box 360 pad"
H: Handlers=event9 js0
B: KEY=7cdb000000000000 0 0 0 0

N: Name="Power Button"
H: Handlers=kbd
"""


def test_devices_are_found_by_name(tmp_path):
    (tmp_path / "devices").write_text(LISTING)
    listing = tmp_path / "devices"
    assert find_device("spacemouse", [256], listing) == "/dev/input/event17"
    assert find_device("pad", [304, 311], listing) == "/dev/input/event9", "a touchpad has no such buttons"
    assert find_device("", [304, 311], listing) == "/dev/input/event9"
    assert find_device("touchpad", [], listing) == "/dev/input/event4"
    with pytest.raises(RobotError, match=r"with 'joystick' in its name: got .*X-Box.*Is it plugged in"):
        find_device("joystick", [], listing)
    with pytest.raises(RobotError, match="with these buttons"):
        find_device("", [700], listing)
    with pytest.raises(RobotError, match="no input devices"):
        find_device("pad", [], tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": {"up": "z"}}, "expected axes"),
        ({"axes": {"+z": "w"}}, "expected axes"),
        ({"buttons": {"q": "stop"}}, "expected buttons"),
        ({"buttons": {"a": "jump"}}, "expected buttons that say"),
        ({"dead": 1.0}, "dead from 0"),
    ],
)
def test_devices_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        EventDevice(**{"name": "d", "device": "/dev/null", "axes": {}, "buttons": {}, **options})


def test_the_shipped_devices_say_what_does_what():
    from brachium.cli.compose import load

    for name in ("gamepad", "spacemouse", "keyboard"):
        rows = load(f"teleop/{name}").describe()
        assert {"success"} <= {meaning for _, meaning in rows}
        assert sum(meaning in ("+x", "-x") for _, meaning in rows) >= 1


# -- the verb ----------------------------------------------------------------------------------------------------------


def test_a_person_records_by_the_command_and_goes_on_with_it(tmp_path):
    """In a terminal, with the keys that a person would press; the second time only what is missing is recorded."""
    from brachium.datasets.store import EpisodeStore

    out = tmp_path / "store"
    words = [sys.executable, "-m", "brachium", "record", "robot=mock", "teleop=keyboard", f"out={out}"]
    words += ["instruction=wave", "subtasks=[up,down]", "timing.silent_s=2.0", "freshness.age_s=1.0"]

    def session(episodes, keys):
        main, side = pty.openpty()
        process = subprocess.Popen(
            [*words, f"episodes={episodes}"], stdin=side, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        os.close(side)
        os.set_blocking(process.stdout.fileno(), False)
        said, until = "", time.monotonic() + 60
        while "meaning" not in said and time.monotonic() < until and process.poll() is None:
            said += (process.stdout.read() or b"").decode()
            time.sleep(0.05)
        time.sleep(0.5)
        for burst, seconds in keys:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                os.write(main, burst)
                time.sleep(0.05)
        assert process.wait(30) == 0, said
        os.set_blocking(process.stdout.fileno(), True)
        said += process.stdout.read().decode()
        os.close(main)
        return said

    said = session(2, [(b"w", 0.8), (b"m", 0.01), (b"a", 0.5), (b"y", 0.01), (b"s", 0.6), (b"\x1b", 0.01)])
    assert "subtask down" in said
    assert "1 to go" in said
    store = EpisodeStore.open(out)
    assert [e.success for e in store.episodes] == [True, None][: store.num_episodes]
    episode = store.episode(0)
    assert episode.info.instruction == "wave"
    assert "teleop" in episode.info.tags
    assert set(np.unique(episode.extras["subtask"])) == {0, 1}
    assert (np.diff(episode.extras["subtask"].ravel()) >= 0).all()
    assert set(np.unique(episode.extras["source"])) == {2}
    assert episode.state[-1, 0] > 0.05
    assert (np.diff(episode.timestamp) > 0).all()
    before = store.num_episodes
    said = session(
        2,
        [  # what the person broke off does not count
            (b"w", 0.5),
            (b"x", 0.01),
            (b"d", 0.6),
            (b"n", 0.01),
        ],
    )
    assert "discard" in said
    store = EpisodeStore.open(out)
    assert store.num_episodes == before + 1
    assert store.episodes[-1].success is False
    done = subprocess.run([*words, "episodes=2"], capture_output=True, text=True)
    assert "nothing to record" in done.stderr


def test_ioctls_are_those_of_the_kernel():
    """The number of EVIOCGABS(0) by the macro of asm-generic/ioctl.h."""
    from brachium.real_robot.teleop.evdev import EVIOCGABS

    read, size, kind, number = 2, struct.calcsize("6i"), ord("E"), 0x40
    assert (read << 30) | (size << 16) | (kind << 8) | number == EVIOCGABS
    assert EVENT.size == struct.calcsize("@llHHi")
    assert fcntl.ioctl is not None
