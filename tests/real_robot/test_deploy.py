"""The verbs that move a robot, from end to end: deploy with its log and report, people who correct, replay."""

import functools
import json
import time

import imageio.v2 as imageio
import numpy as np
import pytest
from serving import served

from brachium.__main__ import main
from brachium.datasets.store import EpisodeStore
from brachium.errors import ConfigError
from brachium.policies.executor import RecedingHorizon
from brachium.policies.video import HOLD
from brachium.real_robot.deploy import deploy
from brachium.real_robot.drivers.mock import MockRobot
from brachium.real_robot.drivers.mujoco_twin import MujocoTwin
from brachium.real_robot.eyes import Freshness
from brachium.real_robot.pacing import Timing
from brachium.real_robot.replay import RecordedPolicy, replay
from brachium.real_robot.safety.guard import Rules
from brachium.real_robot.teleop.pilot import Reach
from brachium.real_robot.teleop.teleoperator import Hand
from brachium.spec import Observation

from .test_controller import WavePolicy, embodiment
from .test_teleop import Scripted, twist

PATIENT = {
    "timing": Timing(silent_s=2.0),
    "rules": Rules(reading_age_s=0.5, following=0.5),
    "freshness": Freshness(age_s=0.5, skew_s=0.5),
}


def options(**other):
    return {"executor": lambda p: RecedingHorizon(p, execute_horizon=2), "reach": Reach(), **PATIENT, **other}


@pytest.fixture
def address():
    with served(WavePolicy(embodiment(MockRobot()))) as (where, _):
        yield where


def test_a_deployment_leaves_a_store_figures_and_a_report(address, tmp_path, capsys):
    robot = MockRobot()
    code = deploy(
        policy=address, robot=robot, instruction="wave", seconds=1.0, episodes=2, out=str(tmp_path), **options()
    )
    assert code == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [run["ending"] for run in summary["runs"]] == ["time", "time"]
    assert summary["total"] is None, "nobody judged"
    assert all(run["success"] is None for run in summary["runs"])
    store = EpisodeStore.open(tmp_path / "store")
    assert store.num_episodes == 2
    for episode in (store.episode(0), store.episode(1)):
        assert 12 <= len(episode) <= 30, "one second at 20 Hz, and the way to rest"
        assert episode.info.instruction == "wave"
        assert episode.info.tags == ("deploy",)
        assert set(np.unique(episode.extras["source"])) <= {0, 1}
        steps = np.diff(episode.timestamp)
        assert (steps > 0).all()
        np.testing.assert_allclose(episode.state, episode.extras["measured"], atol=0.2)
        assert episode.images["front"].shape == (len(episode), 32, 32, 3)
        # what was executed is what was commanded: absolute targets of the mock's axes
        np.testing.assert_allclose(episode.action, episode.extras["commanded"], atol=1e-6)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4
    assert page.count("<video") == 2
    for number, episode in enumerate((store.episode(0), store.episode(1)), start=1):
        frames = imageio.mimread(tmp_path / "videos" / f"run-{number}.mp4", memtest=False)
        assert len(frames) == len(episode) + HOLD
        shown = np.asarray(frames[0][::6, ::6], float)[:32, :32]  # enlarged six times
        assert np.abs(shown - episode.images["front"][0]).mean() < 40.0
    assert "WavePolicy" not in page
    assert "period error" in capsys.readouterr().out


def test_a_person_corrects_and_the_log_says_so(address, tmp_path):
    """The person pushes between 0.4 s and 0.9 s; the policy goes on after that, and a key says it went well."""

    def hand(t):
        if 0.4 < t < 0.9:
            return Hand(twist=twist(z=1.0), active=True)
        return Hand(twist=np.zeros(6), keys=("success",) if t > 2.2 else ())

    code = deploy(
        policy=address,
        robot=MockRobot(),
        teleop=Scripted(hand),
        instruction="wave",
        seconds=20.0,
        report=False,
        out=str(tmp_path),
        **options(),
    )
    assert code == 0
    episode = EpisodeStore.open(tmp_path / "store").episode(0)
    assert episode.info.success is True
    assert set(episode.info.tags) == {"deploy", "corrected"}
    source = episode.extras["source"].ravel()
    assert set(source) >= {1, 2}
    human = np.flatnonzero(source == 2)
    assert 5 < len(human) < 40
    assert (np.diff(human) == 1).all(), "one stretch"
    assert (source[human[-1] + 2 :] != 2).all()
    pushed = episode.extras["commanded"][human][:, 2]
    assert pushed[-1] > pushed[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "dance"}, "expected mode"),
        ({"episodes": 0}, "expected episodes"),
        ({"instruction": None}, "what is the robot to do"),
        ({"policy": "nowhere"}, "expected the folder of a checkpoint or an address"),
    ],
)
def test_mistakes_are_told_before_anything_is_connected(tmp_path, change, message):
    robot = MockRobot()
    given = {"policy": "ws://127.0.0.1:1", "instruction": "wave", "out": str(tmp_path), **options(), **change}
    from brachium.errors import BrachiumError

    with pytest.raises(BrachiumError, match=message):
        deploy(robot=robot, **given)
    assert not robot._connected
    assert not robot.commands


def test_the_words_of_the_command_line_reach_the_verb(capsys):
    assert main(["deploy", "policy=ws://127.0.0.1:1", "robot=mock", "instruction=wave"]) == 2
    assert "no policy server" in capsys.readouterr().err
    assert main(["replay", "store=nowhere", "robot=mock"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["record", "robot=mock", "--dry-run"]) == 0
    assert "real_robot.collect" in capsys.readouterr().out
    assert main(["record", "out=x", "--dry-run"]) == 0
    assert "envs.record" in capsys.readouterr().out


# -- replay ------------------------------------------------------------------------------------------------------------


def look(spec, t):
    rng = np.random.default_rng(0)
    from dataclasses import replace

    return replace(Observation.fake(spec, rng), timestamp=t)


def test_recorded_actions_come_at_their_time():
    spec = embodiment(MockRobot())
    times = np.arange(10) / spec.control_hz
    actions = np.stack([times, -times, times * 2, (times > 0.2).astype(float)], axis=1).astype(np.float32)
    policy = RecordedPolicy(spec, actions, times)
    policy.predict([look(spec, 7.0)], np.zeros((1, 16, 1)))
    rows = policy.predict([look(spec, 7.13)], np.zeros((1, 16, 1))).actions[0]
    np.testing.assert_allclose(rows[:3, 0], [0.13, 0.18, 0.23], atol=1e-6)
    np.testing.assert_allclose(rows[-1], actions[-1], atol=1e-6)
    assert set(rows[:, 3]) <= {0.0, 1.0}, "a gripper is never half-way between two actions"
    slow = RecordedPolicy(spec, actions, times, pace=0.5)
    assert slow.seconds == pytest.approx(0.9 + 0.05, abs=1e-9)
    with pytest.raises(ConfigError, match="pace"):
        RecordedPolicy(spec, actions, times, pace=0.0)


def test_deltas_are_executed_once_and_then_nothing_more():
    from brachium.cli.compose import load

    spec = load("env/tabletop/reach")(images=False).embodiment.spec
    actions = np.full((5, 7), 0.01, np.float32)
    actions[:, 6] = 1.0
    times = np.arange(5) / spec.control_hz
    policy = RecordedPolicy(spec, actions, times)
    policy.predict([look(spec, 0.0)], np.zeros((1, 16, 1)))
    rows = policy.predict([look(spec, 0.3)], np.zeros((1, 16, 1))).actions[0]
    np.testing.assert_array_equal(rows[:2], actions[3:5])
    np.testing.assert_array_equal(rows[2:, :6], 0.0)
    np.testing.assert_array_equal(rows[2:, 6], 1.0)
    with pytest.raises(ConfigError, match="delta"):
        RecordedPolicy(spec, actions, times, pace=0.5)


def test_an_episode_flown_by_hand_is_replayed(tmp_path):
    """On the simulated arm, by poses: what was recorded brings it to where it was."""
    from brachium.cli.compose import load
    from brachium.real_robot.collect import collect

    factory = functools.partial(load("env/tabletop/reach"), embodiment=load("embodiment/arm6_pose"))

    def hand(t):
        if t > 1.6:
            return Hand(twist=np.zeros(6), keys=("success",))
        return Hand(twist=twist(x=0.7, z=-0.3) if t < 0.8 else twist(y=0.8), active=True)

    def twin():
        return MujocoTwin(env=factory, watchdog_s=1.0)

    store = tmp_path / "store"
    shared = {**PATIENT, "timing": Timing(silent_s=2.0)}
    assert (
        collect(robot=twin(), teleop=Scripted(hand), out=str(store), reach=Reach(), episodes=1, seed=5, **shared) == 0
    )
    first = EpisodeStore.open(store).episode(0)
    assert first.info.success is True
    assert first.info.meta["seed"] == 5
    way = np.abs(first.state[-1, :3] - first.state[0, :3])
    assert way[0] > 0.04
    assert way[1] > 0.04
    assert replay(store=str(store), robot=twin(), out=str(tmp_path / "again"), **shared) == 0
    again = EpisodeStore.open(tmp_path / "again" / "store").episode(0)
    assert "replay" in again.info.tags
    np.testing.assert_allclose(again.state[0, :3], first.state[0, :3], atol=0.02)
    np.testing.assert_allclose(again.state[-1, :3], first.state[-1, :3], atol=0.02)


def test_an_episode_that_begins_elsewhere_is_refused(tmp_path):
    from brachium.datasets.schema import StoreSchema
    from brachium.datasets.writer import EpisodeWriter
    from brachium.real_robot.body import own_embodiment

    robot = MockRobot(cameras=())
    spec = own_embodiment(robot, 10.0)
    store = EpisodeStore.create(tmp_path / "store", StoreSchema(embodiment=spec))
    with EpisodeWriter(store) as writer:
        writer.begin("far away")
        for _ in range(3):
            writer.step({}, np.full(4, 0.9, np.float32), np.full(4, 0.9, np.float32))
        writer.end(True)
    with pytest.raises(ConfigError, match=r"begins elsewhere: j1 is 0\.000, was 0\.900"):
        replay(store=str(tmp_path / "store"), robot=robot, out=str(tmp_path / "out"), **PATIENT)
    assert not robot.commands
    with pytest.raises(Exception, match="expected an episode from 0 to 0, got 3"):
        replay(store=str(tmp_path / "store"), robot=robot, episode=3, **PATIENT)
    begin = time.monotonic()
    assert replay(store=str(tmp_path / "store"), robot=robot, reach=2.0, out=str(tmp_path / "out"), **PATIENT) == 0
    assert time.monotonic() - begin < 20.0
    path = np.array([position for _, position in robot.commands])
    assert path[-1, :3].min() > 0.4, "on its way as fast as the limits allow, for as long as the episode took"
