"""Leader arms of LeRobot: units, what is refused, and a person who moves one."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from brachium.cli.compose import load
from brachium.errors import RobotError
from brachium.real_robot.drivers.lerobot_units import AxisMap
from brachium.real_robot.teleop.lerobot_leader import LeaderLink, LeRobotLeader

MOTION = {"velocity": 1.5, "acceleration": 10.0, "jerk": 200.0}
TURN = {"low": -1.5, "high": 1.5, **MOTION}
AXES = [
    {"name": "shoulder", "key": "shoulder.pos", "unit": "degrees", **TURN},
    {"name": "elbow", "key": "elbow.pos", "unit": "degrees", **TURN},
    {"name": "grip", "key": "gripper.pos", "unit": "percent", "gripper": True, "low": 0.0, "high": 1.0, **MOTION},
]


@pytest.fixture
def config(monkeypatch, tmp_path):
    pytest.importorskip("lerobot")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent / "lerobot_plugins")
    hold(tmp_path, [90.0, -45.0, 25.0])
    return {"type": "fakeleader", "folder": str(tmp_path), "calibration_dir": str(tmp_path), "id": "a"}


PACKAGES = ("lerobot_teleoperator_fakeleader",)


def hold(folder, position):
    temporary = folder / "held.partial"
    temporary.write_text(json.dumps(position))
    temporary.replace(folder / "held")


def test_the_leader_of_the_example_is_known_without_lerobot():
    leader = load("teleop/so101_leader")
    assert leader.kind == "axes"
    assert [axis.name for axis in leader.axes.axes][-1] == "gripper"
    assert ("y", "success") in leader.describe()
    assert not any(meaning == "+x" for _, meaning in leader.describe())
    with pytest.raises(RobotError, match="not connected"):
        leader.read()
    leader.disconnect()
    with pytest.raises(RobotError, match="expected config with LeRobot's type"):
        LeRobotLeader(config={}, axes=AXES)


def test_a_link_reads_in_the_robots_units(config, tmp_path):
    link = LeaderLink(config, AxisMap(AXES), packages=PACKAGES)
    link.open()
    np.testing.assert_allclose(link.read().position, [math.pi / 2, -math.pi / 4, 0.25])
    hold(tmp_path, None)
    for _ in range(5):
        np.testing.assert_allclose(link.read().position[0], math.pi / 2)  # a bus may fail now and then; it grows old
    with pytest.raises(RobotError, match="no answer from motor 3"):
        link.read()
    link.close()


@pytest.mark.parametrize(
    ("change", "axes", "message"),
    [
        ({"type": "fakeleadr"}, AXES, "no teleoperator 'fakeleadr'. Did you mean 'fakeleader'"),
        ({"speed": 3}, AXES, "cannot be made"),
        ({"calibrated": False}, AXES, "lerobot-calibrate --teleop.type=fakeleader --teleop.id=a"),
        ({}, [*AXES[:1], {**AXES[1], "key": "wrist.pos"}, AXES[2]], "wrist"),
    ],
)
def test_leaders_that_do_not_fit_are_refused(config, change, axes, message):
    with pytest.raises(RobotError, match=message):
        LeaderLink({**config, **change}, AxisMap(axes), packages=PACKAGES).open()


@pytest.mark.slow
def test_a_person_moves_the_arm(config, tmp_path):
    leader = LeRobotLeader(config=config, axes=AXES, packages=PACKAGES)
    with leader:
        begin = time.monotonic()
        while time.monotonic() - begin < 0.6:
            hand = leader.read()
            time.sleep(0.02)
        np.testing.assert_allclose(hand.axes, [math.pi / 2, -math.pi / 4, 0.25])
        assert not hand.active, "an arm that lies there is nobody's wish"
        seen = []
        for k in range(40):
            hold(tmp_path, [90.0 - k, -45.0, 25.0])
            time.sleep(0.02)
            seen.append(leader.read())
        assert any(hand.active for hand in seen)
        assert seen[-1].axes[0] < math.pi / 2 - 0.4
        hold(tmp_path, None)
        until = time.monotonic() + 10.0
        why = ""
        while not why and time.monotonic() < until:
            try:
                leader.read()
            except RobotError as error:
                why = str(error)
            time.sleep(0.02)
        assert "motor 3" in why
