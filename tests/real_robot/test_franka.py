"""The Franka driver: against a stand-in for franky that breaks on purpose, and franky-sim where there is one."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from brachium.errors import RobotError
from brachium.policies.executor import RecedingHorizon
from brachium.real_robot.body import JointBody
from brachium.real_robot.cameras import OpenCVCamera
from brachium.real_robot.controller import Controller
from brachium.real_robot.drivers import franka
from brachium.real_robot.drivers.franka import PUBLISHED, Follower, Franka, narrowed, velocity_bounds
from brachium.real_robot.inference import Inference
from brachium.real_robot.pacing import Timing
from brachium.real_robot.safety.guard import Rules, SafetyGuard
from brachium.sim.robot import RobotModel
from brachium.spec import ActionChunk, EmbodimentSpec, FeatureSpec

HZ = 50.0
HOME = np.array([0.0, -0.785, 0.0, -2.356, 0.0, 1.571, 0.785])
SLOW = {"velocity": 1.0, "acceleration": 5.0, "jerk": 200.0}
PATIENT = {"host": "arm", "realtime": "ignore", "watchdog_s": 0.6, "stale_s": 0.4, "limits": SLOW}
"""Two to four times the patience of the defaults: other tests run beside these."""


class Folder:
    """Where the stand-in reads its trouble and writes its journal."""

    def __init__(self, path):
        self.path = path

    def trouble(self, word):
        (self.path / "new").write_text(word)
        (self.path / "new").replace(self.path / "trouble")

    def journal(self, *kinds):
        file = self.path / "journal"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if event["what"] in kinds]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The stand-in is what children import as franky."""
    shutil.copy(Path(__file__).with_name("fake_franky.py"), tmp_path / "franky.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "franky", raising=False)
    yield Folder(tmp_path)
    sys.modules.pop("franky", None)


@pytest.fixture
def link(fake):
    """The driver's link in this process."""
    made = []

    def make(**options):
        made.append(Franka(**{**PATIENT, **options})._link())
        return made[-1]

    yield make
    for one in made:
        one.close()


def until(condition, seconds=8.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


class Sway:
    """Absolute targets: every joint on a slow wave round where it began, the hand closes and opens again."""

    noise_dim, takes_guidance, action_horizon = 4, True, 8

    def __init__(self, spec, start, size=0.25):
        self.embodiment, self.start, self.size, self.begin = spec, start, size, None

    def wave(self, t):
        t = np.atleast_1d(t) - self.begin
        rows = np.tile(self.start, (len(t), 1))
        rows[:, :7] += self.size * np.sin(1.5 * t)[:, None] * np.array([1, 1, -1, 1, -1, 1, 1])
        rows[:, 7:] = np.where((t > 0.5) & (t < 1.5), 0.0, 0.9)[:, None]
        return rows

    def predict(self, observations, noise, guidance=None):
        self.begin = observations[0].timestamp if self.begin is None else self.begin
        t = observations[0].timestamp + (np.arange(8) + 1) / self.embodiment.control_hz
        return ActionChunk(actions=self.wave(t)[None].astype(np.float32), control_hz=self.embodiment.control_hz)


def embodiment(spec):
    axes = spec.axes
    common = {"shape": axes.shape, "names": axes.names, "units": axes.units, "gripper": axes.gripper}
    return EmbodimentSpec(
        name="franka",
        robot="franka",
        control_hz=20.0,
        cameras=(),
        state=FeatureSpec(name="state", **common),
        action=FeatureSpec(name="action", low=axes.low, high=axes.high, **common),
    )


def run(robot, seconds=2.0, *, between=None, size=0.25, rules=None):
    """A run through the control loop and the safety layer; `between` is done half a second after the first move."""
    robot.connect()
    spec = embodiment(robot.spec)
    policy = Sway(spec, robot.read().position, size)
    guard = SafetyGuard(robot.spec, 1 / HZ, rules=rules or Rules(reading_age_s=0.6))
    inference = Inference(policy)
    timing = Timing(control_hz=HZ, hold_s=0.6, first_s=5.0, silent_s=2.0, realtime=False)
    body = JointBody(spec, robot.spec)
    executor = RecedingHorizon(policy, execute_horizon=2)
    controller = Controller(robot, body, inference, executor, guard, timing=timing)
    began = []

    def done():
        began.append(time.monotonic())
        if between is not None and began[-1] - began[0] > 0.5 and "done" not in began:
            began.insert(1, "done")
            between()
        return ""

    outcome = controller.run("sway", seconds=seconds, done=done)
    inference.close()
    return outcome, policy


# -- before anything is connected --------------------------------------------------------------------------------------


def test_the_spec_is_known_before_connecting(monkeypatch):
    monkeypatch.setitem(sys.modules, "franky", None)
    robot = Franka(host="192.0.2.1")
    assert robot.spec.axes.names == (*(f"joint{k}" for k in range(1, 8)), "gripper")
    assert robot.spec.axes.units == ("rad",) * 7 + ("1",)
    assert robot.spec.has_gripper
    assert robot.spec.watchdog_s == 0.2
    with pytest.raises(RobotError, match="not connected"):
        robot.read()
    robot.halt("nobody there")
    robot.disconnect()
    side = OpenCVCamera(device=0, height=24, width=32)
    bare = Franka(host="192.0.2.1", hand=False, cameras={"side": side})
    assert bare.spec.camera_names == ("side",)
    assert bare.spec.dof == 7
    assert not bare.spec.has_gripper


def test_a_config_narrows_the_published_limits_and_never_widens_them():
    own = narrowed({"velocity": 1.0, "high": [9.0, 1.0, 9.0, 9.0, 9.0, 9.0, 9.0]})
    np.testing.assert_array_equal(own.velocity, np.ones(7))
    np.testing.assert_array_equal(own.high, [*PUBLISHED.high[:1], 1.0, *PUBLISHED.high[2:]])
    np.testing.assert_array_equal(narrowed({"velocity": 50.0}).velocity, PUBLISHED.velocity)
    np.testing.assert_array_equal(narrowed(None).jerk, PUBLISHED.jerk)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": {"speed": 1.0}}, "expected limits of"),
        ({"limits": {"velocity": [1.0, 2.0]}}, "one number or 7"),
        ({"realtime": "maybe"}, "enforce or ignore"),
        ({"gain": 0.0}, "gain above 0"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(RobotError, match=message):
        Franka(host="arm", **options)


def test_a_model_names_the_axes():
    names = [f"fr3_joint{k}" for k in range(1, 8)]
    model = RobotModel(name="fr3", file="fr3.xml", joints=names, home=HOME, gripper_stroke=0.04)
    robot = Franka(host="arm", model=model)
    assert robot.spec.axes.names == (*names, "gripper")
    assert robot.model is model
    with pytest.raises(RobotError, match="7 joints"):
        Franka(host="arm", model=RobotModel(name="x", file="x.xml", joints=["a"], home=[0.0], gripper_stroke=0.04))


# -- targets become velocities -----------------------------------------------------------------------------------------


def follow(follower, seconds=2.0, wobble=0.0, path=lambda t: 0.4 * np.sin(t)):
    """A first-order arm of 30 ms that is told velocities; returns how far it is off its target (n,)."""
    rng, period, step = np.random.default_rng(0), 0.02, 0.001
    position, velocity, wanted, off = HOME.copy(), np.zeros(7), np.zeros(7), []
    arrivals = np.arange(0.0, seconds, period)
    late = arrivals + rng.uniform(0.0, wobble, len(arrivals)) if wobble else arrivals
    k = 0
    for t in np.arange(0.0, seconds, step):
        if k < len(late) and t >= late[k]:
            wanted = follower.velocity(HOME + path(arrivals[k]), position, t)
            off.append(np.abs(HOME + path(arrivals[k]) - position).max())
            k += 1
        velocity = velocity + (wanted - velocity) * step / 0.03
        position = position + velocity * step
    return np.array(off)


@pytest.mark.parametrize("wobble", [0.0, 0.015])
def test_targets_are_followed_closely_also_when_they_arrive_unevenly(wobble):
    follower = Follower(4.0, PUBLISHED)
    assert follow(follower, wobble=wobble)[20:].max() < 0.02
    lazy = follow(Follower(4.0, PUBLISHED), path=lambda t: 0.4 * np.sin(t))
    assert lazy[20:].max() < 0.25 * 0.4 / 4.0, "a gain alone would lag by velocity / gain"


def test_velocities_are_cut_to_the_limits_and_to_what_the_ends_allow():
    limits = narrowed({"velocity": 0.8})
    follower = Follower(4.0, limits)
    assert np.abs(follower.velocity(HOME + 3.0, HOME, 0.0)).max() <= 0.8
    near = PUBLISHED.high - 0.05
    most = velocity_bounds(near)[1]
    assert (follower.velocity(PUBLISHED.high + 5.0, near, 0.02) <= np.minimum(most, 0.8)).all()
    for way in (-1.0, 1.0):
        beyond = np.where(way > 0, PUBLISHED.high, PUBLISHED.low) + way * 0.03
        least, most = velocity_bounds(beyond)
        assert ((most if way > 0 else -least) == 0).all(), "no way out"
        assert (way * Follower(4.0, limits).velocity(beyond + way, beyond, 0.0) < 0).all(), "the way back is free"


def test_the_way_of_a_target_is_not_its_speed_after_a_pause_or_a_jump():
    follower = Follower(4.0, PUBLISHED)
    for k in range(5):
        follower.velocity(HOME, HOME, 0.02 * k)
    after = follower.velocity(HOME + 0.01, HOME, 1.0)
    np.testing.assert_allclose(after, 0.04, atol=1e-9)
    np.testing.assert_allclose(follower.velocity(HOME + 0.01, HOME + 0.01, 1.02), 0.0, atol=1e-9)


# -- opening -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("refuse", "no arm at arm: .*FCI activated in Desk"),
        ("version", "another version"),
        ("reflex", r"joint_reflex.*robot\.recover=true"),
        ("no_hand", "hand=false without one"),
    ],
)
def test_what_cannot_be_opened_says_what_to_do(fake, link, word, message):
    fake.trouble(word)
    with pytest.raises(RobotError, match=message):
        link().open()
    assert not fake.journal("move", "recover", "hand")


def test_an_arm_that_somebody_else_holds(fake, link, monkeypatch):
    monkeypatch.setattr(franka, "CONNECT_S", 0.3)
    fake.trouble("busy")
    with pytest.raises(RobotError, match="does another program hold"):
        link().open()


def test_errors_are_cleared_only_where_that_was_asked_for(fake, link):
    fake.trouble("stays")
    with pytest.raises(RobotError, match="joint_reflex"):
        link(recover=True).open()
    fake.trouble("reflex")
    one = link(recover=True)
    one.open()
    assert len(fake.journal("recover")) == 2
    assert one.read().fault == ""


def test_a_kernel_without_real_time(fake, link, monkeypatch, tmp_path):
    monkeypatch.setattr(franka, "REALTIME", tmp_path / "none")
    with pytest.raises(RobotError, match=r"robot\.realtime=ignore"):
        link(realtime="enforce").open()
    monkeypatch.setattr(franka, "REALTIME", tmp_path)
    link(realtime="enforce").open()
    assert [event["realtime"] for event in fake.journal("connect")] == ["Enforce"]


def test_the_arm_is_told_limits_that_it_accepts(fake, link):
    link().open()
    told = {event["name"]: event["value"] for event in fake.journal("limit")}
    assert told["velocity"] == [1.0] * 7
    assert max(told["acceleration"]) <= 10.0
    assert max(told["jerk"]) <= 5000.0


# -- in use ------------------------------------------------------------------------------------------------------------


def stream(one, target, seconds):
    """As the child does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = one.read()
        if state.fault:
            return state
        one.move(target)
        time.sleep(0.01)
    return state


def test_an_arm_that_does_not_brake_is_stopped_at_once(fake, link, monkeypatch):
    monkeypatch.setattr(franka, "STOP_S", 0.1)
    one = link(hand=False, watchdog_s=5.0)
    one.open()
    stream(one, HOME + 0.3, 0.2)
    fake.trouble("no_stop")
    stream(one, HOME + 0.3, 0.1)
    one._robot.until = time.monotonic() + 60.0
    one.stop()
    assert [event["what"] for event in fake.journal("stop", "stop at once")] == ["stop", "stop at once"]
    assert one.read().fault == "", "libfranka says that it was pre-empted, as it was told"


def test_the_hand_hears_of_changes_only_and_closes_with_force(fake, link):
    one = link()
    one.open()
    opening = one.read().position[7]
    assert opening == pytest.approx(0.5)
    stream(one, np.append(HOME, opening + 0.01), 0.4)
    assert not fake.journal("hand")
    for target in (1.0, 0.03, 0.0):
        stream(one, np.append(HOME, target), 0.3)
    assert until(lambda: len(fake.journal("hand there")) == 2)
    moved, grasped = fake.journal("hand")
    assert (moved["do"], moved["width"]) == ("move", 0.08)
    assert (grasped["do"], grasped["force"], grasped["outer"]) == ("grasp", 20.0, 0.08)


def test_a_hand_that_is_held_up_is_no_fault(fake, link):
    one = link()
    one.open()
    fake.trouble("held")
    stream(one, np.append(HOME, 0.2), 1.0)
    assert [event["do"] for event in fake.journal("hand")] == ["move"]
    assert until(lambda: one.read().position[7] == pytest.approx(0.375, abs=0.01))
    stream(one, np.append(HOME, 0.0), 0.5)
    assert until(lambda: len(fake.journal("hand there")) == 1)
    assert one.read().fault == ""


def test_a_halt_lets_the_hand_end_what_it_began_and_begin_nothing(fake, link):
    one = link(hand_speed=0.05)
    one.open()
    stream(one, np.append(HOME, 1.0), 0.3)
    stream(one, np.append(HOME, 0.0), 0.1)
    one.stop()
    assert until(lambda: fake.journal("hand there"))
    time.sleep(0.4)
    assert [event["width"] for event in fake.journal("hand")] == [0.08]


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_a_run_through_controller_and_safety(fake):
    robot = Franka(**PATIENT)
    outcome, policy = run(robot, 2.5)
    child = robot.process_id
    assert outcome.ending == "time", outcome.why
    robot.disconnect()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    moves = np.array([event["v"] for event in fake.journal("move")])
    assert len(moves) > 50
    assert np.abs(moves).max() <= 1.0
    states = fake.journal("state")
    where, speed = (np.array([event[key] for event in states]) for key in ("q", "dq"))
    assert (where >= PUBLISHED.low).all()
    assert (where <= PUBLISHED.high).all()
    assert np.abs(speed).max() <= 1.0
    times = np.array([event["t"] for event in states])
    chosen = (times > policy.begin + 0.7) & (times < policy.begin + 2.2)
    off = np.abs(where[chosen] - policy.wave(times[chosen])[:, :7]).max(1)
    assert np.median(off) < 0.06, "0.25 rad of way"
    assert [event["do"] for event in fake.journal("hand")][:2] == ["move", "grasp"]
    gone = fake.journal("disconnect")
    assert len(gone) == 1
    assert np.abs(gone[0]["dq"]).max() == 0.0
    assert fake.journal("stop")[-1]["t"] < gone[0]["t"]


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("reflex", "reflex"),
        ("user_stop", "user stop"),
        ("guiding", "guided by hand"),
        ("planner", "planner failed"),
        ("silence", "clock stands still|ms old"),
        ("hand_lost", "the hand: .*Timeout"),
    ],
)
def test_whatever_breaks_ends_the_run_and_nothing_moves_after(fake, word, why):
    robot = Franka(**PATIENT)
    try:
        outcome, _ = run(robot, 20.0, between=lambda: fake.trouble(word))
        assert outcome.ending == "robot"
        assert re.search(why, outcome.why), outcome.why
        time.sleep(0.5)
        count = len(fake.journal("move", "hand"))
        with contextlib.suppress(RobotError):  # as no loop would
            robot.apply(np.append(HOME + 0.2, 1.0))
        time.sleep(0.3)
        assert len(fake.journal("move", "hand")) == count
        if word != "silence":
            assert robot.read().fault
            assert np.abs(fake.journal("state")[-1]["dq"]).max() == 0.0
    finally:
        robot.disconnect()


def test_a_loop_that_goes_silent_and_a_missing_package(fake):
    robot = Franka(**PATIENT)
    robot.rest = lambda: None  # as if the loop had died
    try:
        run(robot, 0.4)
        assert until(lambda: "watchdog" in robot.read().fault)
        assert until(lambda: np.abs(fake.journal("state")[-1]["dq"]).max() == 0.0)
    finally:
        robot.disconnect()
    (fake.path / "franky.py").write_text("raise ImportError('No module named franky')\n")
    with pytest.raises(RobotError, match=r"uv pip install 'brachium\[franka\]'"):
        robot.connect()


# -- franky itself, and its simulator ----------------------------------------------------------------------------------

SIMULATOR = os.environ.get("FRANKY_SIM") or shutil.which("franky-sim")
needs_simulator = pytest.mark.skipif(
    not SIMULATOR or importlib.util.find_spec("franky") is None,
    reason="type: uv pip install 'brachium[franka]', and install franky-sim into an environment of its own (its mujoco "
    "is newer); FRANKY_SIM=/path/to/that/bin/franky-sim",
)
_hosts = iter(range(1, 250))
_hosts_lock = threading.Lock()


@pytest.fixture
def simulator():
    with _hosts_lock:
        host = f"127.0.{40 + os.getpid() % 200}.{next(_hosts)}"
    words = [SIMULATOR, "--hostname", host, "-s", "mujoco"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    threading.Thread(target=lambda: said.extend(process.stdout), daemon=True).start()
    process.host = host
    yield process
    process.kill()
    process.wait()


def connected(process, **options):
    """The driver, once the simulator listens."""
    robot, end = Franka(**{**PATIENT, "host": process.host, **options}), time.monotonic() + 40.0
    while True:
        try:
            robot.connect()
            return robot
        except RobotError as error:
            if time.monotonic() > end or process.poll() is not None or "no arm" not in str(error):
                raise
            time.sleep(0.3)


@needs_simulator
def test_the_simulator_follows(simulator):
    robot = connected(simulator)
    try:
        seen, read = [], robot.read
        robot.read = lambda: seen.append(read()) or seen[-1]
        outcome, policy = run(robot, 2.5)
        assert outcome.ending == "time", outcome.why
        assert outcome.telemetry.summary()["starved_ticks"] == 0
        times = np.array([reading.timestamp for reading in seen])
        where = np.array([reading.position for reading in seen])
        chosen = (times > policy.begin + 0.7) & (times < policy.begin + 2.2)
        off = np.abs(where[chosen, :7] - policy.wave(times[chosen])[:, :7]).max(1)
        print(f"median {np.median(off) * 1e3:.1f} mrad, worst {off.max() * 1e3:.1f} mrad off")
        assert np.median(off) < 0.08
        assert where[:, 7].max() > 0.7, "the hand opens; its simulation takes seconds for the last millimetres"
        robot.read = read
        child = robot.process_id
        robot.disconnect()
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
        robot.connect()  # the simulator takes the next one: it was let go of
        first = robot.read().position
        time.sleep(0.5)  # its velocity of joint 7 chatters, also when nobody ever moved it
        np.testing.assert_allclose(robot.read().position[:7], first[:7], atol=3e-3)

        def closed():
            robot.apply(np.append(first[:7], 0.0))
            return robot.read().position[7] < 0.3

        assert until(closed, 15.0)
    finally:
        robot.disconnect()


@needs_simulator
def test_the_simulator_is_killed(simulator):
    robot = connected(simulator, hand=False)
    try:
        outcome, _ = run(robot, 20.0, between=simulator.kill)
        assert outcome.ending == "robot"
        with pytest.raises(RobotError, match="lost"):
            robot.apply(HOME)
    finally:
        robot.disconnect()


def test_nobody_at_an_address():
    if importlib.util.find_spec("franky") is None:
        pytest.skip("type: uv pip install 'brachium[franka]'")
    with pytest.raises(RobotError, match=r"no arm at 127\.0\.77\.77") as caught:
        Franka(host="127.0.77.77", realtime="ignore").connect()
    assert len(str(caught.value).splitlines()[0]) < 300
