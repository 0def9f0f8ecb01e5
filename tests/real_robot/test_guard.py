"""The safety layer: what comes out for any input, what is written down, and that it cannot be gone around."""

import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.errors import ConfigError, RobotError, SafetyError
from brachium.real_robot.drivers.mock import MockRobot
from brachium.real_robot.robot import Robot, Watch
from brachium.real_robot.safety.command import SafeCommand
from brachium.real_robot.safety.guard import FORGIVEN, Log, Rules, SafetyGuard
from brachium.real_robot.safety.stop import EmergencyStop, SignalStop
from brachium.real_robot.safety.zones import Box, KeepOut, ModelCheck, model_check
from brachium.real_robot.spec import Reading, RobotSpec
from brachium.spec import FeatureSpec

from .test_motion import assert_within

PERIOD = 0.02


def reading(position, now=0.0, **options):
    position = np.asarray(position, float)
    return Reading(position=position, velocity=np.zeros_like(position), timestamp=now, **options)


def started(robot=None, **options):
    robot = robot or MockRobot()
    guard = SafetyGuard(robot.spec, PERIOD, **options)
    guard.start(reading(np.zeros(robot.spec.dof)), 0.0)
    return guard


def follow(guard, targets, *, faults=None):
    """Positions of the commands for targets, one a tick, of a robot that is where it is commanded to be."""
    seen = [guard.motion.position]
    for k, target in enumerate(targets):
        now = k * PERIOD
        command = guard.command(target, reading(guard.motion.position, now), now)
        seen.append(command.position)
    return seen


wild = st.one_of(st.floats(-10, 10), st.sampled_from([np.nan, np.inf, -np.inf, 1e300, -1e300]))


@settings(max_examples=80)
@given(st.lists(st.one_of(st.none(), st.lists(wild, min_size=3, max_size=5)), min_size=1, max_size=60))
def test_whatever_is_asked_for_the_commands_are_within_limits(targets):
    guard = started()
    given_ = [None if t is None else np.array(t) for t in targets]
    seen = follow(guard, given_ + [None] * 150)
    assert_within(seen, guard.limits, PERIOD)
    assert np.isfinite(seen).all()
    assert guard.motion.is_resting


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_the_tool_never_leaves_its_workspace_nor_enters_a_zone(arm, seed):
    """Random targets; judged by the same model's kinematics on every command, not by the guard's own word."""
    spec, model = arm
    box = Box(low=(0.15, -0.3, 0.03), high=(0.55, 0.3, 0.5))
    zone = KeepOut(name="post", shape="cylinder", size=(0.03, 0.3), position=(0.42, 0.2, 0.3))
    check = ModelCheck(model, workspace=box, keep_out=[zone])
    judge = ModelCheck(model, workspace=box, keep_out=[zone])
    guard = SafetyGuard(spec, PERIOD, check=check)
    guard.start(reading(np.append(model.home, 1.0)), 0.0)
    rng = np.random.default_rng(seed)
    target = guard.motion.position
    for k in range(100):
        if k % 12 == 0:
            target = np.clip(guard.motion.position + rng.normal(0, 0.8, spec.dof), spec.limits.low, spec.limits.high)
        command = guard.command(target, reading(guard.motion.position, k * PERIOD), k * PERIOD)
        assert judge.check(command.position) == ""


@pytest.fixture(scope="module")
def arm(make_arm):
    from brachium.real_robot.drivers.mujoco_twin import twin_spec

    body = make_arm("arm6_ee")
    return twin_spec(body, (2.5, 15.0, 300.0), (8.0, 100.0, 4000.0), 0.15, 30.0), body.robot


# -- what is noticed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fault": "motor 3 is hot"}, "motor 3 is hot"),
        ({"timestamp": -1.0}, "ms old"),
        ({"timestamp": 5.0}, "ms old"),
        ({"position": np.full(4, np.nan)}, "not finite"),
        ({"velocity": np.full(4, np.inf)}, "not finite"),
        ({"position": np.zeros(3)}, "4 axes"),
        ({"position": np.array([0.9, 0, 0, 0])}, "off its command"),
    ],
)
def test_a_robot_that_is_not_well_is_stopped(change, why):
    guard = started()
    follow(guard, [np.array([0.5, 0.5, 0.5, 1.0])] * 10)
    now = 10 * PERIOD
    bad = {"position": guard.motion.position, "velocity": np.zeros(4), "timestamp": now, **change}
    if change.get("timestamp") == -1.0:
        bad["timestamp"] = now - 1.0
    seen = [guard.motion.position]
    for _ in range(200):
        seen.append(guard.command(np.ones(4), Reading(**bad), now).position)
    assert guard.state == "stopped"
    assert why in guard.why
    assert guard.motion.is_resting
    np.testing.assert_array_equal(seen[-1], seen[-2])


def test_a_gripper_is_held_up_by_what_it_holds():
    guard = started()
    held = guard.motion.position + np.array([0, 0, 0, 0.9])
    guard.command(None, reading(held), 0.0)
    assert guard.state == "running"


def test_targets_that_are_none_are_forgiven_for_a_moment():
    guard = started()
    bad = np.full(4, np.nan)
    follow(guard, [bad] * FORGIVEN)
    assert guard.state == "running"
    follow(guard, [np.zeros(4)])
    follow(guard, [bad] * (FORGIVEN + 1))
    assert guard.state != "running"
    assert "not finite" in guard.why
    assert guard.log.entries[0].kind == "not finite"


@pytest.mark.parametrize(
    ("position", "options", "why"),
    [
        ([2.5, 0, 0, 0], {}, "j1 is outside its limits"),
        ([0, 0, 0, 0], {"fault": "e-stop"}, "e-stop"),
        ([0, np.nan, 0, 0], {}, "not finite"),
    ],
)
def test_no_start_from_a_bad_place(position, options, why):
    guard = SafetyGuard(MockRobot().spec, PERIOD)
    with pytest.raises(SafetyError, match=why):
        guard.start(reading(position, **options), 0.0)
    with pytest.raises(SafetyError, match="moving"):
        guard.start(Reading(position=np.zeros(4), velocity=np.ones(4), timestamp=0.0), 0.0)
    assert guard.state == "stopped"


def test_interventions_are_written_down_with_reasons_and_merged():
    guard = started(rules=Rules(step=0.1))
    follow(guard, [np.array([9.0, 0, 0, 0])] * 20)
    kinds = {entry.kind: entry for entry in guard.log.entries}
    assert kinds["step"].ticks == 20
    assert kinds["step"].detail.startswith("j1")
    assert kinds["step"].worst == pytest.approx(8.9, abs=0.1)
    log = Log(pause=0.5)
    for now in (0.0, 0.1, 0.2, 3.0):
        log.add("x", "d", now)
    assert [(e.first, e.last, e.ticks) for e in log.entries] == [(0.0, 0.2, 3), (3.0, 3.0, 1)]
    assert log.counts() == {"x": 2}


# -- the emergency stop ------------------------------------------------------------------------------------------------


def test_an_emergency_stop_brakes_within_limits_and_stays():
    stop = EmergencyStop()
    guard = started(stop=stop)
    seen = follow(guard, [np.array([1.5, -1.5, 1.5, 1.0])] * 15)
    stop.press("somebody screamed")
    seen += follow(guard, [np.array([-1.5, 1.5, -1.5, 0.0])] * 200)[1:]
    assert_within(seen, guard.limits, PERIOD)
    assert (guard.state, guard.kind, guard.why) == ("stopped", "emergency stop", "somebody screamed")
    np.testing.assert_array_equal(seen[-1], seen[-50])
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(seen[-1], seen[15])  # it took a way to come to rest


@pytest.mark.parametrize(("hook", "why"), [(lambda: "light curtain", "light curtain"), (lambda: 1 / 0, "hook failed")])
def test_hooks_press_it_and_so_does_one_that_fails(hook, why):
    stop = EmergencyStop([lambda: "", hook])
    assert why in stop.poll()
    stop.press("later")
    assert why in stop.why, "the first reason is kept"
    stop.reset()
    assert EmergencyStop().poll() == ""


def test_signals_press_it_and_the_second_ctrl_c_is_pythons():
    stop, before = EmergencyStop(), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with SignalStop(stop):
            signal.raise_signal(signal.SIGINT)
            assert stop.why == "Ctrl-C"
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        stop.reset()
        with SignalStop(stop):
            signal.raise_signal(signal.SIGTERM)
            assert "SIGTERM" in stop.why
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# -- no way around -----------------------------------------------------------------------------------------------------


def test_a_robot_takes_nothing_but_commands_of_the_safety_layer():
    robot = MockRobot()
    robot.connect()
    for thing in (np.zeros(4), [0, 0, 0, 0], None, type("SafeCommand", (), {"position": np.zeros(4), "number": 1})()):
        with pytest.raises(SafetyError, match="command of the safety layer"):
            robot.send(thing)
    with pytest.raises(SafetyError, match="made by a SafetyGuard"):
        SafeCommand(object(), np.zeros(4))
    assert not robot.commands


def test_commands_are_for_one_robot_and_one_time():
    robot, other = MockRobot(), MockRobot(axes=("a",))
    robot.connect()
    guard = started(robot)
    first = guard.command(None, reading(np.zeros(4)), 0.0)
    second = guard.command(None, reading(np.zeros(4)), 0.0)
    robot.send(second)
    for late in (first, second):
        with pytest.raises(SafetyError, match="once and in order"):
            robot.send(late)
    with pytest.raises(SafetyError, match="expected 2 axes"):
        other.send(guard.command(None, reading(np.zeros(4)), 0.0))
    with pytest.raises(ValueError, match="read-only"):
        second.position[0] = 1.0


def test_commands_that_come_too_fast_are_left_out():
    robot = MockRobot()
    robot.connect()
    guard = started(robot)
    for _ in range(100):
        robot.send(guard.command(None, reading(np.zeros(4)), 0.0))
    assert len(robot.commands) < 50


def test_a_driver_cannot_replace_send():
    with pytest.raises(TypeError, match="apply"):

        class Sneaky(Robot):
            def send(self, command):
                pass


@pytest.mark.parametrize(
    "options",
    [
        {"speed": 0.0},
        {"speed": 2.0},
        {"speed": None},
        {"reading_age_s": float("inf")},
        {"reading_age_s": 60.0},
        {"following": 0.0},
        {"following": float("nan")},
        {"following": 9.0},
        {"step": -1.0},
    ],
)
def test_no_rule_can_be_switched_off_by_config(options):
    with pytest.raises(RobotError, match="safety rules"):
        Rules(**options)


def test_configured_limits_only_narrow():
    spec = MockRobot().spec
    wide = Rules(limits={"velocity": [99.0] * 4, "low": [-99.0] * 4}).tighten(spec.limits)
    np.testing.assert_array_equal(wide.velocity, spec.limits.velocity)
    np.testing.assert_array_equal(wide.low, spec.limits.low)
    slow = Rules(limits={"velocity": [0.1] * 4}, speed=0.5).tighten(spec.limits)
    np.testing.assert_allclose(slow.velocity, 0.05)
    with pytest.raises(RobotError, match="no limits called"):
        Rules(limits={"speed": [1.0]}).tighten(spec.limits)


def axes(**change):
    good = {"name": "a", "shape": (2,), "names": ("x", "y"), "units": ("rad", "m"), "low": (-1, -1), "high": (1, 1)}
    return FeatureSpec(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"axes": axes(low=(), high=())}, "expected low of its axes"),
        ({"axes": axes(units=())}, "expected units"),
        ({"axes": axes(units=("deg", "m"))}, "convert in the driver"),
        ({"axes": axes(reference="delta")}, "absolute axes"),
        ({"velocity": ()}, "velocity limit for each of 2"),
        ({"jerk": (1.0,)}, "jerk limit for each of 2"),
        ({"acceleration": (1.0, float("inf"))}, "finite acceleration"),
        ({"command_hz": 0.0}, "command_hz above 0"),
        ({"watchdog_s": 0.0}, "watchdog_s above 0"),
    ],
)
def test_a_spec_without_limits_is_none(change, complaint):
    good = {
        "name": "r",
        "axes": axes(),
        "velocity": (1.0, 1.0),
        "acceleration": (1.0, 1.0),
        "jerk": (1.0, 1.0),
        "command_hz": 100.0,
        "state_hz": 100.0,
    }
    RobotSpec(**good)
    with pytest.raises(RobotError, match=complaint):
        RobotSpec(**{**good, **change})


def test_a_loop_that_hangs_has_its_robot_halted():
    robot = MockRobot()
    robot.connect()
    with Watch(robot, 0.1) as watch:
        for _ in range(10):
            watch.beat()
            time.sleep(0.02)
        assert not robot.halts
        deadline = time.monotonic() + 5.0
        while not watch.fired and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "silent" in robot.halts[0]
    assert len(robot.halts) == 1


# -- zones -------------------------------------------------------------------------------------------------------------


def test_demonstrations_are_where_a_robot_may_be(make_env):
    """Every measured and commanded position of the experts passes: no false alarms."""
    for task in ("reach", "push", "place", "stack"):
        env = make_env(task, images=False)
        check = ModelCheck(env.embodiment.robot)
        stroke = env.embodiment.robot.gripper_stroke
        for seed in range(2):
            env.reset(seed=seed)
            for _ in range(60):
                _, _, over, _, _ = env.step(env.expert_action())
                controls = env.sim.data.ctrl[env.sim._actuators]
                assert check.check(np.append(controls[:-1], controls[-1] / stroke)) == ""
                assert check.check(np.append(env.sim.data.qpos[env.sim._qpos], env.sim.gripper_opening)) == ""
                if over:
                    break


def test_what_the_check_says(arm):
    spec, model = arm
    home = np.append(model.home, 1.0)
    assert ModelCheck(model).check(home) == ""
    high_table = ModelCheck(model, table_height=0.5)
    assert "would touch the table" in high_table.check(home) or "the table would touch" in high_table.check(home)
    box = ModelCheck(model, workspace=Box(low=(-1, -1, 0.0), high=(1, 1, 0.1)))
    assert "workspace to 0.1 m" in box.check(home)
    place = np.asarray(box._data.site_xpos[box._site])
    zone = KeepOut(name="lamp", shape="sphere", size=(0.05,), position=tuple(place))
    assert "lamp" in ModelCheck(model, keep_out=[zone]).check(home)
    alone, rng = ModelCheck(model, table_height=None), np.random.default_rng(0)
    low, high = spec.limits.low, spec.limits.high
    said = {alone.check(rng.uniform(low, high)) for _ in range(500)}
    assert any("base would touch" in each for each in said), "an arm can hit its own base"


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Box(low=(0, 0, 0), high=(1, 1, 0)), "low below high"),
        (lambda: Box(low=(0, 0), high=(1, 1, 1)), "three finite"),
        (lambda: Box(low=(0, 0, 0), high=(1, 1, float("inf"))), "three finite"),
        (lambda: ModelCheck(None, workspace={"low": [0, 0, 0]}), r"expected .*high"),
        (lambda: KeepOut(name="x", shape="cube", size=(1,), position=(0, 0, 0)), "shape and its sizes"),
        (lambda: KeepOut(name="x", shape="sphere", size=(1, 2), position=(0, 0, 0)), "shape and its sizes"),
        (lambda: KeepOut(name="x", shape="sphere", size=(0,), position=(0, 0, 0)), "above 0"),
        (
            lambda: model_check(MockRobot().spec, None, workspace=Box(low=(0, 0, 0), high=(1, 1, 1))),
            "need a MuJoCo model",
        ),
    ],
)
def test_zones_that_are_none(make, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make()


def test_a_model_of_another_robot_is_refused(arm):
    with pytest.raises(ConfigError, match="has the joints"):
        model_check(MockRobot().spec, arm[1])
