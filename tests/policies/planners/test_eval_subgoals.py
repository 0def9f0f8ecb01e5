"""``brachium eval`` with checkpoints that generate subgoals: from the command line to the report."""

import json
from pathlib import Path

import pytest
import torch
from sliding_squares import FLOW

import brachium
from brachium.__main__ import config_of, main
from brachium.vla.generative.reading import Reader
from brachium.vla.generative.system import SubgoalSystem


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained system of the simulated arm."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    conf = OmegaConf.load(Path(brachium.__file__).parent / "conf" / "embodiment" / "arm6_ee.yaml")
    torch.manual_seed(0)
    system = SubgoalSystem(
        kind="visual",
        embodiment=instantiate(conf).spec,
        cameras=("front",),
        reader=Reader.load("nano"),
        generator={"size": 16, "frames": 1, "steps": 8, "widths": [16, 32], "patch": 2},
        policy={"head": FLOW, "action_horizon": 2, "width": 16, "keypoints": 4},
        progress={"width": 16},
    )
    return system.save(tmp_path_factory.mktemp("system") / "checkpoint", {"head": "visual subgoals", "seconds": {}})


def test_planners_that_draw_have_an_evaluation_of_their_own():
    assert config_of("eval", ["planner=visual", "checkpoint=x"]) == "eval_subgoals"
    assert config_of("eval", ["planner=video", "checkpoint=x"]) == "eval_subgoals"
    assert config_of("eval", ["planner=saycan"]) == "eval_planner"
    assert config_of("eval", ["checkpoint=x"]) == "eval"


def test_an_evaluation_goes_on_and_its_report_shows_the_subgoals(checkpoint, tmp_path):
    words = ["eval", "planner=visual", f"checkpoint={checkpoint}", "env=tabletop/reach", "~suite", "num_envs=2"]
    words += ["planner.guidance.steps=1", "planner.candidates=1", "videos=0", "splits={train: 1.0}", f"out={tmp_path}"]
    assert main([*words, "episodes=1"]) == 0
    first = json.loads((tmp_path / "episodes.jsonl").read_text())
    pictures = (tmp_path / "subgoals.png").read_bytes()
    assert main([*words, "episodes=2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0]["actions"] == first["actions"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["subgoals"]["made"] >= 1
    assert summary["this_run"]["episodes"] == 1
    page = (tmp_path / "report.html").read_text()
    assert "Generated subgoals" in page
    assert len(pictures) > 500
    # Another planner's episodes are not mistaken for these.
    assert main([*words, "episodes=1", "planner.shuffle=none", "planner.horizon=4"]) == 0
    assert len((tmp_path / "episodes.jsonl").read_text().splitlines()) == 1


def test_without_options_the_planner_is_the_one_of_the_checkpoint(checkpoint, tmp_path, capfd):
    words = ["eval", f"checkpoint={checkpoint}", "env=tabletop/reach", "~suite", "num_envs=1", "episodes=1", "videos=0"]
    assert main([*words, "report=false", "splits={train: 1.0}", f"out={tmp_path / 'a'}"]) == 0
    assert main(["eval", "planner=video", *words[1:], f"out={tmp_path / 'b'}"]) == 2
    assert "type planner=visual" in capfd.readouterr().err
    assert main(["eval", "planner=visual", "checkpoint=nowhere", f"out={tmp_path / 'c'}"]) == 2
    assert "train-visual" in capfd.readouterr().err
