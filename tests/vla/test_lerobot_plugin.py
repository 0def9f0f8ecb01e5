"""Checkpoints inside LeRobot: its own evaluation does what our policy does, and says what does not fit."""

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from brachium.__main__ import main
from brachium.policies.executor import RecedingHorizon
from brachium.policies.vla_policy import VLAPolicy
from brachium.spec import EmbodimentSpec, FeatureSpec, Observation
from brachium.vla.exchange.lerobot_plugin import identity_of
from brachium.vla.optim import Optimization
from brachium.vla.train import train

from .conftest import SIZE, make_recipe, record_demos

HERE = Path(__file__).resolve().parent
PLUGIN = HERE.parent.parent / "integrations" / "lerobot_policy_brachium"
FAST = Optimization(steps=4, batch_size=8, warmup=1, precision="float32", log_every=2, save_every=4, lr=3e-3, seed=1)


def point():
    axes = {"names": ("pan", "tilt"), "units": ("rad", "rad")}
    return EmbodimentSpec(
        name="point",
        robot="point",
        control_hz=10.0,
        cameras=(FeatureSpec(name="front", shape=(SIZE, SIZE, 3), dtype="uint8"),),
        state=FeatureSpec(name="state", shape=(2,), **axes),
        action=FeatureSpec(name="action", shape=(2,), low=(-1.0, -1.0), high=(1.0, 1.0), **axes),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("point")
    store = record_demos(folder / "store", spec=point())
    options = {"model": make_recipe(), "optimization": FAST, "heldout": 0.3, "device": "cpu"}
    train(store=str(store.path), out=str(folder / "run"), **options)
    return folder / "run" / "checkpoint"


ROBOT = """
# A robot with two joints.
_target_: brachium.real_robot.drivers.lerobot.LeRobot
config: {type: twoaxes}
axes:
  - {name: tilt, key: b.pos, unit: degrees, low: -1, high: 1, velocity: 1, acceleration: 1, jerk: 1}
  - {name: pan, key: a.pos, unit: degrees, low: -1, high: 1, velocity: 1, acceleration: 1, jerk: 1, offset: 1.0}
cameras:
  front: {key: cam, height: 32, width: 32, crop: true}
"""


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """Folders: for environments, and for a robot with its YAML."""
    folder = tmp_path_factory.mktemp("exported")
    words = ["export-policy", "kind=brachium", f"checkpoint={checkpoint}"]
    assert main([*words, f"out={folder / 'env'}"]) == 0
    (folder / "conf" / "robot").mkdir(parents=True)
    (folder / "conf" / "robot" / "twoaxes.yaml").write_text(ROBOT.lstrip())
    assert main([*words, f"out={folder / 'robot'}", "robot=twoaxes", "--config-dir", str(folder / "conf")]) == 0
    return folder / "env", folder / "robot"


def test_the_folder_says_what_it_is_and_holds_no_weights(exported, checkpoint):
    folder, robot = exported
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "policy_postprocessor.json",
        "policy_preprocessor.json",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["type"] == "brachium"
    assert config["checkpoint"] == str(checkpoint.resolve())
    assert config["identity"] == identity_of(checkpoint)
    assert config["input_features"] == {
        "observation.state": {"type": "STATE", "shape": [2]},
        "observation.images.front": {"type": "VISUAL", "shape": [3, SIZE, SIZE]},
    }
    assert config["output_features"] == {"action": {"type": "ACTION", "shape": [2]}}
    theirs = json.loads((robot / "config.json").read_text())
    assert theirs["action_feature_names"] == ["b.pos", "a.pos"]
    assert "observation.images.cam" in theirs["input_features"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out=CHECKPOINT"], "a folder of its own"),
        (["out=CHECKPOINT/inside"], "a folder of its own"),
        (["options={n_action_steps: 99}"], "expected 1 to 4, the length of a chunk"),
        (["options={n_action_step: 2}"], "Did you mean 'n_action_steps'"),
        (["options={embodiment: arm}"], "options.embodiment=arm: which? Choices: point"),
        (["robot=mock"], "expected a robot that LeRobot drives, such as so101, got MockRobot"),
        (["robot=so101", "~robot.cameras.front"], "the checkpoint (point) also sees ['front']"),
        (["kind=pi0", "robot=so101"], "expected no robot, which is for kind=brachium"),
    ],
)
def test_an_export_that_cannot_be_is_said(checkpoint, tmp_path, capsys, words, message):
    words = [word.replace("CHECKPOINT", str(checkpoint)) for word in words]
    given = ["kind=brachium", f"out={tmp_path / 'out'}"]
    kept = [word for word in given if not any(word.split("=")[0] == own.split("=")[0] for own in words)]
    assert main(["export-policy", f"checkpoint={checkpoint}", *kept, *words]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def found(exported, tmp_path_factory):
    """What LeRobot said of it all, and the environments' journal."""
    pytest.importorskip("lerobot")
    out = tmp_path_factory.mktemp("lerobot")
    site = out / "site"
    shutil.copytree(PLUGIN, out / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(site), str(out / "source")], check=True)
    shutil.copy(HERE / "lerobot_plugins" / "lerobot_env_toyreach.py", site)
    (site / "lerobot_env_toyreach-1.0.dist-info").mkdir()
    (site / "lerobot_env_toyreach-1.0.dist-info" / "METADATA").write_text("Name: lerobot_env_toyreach\n")
    shutil.copytree(exported[0], out / "wrist")  # as if the checkpoint's camera had another name there
    config = json.loads((out / "wrist" / "config.json").read_text())
    (out / "wrist" / "config.json").write_text(json.dumps({**config, "camera_keys": {"front": "wrist"}}))
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HOME": str(out / "hf")}
    words = [sys.executable, str(HERE / "lerobot_evaluation.py"), str(exported[0]), str(exported[1]), str(out)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    rows = []
    with (out / "journal").open("rb") as file:
        while file.peek(1):
            rows.append(pickle.load(file))
    return json.loads(line.removeprefix("FOUND ")), rows


@pytest.mark.slow
def test_lerobots_evaluation_does_what_our_policy_does(found, checkpoint):
    said, rows = found
    assert said["episodes"] == 3
    policy = VLAPolicy.from_checkpoint(checkpoint)
    seeds = sorted({row["seed"] for row in rows})
    assert set(seeds) >= {1000, 1001, 1002}, "LeRobot's own seeds, which the policy draws from too"
    for seed in (1000, 1001, 1002):
        executor = RecedingHorizon(policy, execute_horizon=2)
        executor.reset(0, seed)
        episode = sorted((row for row in rows if row["seed"] == seed), key=lambda row: row["step"])
        assert [row["step"] for row in episode] == list(range(6))
        for row in episode:
            seen = Observation(
                images={"front": row["pixels"]["front"]}, state=row["agent_pos"], instruction="reach the blue ball"
            )
            np.testing.assert_allclose(executor.act([seen], [0])[0], row["action"], atol=1e-5)
    executor.reset(0, 1003)
    assert np.abs(executor.act([seen], [0])[0] - row["action"]).max() > 1e-2, "other noise is another action"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("camera size", "SpecMismatchError: observation.images.front: expected 32 x 32 pixels .*, got 48 x 48"),
        ("action", r"SpecMismatchError: the environment takes actions \(3,\), the checkpoint \(point\) gives \(2,\)"),
        ("moved", "NotFoundError: no checkpoint at .*nowhere. .*--policy.checkpoint=FOLDER"),
        ("another", "CheckpointError: .* is another checkpoint than the one that was exported"),
        ("camera", "SpecMismatchError: expected a camera observation.images.wrist, got .*front.*--rename_map"),
        ("state", r"SpecMismatchError: observation.state: expected \(batch, 2\) .*, got \(1, 3\)"),
        ("task", "SpecMismatchError: task: expected what to do .*--policy.instruction"),
        ("range", "SpecMismatchError: observation.images.front: expected values from 0 to 1, got 255"),
        ("not finite", "SpecMismatchError: observation.state: expected finite values"),
    ],
)
def test_what_does_not_fit_is_one_line(found, name, words):
    assert re.match(words, found[0][name]), found[0][name]
    assert "\n" not in found[0][name]


@pytest.mark.slow
def test_a_robots_keys_are_turned_into_axes_and_back(found):
    said = found[0]
    assert said["chunk"] == [1, 4, 2]
    np.testing.assert_allclose(said["robot state"], [1.0 - math.pi / 4, math.pi / 2], atol=1e-6)
    assert said["robot image"] == [[32, 32, 3], 100], "the middle of the picture"
    np.testing.assert_allclose(said["robot action"], [[math.degrees(-0.25), math.degrees(0.5 - 1.0)]], atol=1e-4)
    assert np.isfinite(said["robot acts"]).all()
