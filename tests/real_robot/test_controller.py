"""The control loop with the mock robot: time, plans, starvation, people, and what stops it."""

import time

import numpy as np
import pytest

from brachium.errors import ConfigError, RobotError, ServerError
from brachium.policies.executor import RealTimeChunking, RecedingHorizon, TemporalEnsemble
from brachium.real_robot.body import JointBody
from brachium.real_robot.controller import Controller, steady
from brachium.real_robot.drivers.mock import MockRobot
from brachium.real_robot.eyes import Eyes, Freshness
from brachium.real_robot.inference import Inference
from brachium.real_robot.pacing import Timing
from brachium.real_robot.safety.guard import SafetyGuard
from brachium.real_robot.safety.stop import EmergencyStop
from brachium.real_robot.spec import Frame, Reading
from brachium.spec import ActionChunk, EmbodimentSpec, FeatureSpec

from .test_motion import assert_within

HORIZON = 8


def embodiment(robot, control_hz=20.0):
    axes = robot.spec.axes
    common = {"shape": axes.shape, "names": axes.names, "units": axes.units, "gripper": axes.gripper}
    return EmbodimentSpec(
        name="mock",
        robot="mock",
        control_hz=control_hz,
        cameras=robot.spec.cameras,
        state=FeatureSpec(name="state", **common),
        action=FeatureSpec(name="action", low=axes.low, high=axes.high, **common),
    )


class WavePolicy:
    """Absolute targets on a slow wave of the time of what was seen."""

    noise_dim, takes_guidance = 4, True

    def __init__(self, spec, *, seconds=0.0, fail_after=None, answer=None):
        self.embodiment, self.action_horizon = spec, HORIZON
        self.seconds, self.fail_after, self.answer, self.asked, self.guides = seconds, fail_after, answer, 0, []
        self.begin = None

    def wave(self, t):
        """Where the axes are to be at a time, from the first observation on: the first ones at 0.4 rad/s at first."""
        t = t - self.begin
        return np.stack([0.8 * np.sin(0.5 * t), 0.2 * np.sin(t), 0.2 * np.sin(1.3 * t), 0.4 * np.sin(t) ** 2], -1)

    def predict(self, observations, noise, guidance=None):
        self.begin = observations[0].timestamp if self.begin is None else self.begin
        self.asked += 1
        self.guides.append(guidance)
        time.sleep(self.seconds)
        if self.fail_after is not None and self.asked > self.fail_after:
            raise ServerError("the server is gone")
        t = observations[0].timestamp + (np.arange(HORIZON) + 1) / self.embodiment.control_hz
        actions = self.wave(t)[None].astype(np.float32)
        if self.answer is not None:
            actions = self.answer(actions)
        return ActionChunk(actions=actions, control_hz=self.embodiment.control_hz)


def build(
    *, policy=None, executor=RecedingHorizon, robot=None, rules=None, stop=None, delay_s=0.0, options=None, **rest
):
    robot = robot or MockRobot()
    robot.connect()
    spec = embodiment(robot)
    policy = policy or WavePolicy(spec)
    policy.embodiment = spec
    inference = Inference(policy, delay_s=delay_s)
    hz = 100.0
    guard = SafetyGuard(robot.spec, 1 / hz, rules=rules, stop=stop)
    controller = Controller(
        robot,
        JointBody(spec, robot.spec),
        inference,
        executor(policy, **(options or {})),
        guard,
        timing=Timing(control_hz=hz, hold_s=0.3, first_s=2.0, realtime=False),
        **rest,
    )
    return controller, robot, policy


def commands(robot):
    return np.array([position for _, position in robot.commands])


@pytest.mark.parametrize("executor", [RecedingHorizon, TemporalEnsemble, RealTimeChunking])
@pytest.mark.parametrize("delay_s", [0.0, 0.12])
def test_the_robot_does_what_is_meant_for_now_however_late_the_chunk_is(executor, delay_s):
    """The wave is of the time: an executor that ran a late chunk from its beginning would lag by the delay."""
    options = {"execute_horizon": 2} if executor is not TemporalEnsemble else {}
    controller, robot, policy = build(executor=executor, delay_s=delay_s, options=options)
    outcome = controller.run("wave", seconds=1.5)
    assert outcome.ending == "time"
    telemetry = controller.telemetry
    assert telemetry.starved == 0
    ages = [age for age in telemetry.ticks["age"] if age >= 0]
    assert np.median(ages) > delay_s
    moments = np.array([t for t, _ in robot.commands])
    late = moments > moments[0] + delay_s + 0.7
    braking = moments > moments[-1] - 0.4
    chosen = late & ~braking
    assert chosen.sum() > 30
    error = np.abs(commands(robot)[chosen] - policy.wave(moments[chosen]))[:, 0].mean()
    delayed = np.abs(policy.wave(moments[chosen] - 0.12) - policy.wave(moments[chosen]))[:, 0].mean()
    assert error < 0.7 * delayed, "the way of the wave during the delay"
    assert_within(commands(robot), controller.guard.limits, 1 / 100.0)
    if executor is RealTimeChunking:
        assert any(guide is not None and guide[0] is not None for guide in policy.guides)


def test_the_loop_keeps_its_grid():
    controller, _robot, _ = build()
    outcome = controller.run("wave", seconds=1.0)
    summary = outcome.telemetry.summary()
    start = np.array(outcome.telemetry.ticks["start"])
    steps = np.round((start - start[0]) * 100.0)
    assert np.abs((start - start[0]) * 100.0 - steps).max() < 0.51, "every tick is on the grid of deadlines: no drift"
    assert summary["ticks"] + summary["skipped"] == pytest.approx(steps[-1] + 1, abs=1)
    assert set(summary["share"]) == {"hold", "policy", "human"}


def test_without_a_plan_the_robot_holds_and_then_stops_for_good():
    robot = MockRobot()
    policy = WavePolicy(embodiment(robot), fail_after=4)
    controller, robot, _ = build(policy=policy, robot=robot)
    outcome = controller.run("wave", seconds=30.0)
    assert outcome.ending == "starved"
    assert "the server is gone" in outcome.why
    assert outcome.seconds < 5.0
    assert controller.telemetry.starved > 5
    assert_within(commands(robot), controller.guard.limits, 1 / 100.0)
    np.testing.assert_allclose(commands(robot)[-1], commands(robot)[-2], atol=1e-6)


def test_a_policy_that_never_answers_moves_nothing():
    robot = MockRobot()
    controller, robot, _ = build(policy=WavePolicy(embodiment(robot), fail_after=0), robot=robot)
    outcome = controller.run("wave", seconds=30.0)
    assert outcome.ending == "starved"
    np.testing.assert_allclose(commands(robot), 0.0, atol=1e-9)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda a: a * np.nan, "target"),
        (lambda a: a * np.float32(1e30), "position"),
        (lambda a: a + 1e3 * np.sign(np.sin(1e6 * a)), "position"),
    ],
    ids=["NaN", "huge", "alternating"],
)
def test_chunks_that_are_mad_do_no_harm(answer, kind):
    robot = MockRobot()
    policy = WavePolicy(embodiment(robot), answer=answer)
    controller, robot, _ = build(policy=policy, robot=robot)
    controller.run("wave", seconds=0.7)
    assert_within(commands(robot), controller.guard.limits, 1 / 100.0)
    assert kind in controller.guard.log.counts()


def test_an_emergency_stop_ends_the_run():
    stop = EmergencyStop()
    controller, robot, _ = build(stop=stop)

    def done():
        if len(robot.commands) > 60:
            stop.press("button")
        return ""

    outcome = controller.run("wave", seconds=30.0, done=done)
    assert (outcome.ending, outcome.why) == ("emergency stop", "button")
    assert_within(commands(robot), controller.guard.limits, 1 / 100.0)


def test_a_robot_that_goes_away_is_halted():
    robot = MockRobot()
    controller, robot, _ = build(robot=robot)
    read, count = robot.read, iter(range(10**6))

    def flaky():
        if next(count) > 80:
            raise RobotError("cable pulled")
        return read()

    robot.read = flaky
    outcome = controller.run("wave", seconds=30.0)
    assert (outcome.ending, outcome.why) == ("robot", "cable pulled")
    assert robot.halts == ["cable pulled"]


def test_a_crash_of_the_loop_halts_the_robot():
    controller, robot, _ = build()

    def done():
        if len(robot.commands) > 20:
            raise KeyError("a bug")
        return ""

    with pytest.raises(KeyError):
        controller.run("wave", seconds=30.0, done=done)
    assert "a bug" in robot.halts[0]


def test_a_shadow_moves_nothing_and_a_step_waits():
    controller, robot, policy = build(mode="shadow")
    outcome = controller.run("wave", seconds=0.5)
    assert outcome.ending == "time"
    assert not robot.commands
    assert policy.asked > 1
    allowed = []
    controller, robot, policy = build(mode="step", confirm=lambda: bool(allowed), options={"execute_horizon": 4})

    def done():
        if policy.asked and len(robot.commands) == 60:
            allowed.append(True)
        return "enough" if len(robot.commands) > 120 else ""

    controller.run("wave", seconds=30.0, done=done)
    path = commands(robot)
    np.testing.assert_allclose(path[:55], 0.0, atol=1e-9)
    assert np.abs(path[-1]).max() > 0.05


class Person:
    def __init__(self, begin, end):
        self.begin, self.end, self.ticks = begin, end, 0

    def takes_over(self):
        self.ticks += 1
        return self.begin <= self.ticks < self.end

    def target(self, commanded, period):
        return commanded + np.array([0.1, 0.0, 0.0, 0.0])


class Notes:
    def __init__(self):
        self.steps = []

    def step(self, step):
        self.steps.append(step)


def test_a_person_takes_over_and_gives_back():
    notes = Notes()
    controller, robot, _ = build(human=Person(60, 120), listener=notes)
    controller.run("wave", seconds=1.8)
    sources = [step.source for step in notes.steps]
    assert {1, 2} <= set(sources)
    assert sources[-1] == 1, "the policy goes on when the person lets go"
    assert_within(commands(robot), controller.guard.limits, 1 / 100.0)
    human = [step for step in notes.steps if step.source == 2]
    np.testing.assert_array_less(0.0, np.diff([step.command[0] for step in human[4:]]))
    for step in notes.steps:
        np.testing.assert_allclose(step.action, step.command, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"mode": "fly"}, "mode to be one of"),
        ({"mode": "step"}, "somebody who confirms"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        build(**options)


@pytest.mark.parametrize("key", ["control_hz", "hold_s", "first_s", "silent_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "fast"])
def test_timing_is_checked(key, value):
    with pytest.raises(ConfigError, match=key):
        Timing(**{key: value})


def test_a_rate_the_robot_does_not_take_is_refused():
    robot = MockRobot()
    spec = embodiment(robot)
    policy = WavePolicy(spec)
    with pytest.raises(ConfigError, match="at most 500 commands"):
        Controller(
            robot,
            JointBody(spec, robot.spec),
            Inference(policy),
            RecedingHorizon(policy),
            SafetyGuard(robot.spec, 1e-3),
            timing=Timing(control_hz=1000.0),
        )


def test_steady_is_minmod():
    got = steady(np.array([1.0, -2.0, 3.0, 0.0]), np.array([2.0, -1.0, -3.0, 5.0]))
    np.testing.assert_array_equal(got, [1.0, -1.0, 0.0, 0.0])


# -- eyes --------------------------------------------------------------------------------------------------------------


def eyes(**freshness):
    robot = MockRobot(cameras=("front", "wrist"))
    return Eyes(JointBody(embodiment(robot), robot.spec), Freshness(**freshness)), robot


def shot(now, value=0, position=0.0, cameras=("front", "wrist"), ages=(0.0, 0.0)):
    frames = {
        name: Frame(image=np.full((32, 32, 3), value, np.uint8), timestamp=now - age)
        for name, age in zip(cameras, ages)
    }
    return Reading(position=np.full(4, position), velocity=np.zeros(4), timestamp=now, frames=frames)


def test_an_observation_is_as_of_its_oldest_frame():
    look, _ = eyes()
    for k in range(20):
        look.look(shot(10.0 + 0.01 * k, k, position=0.001 * k, ages=(0.03, 0.05)))
    seen = look.observe("go")
    assert seen.timestamp == pytest.approx(10.19 - 0.05)
    np.testing.assert_allclose(seen.state, 0.014, atol=1e-6)
    assert look.problem(10.2) == ""


@pytest.mark.parametrize(
    ("readings", "now", "complaint"),
    [
        ([], 0.0, "no frame of front, wrist"),
        ([shot(1.0, cameras=("front",))], 1.0, "no frame of wrist"),
        ([shot(1.0)], 2.0, "1000 ms old"),
        ([shot(9.0)], 2.0, "-7000 ms old"),
        ([shot(1.0, ages=(0.0, 0.15))], 1.0, "150 ms apart"),
    ],
)
def test_stale_observations_are_refused(readings, now, complaint):
    look, _ = eyes()
    for each in readings:
        look.look(each)
    assert complaint in look.problem(now)


def test_a_frozen_camera_is_noticed_when_the_robot_moves():
    look, _ = eyes()
    for k in range(60):
        look.look(shot(1.0 + 0.02 * k, value=7, position=0.0))
    assert look.problem(2.19) == "", "a scene in which nothing moves is no fault"
    for k in range(10):
        look.look(shot(2.2 + 0.02 * k, value=7, position=0.02 * k))
    assert "frozen" in look.problem(2.4)
    for k in range(10):  # it comes back: the picture should have changed meanwhile
        look.look(shot(2.4 + 0.01 * k, value=7, position=0.2 - 0.02 * k))
    assert "frozen" in look.problem(2.5)
    look.look(shot(2.5, value=8, position=0.2))
    assert look.problem(2.5) == ""
