"""The twin in its own process: a robot that goes on whatever becomes of who controls it; judged by its own journal."""

import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from brachium.errors import RobotError
from brachium.policies.executor import RecedingHorizon
from brachium.real_robot.body import ArmBody
from brachium.real_robot.controller import Controller
from brachium.real_robot.drivers.mujoco_twin import MujocoTwin
from brachium.real_robot.eyes import Freshness
from brachium.real_robot.inference import Inference
from brachium.real_robot.pacing import Timing
from brachium.real_robot.preflight import FAIL, preflight
from brachium.real_robot.safety.guard import Rules, SafetyGuard
from brachium.real_robot.safety.zones import ModelCheck
from brachium.real_robot.twin import KEY_VARIABLE
from brachium.spec import ActionChunk

HZ = 50.0
PATIENCE_S = 0.4
"""Two to three times what deploy allows: other tests run beside these, and what is tested is not this machine."""


@pytest.fixture(scope="module")
def factory():
    from brachium.cli.compose import load

    return load("env/tabletop/reach")


@pytest.fixture(scope="module")
def twin(factory):
    robot = MujocoTwin(env=factory, watchdog_s=PATIENCE_S)
    robot.connect()
    yield robot
    robot.disconnect()


class Circle:
    """Small end-effector deltas round a circle."""

    noise_dim, takes_guidance, action_horizon = 7, True, 8

    def __init__(self, spec):
        self.embodiment = spec

    def predict(self, observations, noise, guidance=None):
        t = observations[0].timestamp + np.arange(8) / self.embodiment.control_hz
        actions = np.zeros((1, 8, 7), np.float32)
        actions[0, :, 0], actions[0, :, 1] = 0.02 * np.cos(3 * t), 0.02 * np.sin(3 * t)
        actions[0, :, 6] = 1.0
        return ActionChunk(actions=actions, control_hz=self.embodiment.control_hz)


def run(robot, seconds=1.0, *, between=None, at=0.5, **timing):
    """A run on an episode of its own; `between` is done `at` seconds after its first tick."""
    robot.inject()
    robot.release()
    robot.reset(3)
    body = ArmBody(robot.body)
    policy = Circle(body.embodiment)
    rules = Rules(reading_age_s=PATIENCE_S)
    guard = SafetyGuard(robot.spec, 1 / HZ, rules=rules, check=ModelCheck(robot.model))
    inference = Inference(policy)
    controller = Controller(
        robot,
        body,
        inference,
        RecedingHorizon(policy, execute_horizon=2),
        guard,
        timing=Timing(**{"control_hz": HZ, "hold_s": 0.3, "silent_s": 1.0, **timing}),
        freshness=Freshness(age_s=PATIENCE_S, frozen_s=0.3),
    )
    began, did = [], []

    def done():
        began.append(time.monotonic())  # the first tick: how long the start takes says nothing
        if between is not None and not did and began[-1] - began[0] > at:
            did.append(True)
            between()
        return ""

    outcome = controller.run("go", seconds=seconds, done=done)
    inference.close()
    return outcome, guard


def assert_journal_within(robot, outcome):
    """Commands as the twin received them, and where it was: inside every limit."""
    journal = robot.journal()
    begin = outcome.telemetry.ticks["start"][0]
    received = journal["commands"]
    mine = received[1] >= begin
    path, sent = received[3][mine], received[1][mine]
    limits = robot.spec.limits
    assert len(path) > 3
    assert (path >= limits.low - 1e-9).all()
    assert (path <= limits.high + 1e-9).all()
    ticks = np.maximum(1, np.round(np.diff(sent) * HZ))[:, None] / HZ
    assert (np.abs(np.diff(path, axis=0)) <= limits.velocity * ticks * 1.001).all()
    where = np.array(journal["readings"][1])
    assert (where[:, :-1] >= limits.low[:-1] - 0.02).all()
    assert (where[:, :-1] <= limits.high[:-1] + 0.02).all()
    return path


def test_the_spec_is_known_before_connecting(factory):
    robot = MujocoTwin(env=factory)
    assert robot.spec.axes.names[-1] == "gripper"
    assert robot.spec.camera_names == ("front", "wrist")
    assert len(robot.spec.describe()) == 7
    with pytest.raises(RobotError, match="not connected"):
        robot.read()
    robot.halt("nobody there")  # may be called at any time
    robot.disconnect()


def test_it_moves_as_it_is_told_and_reports_in_time(twin):
    outcome, _ = run(twin)
    assert outcome.ending == "time"
    summary = outcome.telemetry.summary()
    assert summary["starved_ticks"] == 0
    path = assert_journal_within(twin, outcome)
    assert np.abs(np.diff(path, axis=0)).sum() > 0.05
    reading = twin.read()
    assert time.monotonic() - reading.timestamp < 0.2
    assert reading.frames["front"].image.shape == (96, 96, 3)


def test_a_controller_that_goes_silent_is_noticed_by_the_robot(twin, monkeypatch):
    run(twin, 0.3)
    time.sleep(PATIENCE_S + 0.3)
    assert twin.read().fault == "", "the run ended in order"
    monkeypatch.setattr(type(twin), "rest", lambda self: None)
    run(twin, 0.3)
    time.sleep(PATIENCE_S + 0.3)
    reading = twin.read()
    assert "watchdog" in reading.fault
    before = reading.position
    time.sleep(0.2)
    np.testing.assert_allclose(twin.read().position, before, atol=2e-3)
    twin.release()
    time.sleep(0.1)
    assert twin.read().fault == ""


@pytest.mark.parametrize(
    ("fault", "ending", "why"),
    [
        ({"fault": "joint 3 overheated"}, "robot", "joint 3 overheated"),
        ({"not_finite": True}, "robot", "not finite"),
        ({"mute": True}, "robot", "ms old"),
        ({"clock_s": 5.0}, "robot", "ms old"),
        ({"clock_s": -5.0}, "robot", "ms old"),
        ({"stalled": ["front"]}, "starved", "camera front"),
        ({"frozen": ["wrist"]}, "starved", "camera wrist"),
        ({"latency_s": 2 * PATIENCE_S}, "robot", "ms old"),
        ({"deaf": True}, "robot", "watchdog"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else None,
)
def test_faults_end_in_the_state_that_is_meant(twin, fault, ending, why):
    outcome, guard = run(twin, 20.0, between=lambda: twin.inject(**fault))
    assert outcome.ending == ending, outcome.why
    assert why in outcome.why
    assert outcome.seconds < 5.0
    twin.inject()
    assert_journal_within(twin, outcome)
    assert guard.state in ("stopped", "stopping")


def test_what_costs_nothing_is_borne(twin):
    outcome, _ = run(twin, 1.0, between=lambda: twin.inject(latency_s=0.03, jitter_s=0.03, drop=0.3))
    assert outcome.ending == "time", outcome.why
    twin.inject()
    assert_journal_within(twin, outcome)


def test_the_preflight_finds_what_is_wrong(twin):
    body = ArmBody(twin.body)

    def look(**faults):
        twin.inject(**faults)
        twin.release()
        time.sleep(0.3)
        guard = SafetyGuard(twin.spec, 1 / HZ, check=ModelCheck(twin.model))
        found = preflight(twin, body, None, guard, control_hz=HZ, seconds=0.4)
        return {check.what: check.found for check in found if check.verdict == FAIL}

    twin.reset(3)
    assert look() == {}
    assert "unplugged" in look(stalled=["front"])["camera front"]
    assert "ms old" in look(latency_s=0.6)["readings"]
    assert "hot" in look(fault="hot")["position"]
    twin.inject()
    twin.release()


def test_a_twin_that_dies_is_a_lost_robot(factory):
    import os
    import signal

    robot = MujocoTwin(env=factory)
    robot.connect()
    outcome, _ = run(robot, 20.0, between=lambda: os.kill(robot.process_id, signal.SIGKILL))
    assert outcome.ending == "robot"
    assert "lost" in outcome.why
    robot.disconnect()


@pytest.fixture
def standing(factory, monkeypatch):
    """A twin that somebody else started, and a robot that knows its address and key."""
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    words = [sys.executable, "-m", "brachium", "twin", "env=tabletop/reach", "port=0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    address = process.stdout.readline().split()[1]
    yield MujocoTwin(env=factory, address=address)
    process.terminate()
    process.wait(5)
    process.stdout.close()


def test_who_says_nothing_keeps_nobody_out(standing, monkeypatch):
    host, _, port = standing._address.rpartition(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(8)]
    monkeypatch.setenv(KEY_VARIABLE, "another")
    with pytest.raises(RobotError, match="refuses"):
        standing.connect()
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    standing.connect()
    assert standing.read().position.shape == (standing.spec.dof,)
    standing.disconnect()
    for one in silent:
        one.close()


def test_it_can_be_connected_again_and_again_while_it_talks(standing):
    """A thread that still reads the old connection must not take what the new one is told."""
    before = threading.active_count()
    for k in range(25):
        standing.connect()
        assert standing.ask({"type": "journal"}, "journal")["type"] == "journal", k
        standing.disconnect()
    assert threading.active_count() <= before + 1, "every listener has ended"
    with pytest.raises(RobotError, match="not connected"):
        standing.read()


def test_a_second_controller_takes_over_and_the_first_hears_of_it(standing, factory):
    standing.connect()
    other = MujocoTwin(env=factory, address=standing._address)
    other.connect()
    until = time.monotonic() + 5.0
    while time.monotonic() < until and not standing._lost:
        time.sleep(0.01)
    with pytest.raises(RobotError, match="lost"):
        standing.read()
    assert other.read().position.shape == (other.spec.dof,)
    other.disconnect()
    standing.disconnect()


def test_the_wrong_key_is_refused(factory, monkeypatch):
    robot = MujocoTwin(env=factory, address="127.0.0.1:1")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(RobotError, match=KEY_VARIABLE):
        robot.connect()
    monkeypatch.setenv(KEY_VARIABLE, "x")
    with pytest.raises(RobotError, match="no twin at"):
        robot.connect()
    with pytest.raises(RobotError, match="HOST:PORT"):
        MujocoTwin(env=factory, address="somewhere").connect()
